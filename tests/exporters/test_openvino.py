"""OpenVINO models: what OpenVINO itself computes, at float32, against the program."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ConfigError, ExportError, ProgramError, VerificationError
from spinpass.execution.interpreter import run
from spinpass.quantization import Codes, Quantized, quantize
from tests.support import models
from tests.support.decoders import made
from tests.support.kronecker import by_factors
from tests.support.programs import program

openvino = pytest.importorskip("openvino")

from spinpass.exporters import certified_file  # noqa: E402
from spinpass.exporters import openvino as exporter  # noqa: E402
from spinpass.exporters.openvino import integers, writer  # noqa: E402
from spinpass.runtime.openvino_decoder import OpenVINODecoder  # noqa: E402
from spinpass.runtime.openvino_session import CompiledModel, generate_openvino  # noqa: E402


@pytest.fixture(scope="module")
def rotated() -> ExportedProgram:
    config = spinpass.RotationConfig(kind="random-hadamard", verify=False)
    return spinpass.transform(program("llama", "cache", torch.float32), config)


@pytest.fixture(scope="module")
def written(rotated: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> exporter.OpenVINOReport:
    return exporter.export(rotated, tmp_path_factory.mktemp("llama"))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def small(dtype: torch.dtype = torch.float32) -> ExportedProgram:
    return torch.export.export(Scale().to(dtype), (torch.zeros(2, 4, dtype=dtype),), dynamic_shapes=({0: Dim("n")},))


def test_a_rotated_decoder_is_certified(written: exporter.OpenVINOReport, rotated: ExportedProgram) -> None:
    assert [file.name for file in written.files] == ["openvino_model.bin", "openvino_model.xml"]
    assert written.bytes == sum(file.stat().st_size for file in written.path.parent.iterdir())
    assert written.certificate is not None and written.certificate.ok, written.uncertified
    assert written.certificate.verdict.startswith("equivalent: at worst ") and len(written.certificate.outputs) == 5
    assert written.inputs[:3] == ("input_ids", "position_ids", f"{models.cache_argument()}_0")
    assert written.outputs[:2] == ("logits", f"output.{models.cache_argument()}_0")
    assert json.loads(json.dumps(written.to_dict()))["certificate"]["ok"]
    found = openvino.Core().read_model(written.path)
    kept = record.Record.from_dict(json.loads(found.get_rt_info(["spinpass", "record"]).astype(str)))
    assert kept == record.read(rotated)


def test_kronecker_factors_run_as_products_and_caches_keep_each_head_in_its_basis(tmp_path: Path) -> None:
    before = program("llama", "cache", torch.float32)
    config = spinpass.RotationConfig(form="online", rotations=("R1", "R2", "R3", "R4"), verify=False)
    asked: dict[str, Any] = dict(by_factors(before, config))
    asked |= {s.name: _per_head(s.heads, s.size) for s in spinpass.plan(before, config).spaces if s.heads > 1}
    after = spinpass.transform(before, replace(config, matrices=asked))
    report = exporter.export(after, tmp_path)
    assert report.certificate is not None and report.certificate.ok, report.uncertified
    found = record.read(after)
    assert found is not None and {each.heads for each in found.inputs.values()} == {-3, None}  # values, keys
    assert {key.partition(":")[0] for key in asked} == {"R1", "R2", "R3", "R4"}


def _per_head(heads: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.eye(size) + 0.1 * torch.randn(heads, size, size, generator=generator)


def test_heads_of_keys_that_several_queries_read_are_repeated(tmp_path: Path) -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    given = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4)
    ep = torch.export.export(Grouped(), given, dynamic_shapes=({2: Dim("n", max=64)}, {2: Dim("n", max=64)}))
    certificate = exporter.export(ep, tmp_path).certificate
    assert certificate is not None and certificate.ok


def test_greedy_tokens_are_those_of_the_model(written: exporter.OpenVINOReport) -> None:
    model = CompiledModel(written.path, threads=1)
    prompts = [[5, 17, 3, 80], [44], list(range(10, 30))]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected = models.build("llama").generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)  # type: ignore[operator]
        assert generate_openvino(model, prompt, 12) == expected[0, len(prompt) :].tolist()
    assert (
        generate_openvino(model, prompts[0], 12, end=[generate_openvino(model, prompts[0], 3)[2]])[-1]
        == generate_openvino(model, prompts[0], 3)[2]
    )


def test_names_and_replacement(tmp_path: Path) -> None:
    target = tmp_path / "new" / "m.xml"
    for _ in range(2):
        report = exporter.export(small(), target, input_names=["a"], output_names=["b"])
    assert report.path == target and sorted(p.name for p in target.parent.iterdir()) == ["m.bin", "m.xml"]
    model = CompiledModel(target)
    assert (model.inputs, model.outputs, model.shapes) == (("a",), ("b",), ((None, 4),))
    assert report.certificate is not None and report.certificate.inputs[0].startswith("a float32[")


def test_double_precision_is_refused_where_openvino_would_round_it(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="the OpenVINO model does not compute what the program computes: NOT"):
        exporter.export(small(torch.float64), tmp_path / "m.xml")
    assert not list(tmp_path.iterdir())
    report = exporter.export(small(torch.float64), tmp_path / "m.xml", verify=False)
    assert report.certificate is None and report.uncertified == "switched off"


def test_bfloat16_is_written_uncertified(tmp_path: Path) -> None:
    report = exporter.export(small(torch.bfloat16), tmp_path / "m.xml")
    assert report.uncertified == "OpenVINO's Python interface has no torch.bfloat16"
    with pytest.raises(ExportError, match="cannot be certified: OpenVINO's Python interface has no torch.bfloat16"):
        exporter.export(small(torch.bfloat16), tmp_path / "m.xml", verify=True)


def test_the_limit_of_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified_file, "CERTIFY_BYTES", 10)
    report = exporter.export(small(), tmp_path / "m.xml")
    assert report.uncertified == "64 bytes of weights are above the limit of 10: pass verify=True"
    assert exporter.export(small(), tmp_path / "m.xml", verify=True).certificate is not None


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="takes a torch.export.ExportedProgram or a Quantized one, got Scale"):
        exporter.export(Scale(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="m.onnx does not end in .xml"):
        exporter.export(small(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="there is no input 'y' to rename"):
        exporter.export(small(), tmp_path, input_names={"y": "x"})

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.state.add_(x)  # type: ignore[operator]
            return self.state * 2  # type: ignore[operator]

    with pytest.raises(ExportError, match="writes to state in place, and an OpenVINO model keeps no state"):
        exporter.export(torch.export.export(Writes(), (torch.ones(4),)).run_decompositions({}), tmp_path)

    class Gamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="OpenVINO .* cannot convert the program: .*; replace that operator"):
        exporter.export(torch.export.export(Gamma(), (torch.ones(4),)), tmp_path)

    class Unused(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * 2 + 0 * 3

    ep = torch.export.export(Unused(), (torch.ones(4), torch.ones(4)))
    report = exporter.export(ep, tmp_path / "unused.xml")
    assert report.inputs == ("x", "y")


def test_a_damaged_file_and_wrong_inputs(tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(ExportError, match="OpenVINO .* cannot load m.xml: "):
        CompiledModel(tmp_path / "m.xml")
    exporter.export(small(), tmp_path / "m.xml")
    model = CompiledModel(tmp_path / "m.xml")
    with pytest.raises(ExportError, match="OpenVINO cannot run the model: "):
        model.run([torch.zeros(2, 5)])
    with pytest.raises(ConfigError, match="takes x and returns .* cannot generate"):
        generate_openvino(model, [1], 1)
    with pytest.raises(ConfigError, match="there are 0 tokens to start from and 1 to make"):
        generate_openvino(model, [], 1)


# -- integers ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A layer, whose result is returned, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(80, 24, bias=False), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layer(x)
        return self.head(found), found


def two(dtype: torch.dtype = torch.float32) -> ExportedProgram:
    return torch.export.export(made(Two(), dtype=dtype), (torch.zeros(2, 80, dtype=dtype),), dynamic_shapes=({0: Dim("n")},))


class Tied(nn.Module):
    """A table that is the head, too, and two layers, one of which stores its weight transposed."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 64)
        self.up = nn.Linear(64, width)
        self.down = nn.Parameter(torch.randn(width, 64))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return (x + torch.tanh(self.up(x)) @ self.down) @ self.table.weight.T


def tied(width: int = 80) -> ExportedProgram:
    ids = torch.arange(6).view(2, 3)
    return torch.export.export(made(Tied(width), dtype=torch.float32), (ids,), dynamic_shapes=({1: Dim("n")},))


def rounded(scheme: str, **shape: int) -> Quantized:
    return quantize(tied(**shape), scheme)


def types(path: Path) -> dict[str, str]:
    nodes = openvino.Core().read_model(path).get_ops()
    return {n.get_friendly_name(): n.get_element_type().get_type_name() for n in nodes if n.get_type_name() == "Constant"}


@pytest.mark.parametrize(
    ("scheme", "stored", "head"),
    [
        ("w4g64-asym-rtn-head8g64-embed8g64", "u4", "i8"),
        ("w4g32-rtn-head4-embed4", "i4", "i4"),
        ("w8g64-rtn-head8-embed8", "i8", "i8"),
        ("w8-asym-rtn-head8g32-embed8g32", "u8", "i8"),
        ("w3g16-rtn-head8g64-embed8g64", "i4", "i8"),
        ("w3g16-asym-rtn-head8g64-embed8g64", "u4", "i8"),
        ("w2g16-asym-rtn-head8g64-embed8g64", "u2", "i8"),
        ("w2g16-rtn-head8g64-embed8g64", "u2", "i8"),
    ],
)
def test_weights_are_the_integers_of_the_quantizer(scheme: str, stored: str, head: str, tmp_path: Path) -> None:
    """A group of 64 does not divide 80 inputs; one copy serves the table and the head."""
    quantized = rounded(scheme)
    report = exporter.export(quantized, tmp_path / "integers")
    assert report.integers == 3 and report.certificate is not None and report.certificate.ok
    assert json.loads(json.dumps(report.to_dict()))["integers"] == 3 and "read back" in report.seconds
    found = types(report.path)
    assert {name: found[name] for name in quantized.report.weights} == {
        "up.weight": stored, "down": stored, "table.weight": head,
    }  # fmt: skip
    assert not [n for n, kind in found.items() if n in quantized.report.weights and kind == "f32"]
    plain = exporter.export(quantized.program, tmp_path / "floats")
    assert plain.integers == 0 and "integers" in plain.to_dict()
    sizes = [made.path.with_suffix(".bin").stat().st_size for made in (report, plain)]
    assert sizes[0] < (0.45 if "8" in scheme[:3] else 0.4) * sizes[1]
    ids = torch.tensor([[5, 17, 3], [1, 2, 47]])
    exact = run(quantized.program, (ids,))[0]
    (same,), (fast,) = (CompiledModel(report.path, rounds=rounds).run([ids]) for rounds in (False, True))
    assert (same - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (fast - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("scheme", ["w4g32-asym-rtn", "w8-rtn", "w3g64-asym-rtn", "w2g16-rtn"])
def test_openvino_computes_the_values_of_the_program_bit_for_bit(scheme: str, tmp_path: Path) -> None:
    """A unit matrix through a layer gives its weight, since nothing is summed but zeros."""
    quantized = quantize(two(), scheme)
    (codes,) = (weight.codes for weight in quantized.report.weights.values())
    path = exporter.export(quantized, tmp_path).path
    found = CompiledModel(path).run([torch.eye(80)])[1]
    assert torch.equal(found.T, codes.dequantized())
    assert set(types(path).values()) & {"u4", "i8", "u2"}


@pytest.mark.parametrize("scheme", ["w4g16-asym-rtn-head8g16-embed8g16", "w4g32-rtn"])
def test_a_quantized_decoder_generates_what_its_program_does(rotated: ExportedProgram, scheme: str, tmp_path: Path) -> None:
    quantized = quantize(rotated, scheme)
    small_file, floats = exporter.export(quantized, tmp_path / "a").path, exporter.export(quantized.program, tmp_path / "b").path
    assert small_file.with_suffix(".bin").stat().st_size < 0.6 * floats.with_suffix(".bin").stat().st_size
    exact, plain = OpenVINODecoder(small_file.parent, threads=1, rounds=False), OpenVINODecoder(floats)
    for prompt in ([5, 17, 3, 80], [44]):
        assert exact.generate(prompt, 12, end=()).tokens == plain.generate(prompt, 12, end=()).tokens
        scale = plain.logits(prompt).abs().max()
        assert (exact.logits(prompt) - plain.logits(prompt)).abs().max() < 1e-5 * scale
        assert (OpenVINODecoder(small_file).logits(prompt) - plain.logits(prompt)).abs().max() < 0.05 * scale


def test_a_decoder_goes_back_and_pads(written: exporter.OpenVINOReport) -> None:
    graph: Any = OpenVINODecoder(written.path).graph
    state = graph.start(1)
    graph.step(torch.tensor([[5, 17, 3, 80]]), state)
    assert graph.rewind(state, 2) and state.mask.shape == (1, 2)
    again = graph.step(torch.tensor([[3]]), state)[0, -1]
    whole = graph.step(torch.tensor([[5, 17, 3]]), graph.start(1))[0, -1]
    assert (again - whole).abs().max() < 1e-4
    assert {tensor.shape[0] for tensor in graph.start(3).cache.values()} == {3}


def moved(values: Tensor, bits: int) -> Tensor:
    packed = integers_packed(values, bits)
    packed[0] ^= 1
    return packed


integers_packed = integers._packed


@pytest.mark.parametrize(
    ("name", "by", "why"),
    [
        ("_packed", moved, "openvino_model.xml: the integers of .* stand for other values than the program has"),
        ("_STORED", {2: 2, 3: 4, 4: 8, 8: 8}, ""),
    ],
)
def test_integers_that_went_wrong_never_appear(name: str, by: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes in more bits than they need are the same values."""
    monkeypatch.setattr(integers, name, by)
    if not why:
        assert exporter.export(rounded("w4g32-rtn"), tmp_path).integers == 2
        return
    with pytest.raises(VerificationError, match=why):
        exporter.export(rounded("w4g32-rtn"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_integers_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "put_integers", lambda *_: 0)
    with pytest.raises(VerificationError, match="openvino_model.xml has no integers of up.weight: export it again"):
        exporter.export(rounded("w4g32-rtn"), tmp_path)
    assert not list(tmp_path.iterdir())


def other(quantized: Quantized, change: Callable[[Codes], Codes]) -> Quantized:
    weight = quantized.report.weights["up.weight"]
    weights = dict(quantized.report.weights) | {"up.weight": replace(weight, codes=change(weight.codes))}
    return Quantized(quantized.program, replace(quantized.report, weights=weights))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda codes: replace(codes, index=torch.arange(64) % 2), "up.weight: its groups do not lie side by side"),
        (lambda codes: replace(codes, group_bits=(2, 4)), "up.weight: its groups have 2, 4 bits"),
    ],
)
def test_integers_without_a_form_are_refused(change: Callable[[Codes], Codes], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"OpenVINO has no form for 1 weights .{why}.; choose another group size, or"):
        exporter.export(other(rounded("w4g32-rtn"), change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_as_integers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no form for 1 weights .down: groups of 16 of its 20 inputs."):
        exporter.export(rounded("w4g16-rtn", width=20), tmp_path)
    with pytest.raises(ConfigError, match="OpenVINO has no spinpass::round_tokens: export what quantize returned for weights"):
        exporter.export(rounded("w4g32-rtn-a8"), tmp_path)
    halves = quantize(two(torch.float16), "w4g32-rtn")
    with pytest.raises(ConfigError, match="layer.weight is torch.float16, and OpenVINO multiplies by integers in float32: load"):
        exporter.export(halves, tmp_path)
    quantized = rounded("w4g32-rtn")
    with pytest.raises(ExportError, match="no constant that the integers of down stand for, nor of 1 other weights: leave"):
        exporter.export(Quantized(tied(), quantized.report), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_decoder_needs_a_cache(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no model at .*openvino_model.xml"):
        OpenVINODecoder(tmp_path)
    exporter.export(small(), tmp_path)
    with pytest.raises(ExportError, match="takes x: token ids and a cache are expected; export the graph that decodes"):
        OpenVINODecoder(tmp_path)


class Attends(nn.Module):
    def forward(self, x: Tensor, open: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=open)


def test_a_token_that_sees_nothing_is_a_number(tmp_path: Path) -> None:
    """Padding sees nothing; a NaN would reach every other token through the cache."""
    x, seen = torch.randn(1, 2, 3, 8), torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
    report = exporter.export(torch.export.export(Attends(), (x, seen)), tmp_path, inputs=(x, seen | True))
    (found,) = CompiledModel(report.path).run([x, seen])
    assert bool(found.isfinite().all())
    assert (found - Attends()(x, seen))[:, :, [0, 2]].abs().max() < 1e-6
