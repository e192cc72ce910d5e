"""Integers read again from a file are those of the program; a bit that is wrong anywhere is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.export import ExportedProgram

from spinpass.errors import VerificationError
from spinpass.exporters.onnx import writer as exporter
from spinpass.exporters.onnx.integers.four_bits import quantize_4bit
from spinpass.exporters.onnx.integers.read_back import check_packed, dequantized_constants, stored_matrices
from spinpass.exporters.onnx.integers.weights import pack_weights
from spinpass.quantization import Quantized, quantize
from tests.support.quantizable import ROWS, Layers

SCHEMES = {
    "blocks": "w4g32-rtn-head8",
    "zero points": "w4g16-rtn-asym-head8-embed8",
    "two bits": "w2g32-rtn",
    "three bits": "w3g32-rtn-asym",
    "one scale per row": "w4-rtn-asym-head4",
    "integer products": "w8-rtn-asym-a8-head8",
    "integer products of static codes": "w8-rtn-a8static-head8",
    "rows of several widths": "w3.5g32-rtn-rows",
}


IDS = torch.randint(ROWS, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source() -> ExportedProgram:
    return torch.export.export(Layers().eval(), (IDS,))


@pytest.fixture(scope="module", params=SCHEMES)
def packed(
    request: pytest.FixtureRequest, source: ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quantized, Path]:
    folder = tmp_path_factory.mktemp("packed")
    made = quantize(source, SCHEMES[request.param], [(IDS,)])
    exporter.export(made.program, folder / "float")
    return made, pack_weights(folder / "float", folder / "packed", made.report.weights).path


def edited(path: Path, out: Path, suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> int:
    """Change every constant whose name ends so; returns how many."""
    model = onnx.load(path)
    found = [t for t in model.graph.initializer if t.name.rstrip("_").endswith(suffix)]
    for tensor in found:
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, out)
    return len(found)


def one_bit(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[3] ^= 1
    return array


def one_step(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] = np.nextafter(array.reshape(-1)[0], array.dtype.type(2))
    return array


def test_every_layout_is_read_back(packed: tuple[Quantized, Path]) -> None:
    made, path = packed
    assert check_packed(path, made.report.weights) == len(made.report.weights)
    assert {stored.name for stored in stored_matrices(path)} == set(made.report.weights)


def test_a_wrong_bit_is_seen(packed: tuple[Quantized, Path], tmp_path: Path) -> None:
    made, path = packed
    seen = 0
    for suffix, change in (
        (".q2", one_bit), (".q4", one_bit), (".q8", one_bit), (".scales", one_step), (".zero_points", one_bit)
    ):  # fmt: skip
        if edited(path, tmp_path / "model.onnx", suffix, change):
            seen += 1
            with pytest.raises(VerificationError, match="stand for other values"):
                check_packed(tmp_path / "model.onnx", made.report.weights)
    assert seen >= 2


def test_two_weights_that_changed_places_are_seen(source: ExportedProgram, tmp_path: Path) -> None:
    made = quantize(source, "w4g32-rtn", [])
    weights = dict(made.report.weights)
    up, down = sorted(weights)[:2]
    exporter.export(made.program, tmp_path / "float")
    path = pack_weights(tmp_path / "float", tmp_path / "packed", weights).path
    weights[up], weights[down] = weights[down], weights[up]
    with pytest.raises(VerificationError, match="stand for other values"):
        check_packed(path, weights)


def test_a_weight_that_stayed_a_float_is_seen(source: ExportedProgram, tmp_path: Path) -> None:
    made = quantize(source, "w4g32-rtn-head8", [])
    exporter.export(made.program, tmp_path / "float")
    few = {name: weight for name, weight in made.report.weights.items() if "head" not in name}
    path = pack_weights(tmp_path / "float", tmp_path / "packed", few).path
    with pytest.raises(VerificationError, match=r"no integers of head\.weight"):
        check_packed(path, made.report.weights)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_rounded_to_nearest_is_within_half_a_step(
    source: ExportedProgram, tmp_path: Path, symmetric: bool, bits: int
) -> None:
    exporter.export(source, tmp_path / "float")
    path = quantize_4bit(tmp_path / "float", tmp_path / "packed", symmetric=symmetric, head_bits=bits, table_bits=bits).path
    stored = dequantized_constants(path, source.state_dict)
    assert stored.whole and not stored.mixed
    found = stored.values
    assert found is not None and set(found) == {"embed.weight", "up.weight", "down.weight", "head.weight"}
    assert all(found[name].shape == source.state_dict[name].shape for name in found)
    for suffix, change in ((f".q{bits}", lambda array: array ^ 4), (".scales", lambda array: array * np.float32(1.3))):
        assert edited(path, tmp_path / "model.onnx", suffix, change)
        with pytest.raises(VerificationError, match="are not those nearest|is coarser than"):
            dequantized_constants(tmp_path / "model.onnx", source.state_dict)


def test_a_matrix_of_no_parameter_is_said(source: ExportedProgram, tmp_path: Path) -> None:
    exporter.export(source, tmp_path / "float")
    path = quantize_4bit(tmp_path / "float", tmp_path / "packed").path
    assert not dequantized_constants(path, {"up.weight": source.state_dict["up.weight"]}).whole


def test_a_grid_on_which_every_value_is_near_zero_is_seen(source: ExportedProgram, tmp_path: Path) -> None:
    """With steps that are long enough, half a step hides any value."""
    exporter.export(source, tmp_path / "float")
    path = quantize_4bit(tmp_path / "float", tmp_path / "packed", head_bits=4, table_bits=4).path
    assert edited(path, tmp_path / "zero.onnx", ".q4", lambda array: np.full_like(array, 0x88))
    assert edited(tmp_path / "zero.onnx", tmp_path / "model.onnx", ".scales", lambda array: array * np.float32(50))
    with pytest.raises(VerificationError, match="is coarser than"):
        dequantized_constants(tmp_path / "model.onnx", source.state_dict)


@pytest.mark.parametrize("packed", ["blocks"], indirect=True)
@pytest.mark.parametrize("kind", ["other scales", "an order of columns"])
def test_a_second_product_of_the_same_integers_is_read_too(
    packed: tuple[Quantized, Path], tmp_path: Path, kind: str
) -> None:
    made, path = packed
    model = onnx.load(path)
    first = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    second = onnx.NodeProto()
    second.CopyFrom(first)
    second.name, second.output[0] = "second", "second"
    if kind == "other scales":
        scales = next(t for t in model.graph.initializer if t.name == first.input[2].removesuffix(".float"))  # of the cast
        second.input[2] = "doubled"
        model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(scales) * 2, "doubled"))
    else:
        order = np.arange(first.attribute[0].i, dtype=np.int32)
        second.input.extend([""] * (4 - len(second.input)) + ["order"])
        model.graph.initializer.append(numpy_helper.from_array(order, "order"))
    model.graph.node.append(second)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="stand for other values|an order of columns"):
        check_packed(tmp_path / "model.onnx", made.report.weights)
