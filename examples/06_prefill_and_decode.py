"""Two graphs of one model, for prompts and for single tokens, rotated apart: they share one KV cache all the same.

transformers has an exporter that writes both as ONNX files. Here a rotation stands in between.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.exporters import ExportedModel, OnnxConfig

import spinpass
from spinpass.exporters.transformers import RotatedOnnxExporter, generate_exported

PROMPT, NEW_TOKENS = list(range(3, 11)), 12

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=128, initializer_range=0.2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
ids = torch.arange(16).reshape(2, 8)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

exporter = RotatedOnnxExporter(rotation=spinpass.RotationConfig(form="online"))
exported = exporter.export_for_generation(model, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))
for name, component in zip(exported.components, exporter.records):
    print(f"{name}: {len(component.rotations)} spaces rotated, {len(component.outputs)} rotated cache outputs")

# Each graph has a record of the basis in which it hands its cache on, and of that in which it takes it.
prefill, decode = exporter.records
gives, takes = ([cache.rotation for cache in each.values()] for each in (prefill.outputs, decode.inputs))
print("same bases:", gives == takes)

with tempfile.TemporaryDirectory() as folder:
    exported.save_pretrained(folder)  # an ordinary folder: who loads it needs no spinpass
    tokens = generate_exported(ExportedModel.from_pretrained(folder), PROMPT, NEW_TOKENS)

expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
same = sum(a == b for a, b in zip(tokens, expected[0, len(PROMPT) :].tolist()))
print(f"{same} of {NEW_TOKENS} tokens are those of the original model")
