"""Integers in ONNX Runtime: the values that its kernels multiply by are those of the simulated program, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.errors import ConfigError, ExportError
from spinpass.execution.interpreter import run
from spinpass.exporters.onnx import writer as exporter
from spinpass.exporters.onnx.integers.read_back import check_packed
from spinpass.exporters.onnx.integers.weights import pack_weights
from spinpass.graph import with_other_values
from spinpass.quantization import QuantizationConfig, Quantized, Weights, quantize
from tests.support.decoders import Decoder, exported
from tests.support.decoders import made as made_decoder
from tests.support.quantizable import ROWS, Layers


@pytest.fixture(scope="module")
def source() -> ExportedProgram:
    return torch.export.export(Layers().eval(), (IDS,), dynamic_shapes={"ids": {1: torch.export.Dim.AUTO}})


IDS = torch.randint(ROWS, (2, 32), generator=torch.Generator().manual_seed(1))


def folder(tmp_path: Path, quantized: Quantized) -> Path:
    exporter.export(quantized.program, tmp_path / "float")
    return tmp_path / "float"


def outputs(path: Path) -> Any:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: IDS.numpy()})[0]


def test_scales_take_two_bytes_where_nothing_is_lost(tmp_path: Path, source: ExportedProgram) -> None:
    """The values of the file are those of the program either way; one weight here is too small for float16."""
    small = next(name for name, t in source.state_dict.items() if t.ndim == 2 and len(t) != ROWS)
    values = {small: source.state_dict[small] * 1e-5}
    made = quantize(with_other_values(source, values), "w4g32-rtn-head8-embed8")
    halves = {name for name, w in made.report.weights.items() if w.codes.stored_scales.dtype == torch.float16}
    assert halves == set(made.report.weights) - {small} != set()
    path = pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights).path
    assert check_packed(path, made.report.weights) == len(made.report.weights)
    stored = {t.name.split(".q")[0]: t.data_type for t in onnx.load(path).graph.initializer if t.name.endswith(".scales")}
    wide = onnx.TensorProto.FLOAT
    assert {name for name, kind in stored.items() if kind == wide} == {small}
    expected = run(made.program, (IDS,))[0].numpy()
    assert np.abs(outputs(path) - expected).max() < 2e-5 * np.abs(expected).max()
    nearest = numpy_helper.to_array(next(t for t in onnx.load(path).graph.initializer if t.name.endswith(".scales") and t.data_type != wide))
    assert nearest.dtype == np.float16 and not np.array_equal(nearest, np.round(nearest, 2)), "not by luck"


@pytest.mark.parametrize(
    "scheme",
    ["w4g64-rtn-head8", "w4g32-rtn-head8", "w4-rtn-head4", "w4g16-rtn-asym-head8-embed8", "w8-rtn-asym-head8", "w2g32-rtn", "w3-rtn", "w3g32-rtn-asym",
     "w4g32-gptq", "w3.5g32-rtn-rows", "w2.6g16-gptq-asym-rows"],
)
def test_the_kernels_compute_what_the_simulation_does(tmp_path: Path, source: ExportedProgram, scheme: str) -> None:
    made = quantize(source, scheme, [(IDS,)])
    report = pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights)
    assert report.matmuls + report.heads + report.tables == len(made.report.weights)
    expected = run(made.program, (IDS,))[0].numpy()
    assert np.abs(outputs(report.path) - expected).max() < 2e-5 * np.abs(expected).max()
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (4, None, True), (8, 16, False), (2, 32, False), (4, None, False)]
)
def test_dequantized_values_are_equal_bit_for_bit(
    tmp_path: Path, bits: int, group: int | None, symmetric: bool
) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear = nn.Linear(160, 160, bias=False), nn.Linear(160, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.first(x))  # type: ignore[no-any-return]

    torch.manual_seed(2)
    module = Single().eval()
    with torch.no_grad():
        module.first.weight.copy_(torch.eye(160))
    program = torch.export.export(module, (torch.eye(160)[None],))
    how = Weights(bits, group, symmetric, "rtn")
    made = quantize(program, QuantizationConfig(weights=None, head=how))
    report = pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights)
    session = ort.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: np.eye(160, dtype=np.float32)[None]})[0]
    assert np.array_equal(found[0], made.program.state_dict["linear.weight"].detach().T.numpy())


def test_a_model_with_other_constants_is_refused(tmp_path: Path, source: ExportedProgram) -> None:
    made = quantize(source, "w4g32-rtn")
    exporter.export(source, tmp_path / "original")
    with pytest.raises(ExportError, match=r"integers of down\.weight stand for"):
        pack_weights(tmp_path / "original", tmp_path / "packed", made.report.weights)
    assert not (tmp_path / "packed").exists()
    where = folder(tmp_path, made)
    with pytest.raises(ConfigError, match="accuracy_level 5"):
        pack_weights(where, tmp_path / "packed", made.report.weights, accuracy_level=5)


def test_a_wrong_integer_is_caught(tmp_path: Path, source: ExportedProgram) -> None:
    made = quantize(source, "w4g32-rtn")
    weight = made.report.weights["up.weight"]
    weight.codes.q[0, 0] ^= 1
    with pytest.raises(ExportError, match=r"integers of up\.weight"):
        pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights)


# -- integer products --------------------------------------------------------------------------------------------------


def kernels(path: Path, tmp_path: Path) -> Counter[str]:
    """What ONNX Runtime runs, by operator."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)


@pytest.fixture(scope="module")
def massive() -> ExportedProgram:
    """One token is far above all others."""
    model = Layers().eval()
    with torch.no_grad():
        model.embed.weight[IDS[0, 0]] *= 300
    return torch.export.export(model, (IDS,), dynamic_shapes={"ids": {1: torch.export.Dim.AUTO}})


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("w8-rtn-a8", "MatMulInteger"),
        ("w8-rtn-asym-a8", "MatMulInteger"),
        ("w8-rtn-a8static", "MatMulIntegerToFloat"),
        ("w8-gptq-asym-a8static", "MatMulIntegerToFloat"),
    ],
)
@pytest.mark.parametrize("which", ["source", "massive"])
def test_integer_products_compute_what_the_simulation_does(
    tmp_path: Path, scheme: str, kernel: str, which: str, request: pytest.FixtureRequest
) -> None:
    program: ExportedProgram = request.getfixturevalue(which)
    made = quantize(program, scheme, [(IDS,)])
    scaled = [n for n in made.program.graph.nodes if str(n.target) == "spinpass.round_rows.default"]
    assert bool(scaled) == (which == "massive" and "static" in scheme)
    report = pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights)
    run_by = kernels(report.path, tmp_path)
    assert run_by[kernel] == 2 == report.matmuls and run_by["MatMul"] == 1, "the head alone is left"
    expected = run(made.program, (IDS,))[0].numpy()
    assert np.abs(outputs(report.path) - expected).max() < 2e-6 * np.abs(expected).max()


def test_ranges_of_channels_keep_their_products_in_float(tmp_path: Path, source: ExportedProgram) -> None:
    made = quantize(source, "w8-rtn-a8channel", [(IDS,)])
    report = pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights)
    run_by = kernels(report.path, tmp_path)
    assert not run_by["MatMulIntegerToFloat"] and not run_by["MatMulInteger"]
    expected = run(made.program, (IDS,))[0].numpy()
    assert np.abs(outputs(report.path) - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["w4g32-rtn-a8", "w3.5g32-rtn-rows-a8"])
def test_matmulnbits_rounds_in_place_of_the_program(tmp_path: Path, source: ExportedProgram, scheme: str) -> None:
    made = quantize(source, scheme, [(IDS,)])
    simulated = folder(tmp_path, made)
    weight_only = pack_weights(simulated, tmp_path / "level0", made.report.weights)
    rounding = pack_weights(simulated, tmp_path / "level4", made.report.weights, accuracy_level=4)
    expected = run(made.program, (IDS,))[0].numpy()
    top = np.abs(expected).max()
    assert np.abs(outputs(weight_only.path) - expected).max() < 2e-5 * top, "the rounding stays in the graph"
    assert np.abs(outputs(rounding.path) - expected).max() < 2e-2 * top, "blocks are rounded instead of tokens"
    assert not any("RoundTokens" in n.op_type for n in onnx.load(rounding.path).graph.node)


@pytest.mark.parametrize("scheme", ["a4-kv4", "w4-rtn-a4static", "a8", "a8channel", "a4channel"])
def test_roundings_without_kernels_are_simulated(tmp_path: Path, scheme: str) -> None:
    program = exported(made_decoder(Decoder(layers=1), dtype=torch.float32))
    ids = program.example_inputs[0]
    quantized = quantize(program, scheme, [ids])
    exporter.export(quantized.program, tmp_path / "simulated")  # certified against the program
    session = ort.InferenceSession(tmp_path / "simulated" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: ids[0].numpy()})[0]
    expected, unrounded = (run(p, ids)[0].numpy() for p in (quantized.program, program))
    assert np.abs(found - expected).max() < 1e-3 * np.abs(unrounded - expected).max()


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens of 8 bits": lambda x: torch.ops.spinpass.round_tokens(x, 8, True),
    "tokens of 4 bits": lambda x: torch.ops.spinpass.round_tokens(x, 4, False),
    "tokens, clipped": lambda x: torch.ops.spinpass.round_tokens(x, 4, False, 0.8),
    "tensor of 8 bits": lambda x: torch.ops.spinpass.round_tensor(x, torch.tensor(0.03), torch.tensor(117.0), 8),
    "tensor of 4 bits": lambda x: torch.ops.spinpass.round_tensor(x, torch.tensor(0.4), torch.tensor(7.0), 4),
    "channels of 8 bits": lambda x: torch.ops.spinpass.round_tensor(x, torch.linspace(0.01, 0.05, x.shape[-1]), torch.linspace(100, 140, x.shape[-1]).round(), 8),
    "channels of 4 bits": lambda x: torch.ops.spinpass.round_tensor(x, torch.linspace(0.1, 0.5, x.shape[-1]), torch.full(x.shape[-1:], 7.0), 4),
    "rows": lambda x: torch.ops.spinpass.round_rows(x, torch.tensor(0.02), torch.tensor(128.0), 2.0, 8),
}


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_rounding_is_the_same_in_every_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ROUNDINGS[name](x)

    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1], x[1, 2] = 0, x[1, 2] * 9
    program = torch.export.export(Rounding(), (x,))
    exporter.export(program, tmp_path / "op")
    session = ort.InferenceSession(tmp_path / "op" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    expected = ROUNDINGS[name](x).numpy()
    assert found.dtype == expected.dtype and not np.array_equal(expected, x.numpy())
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(expected.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("scheme", ["w4g16-rtn-a8-head8-embed8", "w8-rtn-a8-head8-embed8", "w4g16-rtn-asym-head8-embed8"])
def test_head_and_table_of_a_tied_model_are_one_constant(tmp_path: Path, scheme: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Parameter(torch.randn(ROWS, 64)), nn.Linear(64, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.linear(nn.functional.embedding(ids, self.table)), self.table)

    torch.manual_seed(3)
    made = quantize(torch.export.export(Tied().eval(), (IDS,)), scheme, [])
    report = pack_weights(folder(tmp_path, made), tmp_path / "packed", made.report.weights, accuracy_level=4)
    assert (report.matmuls, report.heads, report.tables, report.shared) == (1, 1, 1, 1)
    names = [initializer.name for initializer in onnx.load(report.path).graph.initializer]
    assert [name for name in names if name.startswith("table")] == ["table.q8", "table.q8.scales"]
    expected = run(made.program, (IDS,))[0].numpy()
    assert np.abs(outputs(report.path) - expected).max() < 0.03 * np.abs(expected).max()
