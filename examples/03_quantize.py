"""Round a model to 4 bits, as it is and rotated, and compare both with the model that is not rounded."""

import torch
from decoder import VOCABULARY, Decoder, export_decoder

import spinpass
from spinpass.quantization import quantize


def with_large_channels() -> Decoder:
    """A decoder like a trained one: some channels are far larger than the rest, and multiplied by small weights."""
    torch.manual_seed(0)
    model = Decoder().eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.norm1.weight[:2] *= 30
            for linear in (layer.q, layer.k, layer.v):
                linear.weight[:, :2] /= 30
    return model


@torch.no_grad()
def error(program: torch.export.ExportedProgram) -> float:
    """How far the logits are from those that are not rounded, ÷ the size of these."""
    return float((program.module()(held_out) - expected).norm() / expected.norm())


program = export_decoder(with_large_channels())
calibration = [(torch.randint(VOCABULARY, (2, 16)),) for _ in range(4)]  # what the model will read, for example
held_out = torch.randint(VOCABULARY, (4, 16))  # and what nothing was chosen by
expected = program.module()(held_out)

# One Hadamard behind each norm spreads the large channels over all of them.
rotated = spinpass.transform(program, spinpass.RotationConfig(form="online"))
SCHEME = "w4-gptq-a4"  # weights of 4 bits by GPTQ, activations of 4 bits for each token
print(f"original, {SCHEME}: error {error(quantize(program, SCHEME, calibration).program):.2f}")
result = quantize(rotated, SCHEME, calibration)
print(f"rotated,  {SCHEME}: error {error(result.program):.2f}")

# The report says how large the weights have become, and has the integers of each.
report = result.report
before, after = report.bytes_before / 1e3, report.bytes_after / 1e3
print(f"{before:.0f} kB have become {after:.0f} kB; {len(report.weights)} weights are rounded")
