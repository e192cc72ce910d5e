"""What spinpass does on a device, each on the CPU and elsewhere: ``python -m tests.support.elsewhere_cases``.

It prints {case: what went wrong, or nothing} as JSON. The results of both have to be equal but for the order of sums:
composed operators are called part by part elsewhere.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.export import ExportedProgram

import spinpass
from spinpass.evaluation import ProgramScorer, own_tokens, perplexity
from spinpass.execution import run
from spinpass.folders import export, request
from spinpass.graph import Handle, Held, checks, device_of, devices, on_device, storage_key, with_other_values
from spinpass.quantization import QuantizationConfig, Quantized, quantize, site_errors
from spinpass.quantization.packed import Trainable, decode_scales, double_quantize_program, pack, unpack
from spinpass.quantization.rounding import grid, moments
from spinpass.reporting.activations import WatchedScorer
from tests.support import elsewhere, experts, folders, models, quantizable
from tests.support.decoders import Decoder
from tests.support.decoders import made as with_weights

_CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Made = dict[str, Any]
"""What is compared, by name: tensors and numbers."""


def streamed(program: ExportedProgram) -> ExportedProgram:
    """The program with handles for parameters."""
    held: dict[Any, Handle] = {}
    for tensor in program.state_dict.values():
        held.setdefault(storage_key(tensor), Handle(Held(tensor.detach(), tensor.dtype)))
    return with_other_values(program, {name: held[storage_key(t)] for name, t in program.state_dict.items()})


def rotated(program: ExportedProgram, inputs: list[Any], **config: Any) -> Made:
    made = spinpass.rotate(program, spinpass.RotationConfig(**config))
    assert made.certificate is not None and made.certificate.ok
    found: Made = {check.name: check.float64.relative for check in made.certificate.outputs}
    return found | constants(made.program) | outputs(made.program, inputs)


def quantized(program: ExportedProgram, inputs: list[Any], scheme: str, **options: Any) -> Made:
    made = quantize(program, QuantizationConfig.parse(scheme), inputs, **options)
    return of_quantized(made) | outputs(made.program, inputs)


def of_quantized(made: Quantized) -> Made:
    found: Made = {}
    for name, weight in made.report.weights.items():
        codes = weight.codes
        assert codes.q.device.type == codes.scales.device.type == codes.zeros.device.type == "cpu", "codes are the host's"
        found |= {f"{name}.q": codes.q, f"{name}.scales": codes.scales, f"{name}.error": weight.error}
    return found


def constants(program: ExportedProgram) -> Made:
    return {name: tensor.detach().cpu() for name, tensor in program.state_dict.items()}


def outputs(program: ExportedProgram, inputs: list[Any]) -> Made:
    found = run(program, inputs[0])
    assert isinstance(found[0], Tensor) and found[0].device == device_of(program)
    return {f"output {i}": value.cpu() for i, value in enumerate(found) if isinstance(value, Tensor)}


def scored(program: ExportedProgram, inputs: list[Any]) -> Made:
    windows = [[int(token) for token in each[0][0].cpu()] for each in inputs]
    return {"losses": list(perplexity(ProgramScorer(program), windows).losses)}


def written(program: ExportedProgram, inputs: list[Any]) -> Made:
    return {"tokens": own_tokens(program, 2, 8)}


def judged(program: ExportedProgram, inputs: list[Any]) -> Made:
    return dict(site_errors(program, QuantizationConfig.parse("w4g16-rtn-a8static"), inputs))


def of_experts(program: ExportedProgram, inputs: list[Any]) -> Made:
    scorer = ProgramScorer(program)
    given = [scorer.inputs([(7 * k + j) % 90 + 3 for j in range(12)]) for k in range(2)]
    made = quantize(program, "w4g16-gptq", given)
    assert "were rounded by" in made.report.experts
    return of_quantized(made)


def watched(program: ExportedProgram, inputs: list[Any]) -> Made:
    scorer = WatchedScorer(program)
    scorer.logits([int(token) for token in inputs[0][0][0].cpu()])
    return {str(name): found.peaks for name, found in scorer.statistics().items()}


def packed(program: ExportedProgram, inputs: list[Any]) -> Made:
    made = pack(quantize(program, "w4g16-asym-rtn"))
    found = outputs(made.program, inputs)
    again = decode_scales(double_quantize_program(made.program))
    found |= {f"doubled {name}": value for name, value in outputs(again, inputs).items()}
    trained = Trainable(made.program)
    assert device_of(trained.packed()) == device_of(program)
    return found | {f"unpacked {name}": value for name, value in outputs(unpack(made.program), inputs).items()}


def lowered(program: ExportedProgram, inputs: list[Any]) -> Made:
    made = quantize(spinpass.transform(program), "w4g16-rtn-a8")
    return outputs(spinpass.lower(made.program), inputs)


def exported(program: ExportedProgram, inputs: list[Any]) -> Made:
    """A folder, written from a model's, that was certified and tried; a weight between two codes may become either."""
    device = device_of(program)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(request, "named_device", lambda _: device):
        model = folders.model_folder(Path(folder, "model"))
        made = export(model, Path(folder, "out"), quantize="w4g16-gptq-a8", calibration_windows=2, device="cuda")
        assert abs(made.manifest["card"]["ratio"] - 1) < 0.1
        return {"bytes": sum(Path(folder, "out", name).stat().st_size for name in made.files if ".onnx" in name)}


@cache
def _plain() -> ExportedProgram:
    return quantizable.export(with_weights(Decoder(layers=1), dtype=torch.float32))


@cache
def _with_cache() -> ExportedProgram:
    return models.export_hf_cache(models.build("llama", num_hidden_layers=1))


CASES: dict[str, tuple[Callable[[], ExportedProgram], Callable[..., Made], dict[str, Any]]] = {
    "rotate": (_plain, rotated, {}),
    "rotate offline": (_plain, rotated, {"rotations": ("R1", "R2"), "form": "offline"}),
    "rotate by signs": (_plain, rotated, {"kind": "random-hadamard"}),
    "rotate by a matrix": (_plain, rotated, {"kind": "random-matrix"}),
    "rotate handles": (lambda: streamed(_plain()), rotated, {}),
    "round to nearest": (_plain, quantized, {"scheme": "w4g16-rtn"}),
    "round handles": (lambda: streamed(_plain()), quantized, {"scheme": "w4g16-gptq-head8-embed8"}),
    "gptq": (_plain, quantized, {"scheme": "w4g16-gptq"}),
    "gptq, asymmetric, in order": (_plain, quantized, {"scheme": "w3-asym-gptq-order-a8"}),
    "static activations": (_plain, quantized, {"scheme": "w8-rtn-a8static"}),
    "static activations per channel": (_plain, quantized, {"scheme": "w8-rtn-a8channel"}),
    "activations of four bits, caches": (_plain, quantized, {"scheme": "w4-asym-gptq-a4-kv4"}),
    "mixed widths": (_plain, quantized, {"scheme": "w4.5g16-gptq"}),
    "distill": (_plain, quantized, {"scheme": "w3g16-gptq-distill1"}),
    "perplexity": (_plain, scored, {}),
    "judge spaces": (_plain, judged, {}),
    "statistics of activations": (_plain, watched, {}),
    "pack, unpack, double quantization, training": (_plain, packed, {}),
    "lower": (_plain, lowered, {}),
    "text of its own": (_with_cache, written, {}),
    "export": (_plain, exported, {}),
    "experts": (lambda: experts.program(1, "grouped_mm"), of_experts, {}),
}


SLOW = {
    "experts", "text of its own", "export", "rotate offline", "rotate by signs", "round to nearest", "judge spaces",
    "static activations per channel", "gptq, asymmetric, in order", "mixed widths",
}  # fmt: skip
"""What takes long, or is near to another case."""


def _sum_on_the_cpu(left: Any, right: Any, counts: Any = None) -> Tensor:
    assert counts is None
    width = left[0].shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        total += (a.reshape(-1, width).T @ b.reshape(-1, width)).double()
    return total


def _index_on_the_cpu(columns: int, groups: int, index: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(columns) // -(-columns // groups) if index is None else index


def _draw_from_the_cpu(program: ExportedProgram, inputs: list[Any]) -> Made:
    logits = run(program, inputs[0])[0]
    return {"token": torch.multinomial(logits[0].softmax(-1), 1, generator=torch.Generator().manual_seed(0)).cpu()}


MUTATIONS: dict[str, tuple[str, Any, str, Any]] = {
    "a sum on the CPU": ("gptq", moments, "_product", _sum_on_the_cpu),
    "an index on the CPU": ("gptq", grid, "group_of", _index_on_the_cpu),
    "a draw from the CPU": ("perplexity", sys.modules[__name__], "scored", _draw_from_the_cpu),
}
"""Faults by name: the case that they are in, and the module, the function of it and what stands in its place."""


def tried(name: str, device: torch.device) -> str:
    """Run a case on the CPU and on the device; return what differs or failed."""
    program, case, options = CASES[name]
    case = globals()[case.__name__]  # which may be another by now
    here = program()
    inputs = quantizable.inputs(2)
    expected = case(here, inputs, **options)
    with elsewhere.elsewhere():
        there = on_device(here, device)
        assert device_of(there) == device
        moved = [tuple(tensor.to(device) for tensor in each) for each in inputs]
        found = case(there, moved, **options)
    if expected.keys() != found.keys():
        return f"other results: {sorted(expected.keys() ^ found.keys())}"
    for key, value in expected.items():
        wanted, made = torch.as_tensor(value), torch.as_tensor(found[key])
        if not torch.allclose(wanted.double(), made.double(), **_CLOSE):
            return f"{key} differs: {float((wanted.double() - made.double()).abs().max()):.1e}"
    return ""


def main() -> None:
    """Try every case."""
    elsewhere.register()
    known, packed = devices.named_device, checks._is_packed
    devices.named_device = lambda name: name if getattr(name, "type", "") == elsewhere.NAME else known(name)
    checks._is_packed = lambda tensor: not isinstance(tensor, elsewhere.There) and packed(tensor)
    device, found = torch.device(elsewhere.NAME, 0), {}
    for name in sys.argv[1:] or [*CASES, *MUTATIONS]:
        case, module, function, fault = MUTATIONS.get(name, (name, None, "", None))
        with nullcontext() if module is None else mock.patch.object(module, function, fault):
            try:
                found[name] = tried(case, device)
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
