"""Prefill and decode as two programs of one model, rotated apart: they get the same bases and share one KV cache."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.exporters import DynamoConfig, DynamoExporter

import spinpass
from spinpass import record

sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
prompt = torch.randint(3, 96, (2, 7))
inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
exported = DynamoExporter().export_for_generation(model, inputs, DynamoConfig(dynamic=True)).components
kept = "cache" if "cache" in exported["decode"].metadata.kwargs else "past_key_values"  # before transformers 5.24
prefill, decode = (spinpass.transform(exported[name].program) for name in ("prefill", "decode"))

# Each program says in which basis it hands its cache on and in which it takes it.
gives, takes = record.read(prefill), record.read(decode)
assert gives is not None and takes is not None
print("same bases:", [c.rotation for c in gives.outputs.values()] == [c.rotation for c in takes.inputs.values()])

# The rotated pair, cache passed on as it is, against the model itself.
with torch.no_grad():
    empty = DynamicCache(config=model.config)
    first = prefill.module()(input_ids=prompt, position_ids=torch.arange(7).expand(2, 7), **{kept: empty})
    token, at = first.logits[:, -1:].argmax(-1), torch.full((2, 1), 7)
    second = decode.module()(input_ids=token, position_ids=at, **{kept: first[kept]})
    expected = model(torch.cat((prompt, token), dim=1)).logits[:, -1:]
print(f"max |difference of the logits| after prefill and decode: {(second.logits - expected).abs().max():.1e}")
