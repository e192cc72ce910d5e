"""Initializers that are computed while the file is written have the bytes of what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from spinpass.exporters.onnx.streamed import ConstantPart, pieces_of
from spinpass.graph import Handle, Held, handles, sources


class Counted(Held):
    reads: ClassVar[list[int]] = []

    def read(self, rows: slice | Tensor) -> Tensor:
        found = super().read(rows)
        Counted.reads.append(found.numel())
        return found


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "LARGE", 256)
    monkeypatch.setattr(sources, "LARGE", 256)
    monkeypatch.setattr(sources, "_BLOCK", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["as stored", "transposed"])
def test_a_large_matrix_is_written_by_blocks(tmp_path: Path, dtype: torch.dtype, order: tuple[int, int]) -> None:
    Counted.reads = []
    value = torch.randn(61, 7).to(dtype)
    kind = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
    made = ConstantPart(Handle(Counted(value, dtype)), order).tensor("x", kind[dtype])
    with (tmp_path / "file").open("wb") as file:
        file.write(b"before")
        for piece in pieces_of(made):
            piece.write(file)
        file.write(b"behind")
    expected = value.permute(order).contiguous().view(torch.uint8).numpy().tobytes()
    assert (tmp_path / "file").read_bytes() == b"before" + expected + b"behind"
    assert sum(piece.size for piece in pieces_of(made)) == len(expected)
    if order == (1, 0):
        assert max(Counted.reads) < value.numel() and sum(Counted.reads) == value.numel()
