"""A rotated and quantized model as a .pte file for ExecuTorch, whatever its family: by default a tiny random Qwen 3.

python examples/08_executorch.py [MODEL]      # a folder of transformers or a name on the hub
"""

import sys
import tempfile

import torch

import spinpass
from spinpass.evaluation import ProgramScorer
from spinpass.exporters import executorch
from spinpass.loading import export_static_cache
from spinpass.quantization import quantize
from spinpass.runtime import PteDecoder

CONTEXT, NEW_TOKENS = 32, 12
PROMPT = list(range(3, 11))


def tiny_qwen() -> torch.nn.Module:
    """Qwen 3 with random weights: grouped heads, normalised queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=128, head_dim=16)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))


def given(name: str) -> torch.nn.Module:
    """A model that transformers loads."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def simulated_text(program: torch.export.ExportedProgram) -> list[int]:
    """What the quantized program writes in PyTorch, every token from the whole text."""
    scorer, ids = ProgramScorer(program), list(PROMPT)
    for _ in range(NEW_TOKENS):
        ids.append(int(scorer.logits(ids)[-1].argmax()))
    return ids[len(PROMPT) :]


model = (given(sys.argv[1]) if len(sys.argv) > 1 else tiny_qwen()).eval()
program = export_static_cache(model, CONTEXT)
rotated = spinpass.transform(program, spinpass.RotationConfig(form="online"))
generator = torch.Generator().manual_seed(1)
windows = [torch.randint(3, 128, (CONTEXT,), generator=generator).tolist() for _ in range(4)]
quantized = quantize(rotated, "w4g32-bf16-gptq-a8asym", [ProgramScorer(rotated).inputs(window) for window in windows])

with tempfile.TemporaryDirectory() as folder:
    report = executorch.export(quantized, folder)
    print(f"{report.path.name}: {report.bytes / 1e3:.0f} kB, {report.integer_layers} linear layers on 4-bit integers")
    print(report.certificate.verdict if report.certificate else report.uncertified)
    tokens = list(PteDecoder(folder).generate(PROMPT, NEW_TOKENS, end=()).tokens)

expected = simulated_text(quantized.program)
print(f"ExecuTorch writes  {tokens}")
print(f"the simulation     {expected}")
print(f"{sum(a == b for a, b in zip(tokens, expected))} of {NEW_TOKENS} tokens are the same")
