"""4-bit ONNX: ONNX Runtime's own packing, with the head and the table it is tied to."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from spinpass.errors import ConfigError, ExportError
from spinpass.exporters.onnx import writer as exporter
from spinpass.exporters.onnx.integers.copies import QuantizeReport
from spinpass.exporters.onnx.integers.four_bits import quantize_4bit

VOCABULARY, HIDDEN = 200, 64


class Tied(nn.Module):
    """Embedding, a linear, an online Hadamard, a linear, and a head that is the embedding (or a table of its own)."""

    def __init__(self, *, tied: bool = True, hidden: int = HIDDEN, scale: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.up, self.down = nn.Linear(hidden, 96), nn.Linear(96, hidden, bias=False)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        self.scale = scale
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        x = x + self.down(torch.ops.spinpass.hadamard(self.up(x), 48, False))
        logits = self.head(x)
        return {"logits": logits if self.scale is None else torch.tanh(logits / self.scale) * self.scale}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {
        "tied": {},
        "untied": {"tied": False},
        "capped": {"scale": 30.0},
        "odd": {"hidden": 48},
    }
    ids = torch.randint(VOCABULARY, (2, 5))
    for name, options in kinds.items():
        exporter.export(torch.export.export(Tied(**options), (ids,)), folder / name)
    return {name: folder / name for name in kinds}


def logits(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(2, 5))
    result: np.ndarray = session.run(None, {session.get_inputs()[0].name: ids})[0]
    return result


def error(report: QuantizeReport, original: Path) -> float:
    before, after = logits(original / "model.onnx"), logits(report.path)
    return float(np.abs(before - after).max() / np.abs(before).max())


def ops(report: QuantizeReport) -> dict[str, int]:
    types = [node.op_type for node in ir.load(report.path).graph]
    return {
        name: types.count(name) for name in ("MatMul", "MatMulNBits", "Gather", "GatherBlockQuantized", "Transpose")
    }


def bits(report: QuantizeReport, op: str) -> list[int]:
    return [node.attributes["bits"].as_int() for node in ir.load(report.path).graph if node.op_type == op]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tied_table_becomes_one_packed_constant(symmetric: bool, models: dict[str, Path], tmp_path: Path) -> None:
    report = quantize_4bit(models["tied"], tmp_path, symmetric=symmetric, accuracy_level=0)
    assert (report.matmuls, report.heads, report.tables, report.shared, report.kept) == (2, 1, 1, 1, ())
    assert ops(report) == {"MatMul": 0, "MatMulNBits": 3, "Gather": 0, "GatherBlockQuantized": 1, "Transpose": 0}
    assert bits(report, "MatMulNBits") == [4, 4, 8] and bits(report, "GatherBlockQuantized") == [8]
    floats = [v for v in ir.load(report.path).graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert sum(v.const_value.nbytes for v in floats if v.const_value is not None) < VOCABULARY * HIDDEN * 4 / 4
    assert report.bytes_after < report.bytes_before / 2
    assert report.bytes_before == (models["tied"] / "model.onnx").stat().st_size
    assert error(report, models["tied"]) < 0.15


def test_the_hadamards_stay(models: dict[str, Path], tmp_path: Path) -> None:
    model = ir.load(quantize_4bit(models["tied"], tmp_path).path)
    assert [node.op_type for node in model.graph if node.domain == "spinpass"] == ["Hadamard_48x2_rank3_float"]
    assert len(model.functions) == 1 and model.metadata_props["spinpass.hadamards"] == "1"


def test_eight_bits_at_both_ends_are_more_accurate_than_four(models: dict[str, Path], tmp_path: Path) -> None:
    eight = quantize_4bit(models["tied"], tmp_path / "8", accuracy_level=0)
    four = quantize_4bit(models["tied"], tmp_path / "4", accuracy_level=0, head_bits=4, table_bits=4)
    assert four.shared == 1 and four.bytes_after < eight.bytes_after
    assert error(eight, models["tied"]) < error(four, models["tied"])


def test_different_bits_share_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    report = quantize_4bit(models["tied"], tmp_path, head_bits=8, table_bits=4)
    assert (report.heads, report.tables, report.shared) == (1, 1, 0)
    assert bits(report, "GatherBlockQuantized") == [4]


def test_an_untied_head_and_table(models: dict[str, Path], tmp_path: Path) -> None:
    report = quantize_4bit(models["untied"], tmp_path)
    assert (report.matmuls, report.heads, report.tables, report.shared) == (2, 1, 1, 0)


def test_a_head_behind_a_soft_cap(models: dict[str, Path], tmp_path: Path) -> None:
    report = quantize_4bit(models["capped"], tmp_path)
    assert (report.matmuls, report.heads, report.shared) == (2, 1, 1)


def test_what_is_kept_says_why(models: dict[str, Path], tmp_path: Path) -> None:
    report = quantize_4bit(models["tied"], tmp_path, head_bits=None, table_bits=None, keep=["up.weight", "val_0"])
    assert report.heads == report.tables == 0
    assert [reason.split(": ")[1] for reason in report.kept].count("heads and tables are to stay") >= 2
    assert ops(report)["Gather"] == 1


def test_rows_that_are_no_multiple_of_a_block(models: dict[str, Path], tmp_path: Path) -> None:
    report = quantize_4bit(models["odd"], tmp_path, accuracy_level=0)
    assert report.tables == 0 and report.heads == 1
    assert (
        report.kept == ("embed.weight: its rows of 48 are no multiple of the block size 32",) or "48" in report.kept[0]
    )
    assert error(report, models["odd"]) < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    ep = torch.export.export(Tied().to(dtype), (torch.randint(VOCABULARY, (2, 5)),))
    exporter.export(ep, tmp_path / "a")
    if dtype is torch.float64:
        with pytest.raises(ExportError, match="nothing to quantize in .*its type is DOUBLE"):
            quantize_4bit(tmp_path / "a", tmp_path / "b")
        return
    report = quantize_4bit(tmp_path / "a", tmp_path / "b", accuracy_level=0)
    assert report.matmuls == 2 and error(report, tmp_path / "a") < 0.15


def test_small_products_other_gathers_and_stacks_stay(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.stack = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 64, 64))
            self.table, self.big = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            columns = torch.index_select(self.table, 1, i)
            return (
                (x @ self.big).relu() @ columns
                + (x[:, :8] @ self.small).sum()
                + (x @ self.stack).sum()
                + (x @ x.t()).sum()
            )

    ep = torch.export.export(Mixed(), (torch.randn(3, 64), torch.tensor([1, 2])))
    exporter.export(ep, tmp_path / "a")
    report = quantize_4bit(tmp_path / "a", tmp_path / "b")
    assert (report.matmuls, report.heads, report.tables) == (1, 0, 0)
    reasons = " ".join(report.kept)
    assert (
        "its shape [8, 4] is smaller than a block" in reasons
        and "its shape [3, 64, 64] is not that of a matrix" in reasons
    )


def test_the_other_files_of_the_folder_come_along(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["untied"]
    (source / "config.json").write_text("{}")
    report = quantize_4bit(source, tmp_path / "new", external_data=True)
    assert [file.name for file in report.files] == ["config.json", "model.onnx", "model.onnx.data"]
    assert all(file.is_file() for file in report.files)
    assert json.loads(json.dumps(report.to_dict()))["shared"] == 0


def test_external_data_of_the_source_is_not_referred_to(models: dict[str, Path], tmp_path: Path) -> None:
    ep = torch.export.export(Tied(), (torch.randint(VOCABULARY, (2, 5)),))
    exporter.export(ep, tmp_path / "a", external_data=True)
    for external in (None, True):
        report = quantize_4bit(tmp_path / "a", tmp_path / "b", keep=["up.weight"], external_data=external)
        assert report.bytes_before == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    report = quantize_4bit(tmp_path / "a", tmp_path / "c", head_bits=None, table_bits=None)
    (tmp_path / "a").rename(tmp_path / "gone")
    assert logits(tmp_path / "b" / "model.onnx").shape == logits(report.path).shape


def test_in_place(models: dict[str, Path], tmp_path: Path) -> None:
    exporter.export(
        torch.export.export(Tied(), (torch.randint(VOCABULARY, (2, 5)),)), tmp_path / "m.onnx", external_data=True
    )
    report = quantize_4bit(tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert report.bytes_after < report.bytes_before / 2
    assert logits(report.path).shape == (2, 5, VOCABULARY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 48}, "block_size 48 is not one of 16, 32, 64, 128, 256"),
        ({"accuracy_level": 5}, "accuracy_level 5 is not one of"),
        ({"head_bits": 3}, "head_bits 3 is not 4, 8 or None"),
        ({"table_bits": 2}, "table_bits 2 is not 4, 8 or None"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_4bit(tmp_path, tmp_path, **options)


def test_no_model_a_damaged_one_and_one_that_is_quantized(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no ONNX model at .*model.onnx"):
        quantize_4bit(tmp_path, tmp_path / "b")
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(ExportError, match="is not a readable ONNX model"):
        quantize_4bit(tmp_path, tmp_path / "b")
    quantize_4bit(models["tied"], tmp_path / "q")
    with pytest.raises(ExportError, match="nothing to quantize in .*multiplies by no constant matrix"):
        quantize_4bit(tmp_path / "q", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_full_disk(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: ir.Model, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", save)
    with pytest.raises(ExportError, match="the disk is full.*nothing was written"):
        quantize_4bit(models["tied"], tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_logging_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    quantize_4bit(models["tied"], tmp_path)
    assert (list(root.handlers), root.level) == before
