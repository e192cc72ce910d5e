"""What the integers in a written file stand for, read again from the file:  (q − z)·s  of every packed matrix.

Nothing is shared with what packs: layouts are those that ONNX and ONNX Runtime document for their operators. So codes,
scales, zero points or attributes that went wrong on the way to the disk give other values here than the program has.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from spinpass.errors import VerificationError
from spinpass.formats import model_path
from spinpass.quantization import Codes, QuantizedWeight, matrices_of

from .copies import load

_SUFFIX = re.compile(r"(\.T)?\.q\d_*$")
_Array = np.ndarray[Any, Any]
_ROWS = 1024  # that are read at once


@dataclass(frozen=True)
class StoredRows:
    """These are some rows of a matrix (out, in) in a file: the ``codes`` of their elements, and ``zeros`` and
    ``scales``, what is taken from each and what it is multiplied by; ``bits`` is the width of a code."""

    codes: _Array
    zeros: _Array
    scales: _Array
    bits: int

    @property
    def values(self) -> Tensor:
        """Return what the integers stand for, float32 (rows, in)."""
        exact = (self.codes.astype(np.float32) - self.zeros.astype(np.float32)) * self.scales.astype(np.float32)
        return torch.from_numpy(exact)

    @property
    def slack(self) -> Tensor:
        """Return how far a value may be from what was rounded to it: half a step, and a step at the ends of the grid,
        where a value outside is clipped; float32 (rows, in)."""
        ends = (self.codes == 0) | (self.codes == 2**self.bits - 1)
        steps = np.abs(self.scales.astype(np.float32))
        return torch.from_numpy(np.where(ends, steps, steps / 2))


@dataclass(frozen=True)
class StoredMatrix:
    """This is a matrix (out, in) in a file: ``name`` is that of its constant without what says that it is packed.

    ``block`` codes side by side share a scale. ``read`` returns rows of it, ``length`` is how many there are.
    """

    name: str
    length: int
    block: int
    read: Callable[[slice], StoredRows]

    def parts(self) -> Iterator[tuple[slice, StoredRows]]:
        """Yield all rows, some at a time: what they stand for takes many times the memory of the integers."""
        for start in range(0, self.length, _ROWS):
            rows = slice(start, min(start + _ROWS, self.length))
            yield rows, self.read(rows)


def stored_matrices(path: str | Path) -> Iterator[StoredMatrix]:
    """Yield what every operator of the file that reads a packed matrix makes of it.

    Raises:
        ExportError: there is no readable ONNX model.
        VerificationError: the parts of a matrix do not fit together.
    """
    file = model_path(path)
    for node in load(file).graph:
        found = _READERS.get(node.op_type)
        codes = None if found is None else _source(node.inputs[found[0]])
        if found is None or codes is None:
            continue
        try:
            stored = found[1](node, codes)
            _ = stored.read(slice(0, 1)).values  # the shapes of its parts are looked at here
            yield stored
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise VerificationError(f"{file.name}: the parts of {codes.name} do not fit together: {error}") from error


def check_packed(path: str | Path, weights: Mapping[str, QuantizedWeight]) -> int:
    """Compare the integers of a file with those of the quantized program, and return how many matrices it has.

    Args:
        path: the file, or a folder with ``model.onnx``.
        weights: what the report of :func:`spinpass.quantization.quantize` holds, by parameter name.

    Raises:
        VerificationError: a weight is not in the file, or stands for other values there, be it in one bit.
        ExportError: there is no readable ONNX model.
    """
    expected = matrices_of(weights)
    seen: set[str] = set()
    for stored in stored_matrices(path):
        if stored.name not in expected:
            raise VerificationError(f"the file holds integers of {stored.name}, which the program does not have")
        if not _is_of(stored, expected[stored.name]):
            raise VerificationError(
                f"the integers that the file holds for {stored.name} stand for other values than those of the program"
            )
        seen.add(stored.name)
    left = set(expected) - seen
    if left:  # equal weights are one
        shapes = {expected[name].q.shape for name in left}
        known = {_digest(expected[name]) for name in seen if expected[name].q.shape in shapes}
        left = {name for name in left if _digest(expected[name]) not in known}
    if left:
        raise VerificationError(f"the file has no integers of {min(left)}, which the program rounds")
    return len(expected)


def _is_of(stored: StoredMatrix, codes: Codes) -> bool:
    """Say whether a matrix stands for the values of codes, and for zeros beyond its columns."""
    columns = codes.q.shape[1]
    for rows, part in stored.parts():
        wanted, found = codes.rows(rows).dequantized().float(), part.values
        if not torch.equal(found[:, :columns], wanted) or bool(found[:, columns:].any()):
            return False
    return stored.length == len(codes.q)


def _digest(codes: Codes) -> tuple[tuple[int, ...], str]:
    """Return what tells the values of a matrix from those of others."""
    found = hashlib.sha256()
    for start in range(0, len(codes.q), _ROWS):
        values = codes.rows(slice(start, start + _ROWS)).dequantized().float().contiguous()
        found.update(values.numpy().tobytes())
    return tuple(codes.q.shape), found.hexdigest()


@dataclass(frozen=True)
class StoredConstants:
    """This is what a file has in the place of a program's constants: ``values`` by name, in shape and dtype of the
    program's; whether these are ``whole``, all matrices of the file; and which ``mixed`` ones it also reads in floats,
    in another place."""

    values: dict[str, Tensor]
    whole: bool
    mixed: tuple[str, ...]


def dequantized_constants(path: str | Path, constants: Mapping[str, Tensor]) -> StoredConstants:
    """Return what a file has in the place of the constants of a program that were rounded to nearest.

    Args:
        path: the file, or a folder with ``model.onnx``.
        constants: those of the program that the file was written from, by name.

    Raises:
        VerificationError: a value is further from the program's than half a step of its grid.
        ExportError: there is no readable ONNX model.
    """
    found: dict[str, Tensor] = {}
    whole = True
    for stored in stored_matrices(path):
        name = next((name for name in _parameters(stored.name) if name in constants), None)
        original = None if name is None else constants[name]
        if name is None or original is None or original.ndim != 2 or original.shape[0] != stored.length:
            whole = False
            continue
        found[name] = _rounded_from(stored, original.detach(), name)
    floats = {name for value in load(model_path(path)).graph.initializers for name in _parameters(value)}
    return StoredConstants(found, whole, tuple(sorted(floats & set(found))))


def _rounded_from(stored: StoredMatrix, original: Tensor, name: str) -> Tensor:
    """Return the values of a matrix, in the dtype of what was rounded to it. Raises VerificationError where they are
    not those nearest to it."""
    parts, columns, worst, largest = [], original.shape[1], 0.0, 0.0
    for rows, part in stored.parts():
        exact = original[rows].float()
        values, slack = part.values[:, :columns], part.slack[:, :columns]
        if not _is_fine(part, stored.block, exact):
            raise VerificationError(f"the grid that the file has for {name} is coarser than the program's values need")
        # scales are kept in the file's dtype: half a step of the exact scale is a little more than half of that
        worst = max(worst, float(((exact - values).abs() - slack * 1.01).max().nan_to_num(nan=math.inf)))
        largest = max(largest, float(exact.abs().max()))
        parts.append(values.to(original.dtype))
    if not worst <= 1e-7 * largest:
        raise VerificationError(
            f"the integers that the file holds for {name} are not those nearest to the program's values"
        )
    return torch.cat(parts)


def _is_fine(part: StoredRows, block: int, original: Tensor) -> bool:
    """Say whether no step is longer than a grid over the largest value of its block, on both sides of zero, has."""
    short = -original.shape[1] % block
    blocks = torch.nn.functional.pad(original.abs(), (0, short)).reshape(len(original), -1, block).amax(-1)
    longest = blocks.repeat_interleave(block, 1)[:, : original.shape[1]] * 2 / (2**part.bits - 1)
    steps = torch.from_numpy(np.abs(part.scales.astype(np.float32)))[:, : original.shape[1]]
    return bool(((steps <= longest * 1.02) | (longest == 0)).all())


def _parameters(constant: str) -> Iterator[str]:
    """Yield the names that the parameter behind a constant may have: a folded Transpose has ``MatMul.`` in its name."""
    yield constant
    yield constant.replace(".MatMul.", ".").removeprefix("MatMul.")


# -- layouts of operators ----------------------------------------------------------------------------------------------


def _blocks(node: ir.Node, codes: ir.Value) -> StoredMatrix:
    """``MatMulNBits``: rows of blocks, each block's codes packed into bytes, the first in the lowest bits."""
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    if any(value is not None for value in node.inputs[4:]):
        raise ValueError("its product takes an order of columns or a bias, which no packing writes")
    return _blockwise(codes, _at(node, 2), _at(node, 3), bits, block, rows, columns)


def _rows(node: ir.Node, codes: ir.Value) -> StoredMatrix:
    """``GatherBlockQuantized``: rows of a table, packed alike."""
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    scales = _array(_at(node, 2))
    return _blockwise(codes, _at(node, 2), _at(node, 3), bits, block, len(scales), scales.shape[-1] * block)


def _blockwise(
    codes: ir.Value, scales: ir.Value | None, zeros: ir.Value | None, bits: int, block: int, rows: int, columns: int
) -> StoredMatrix:
    count = -(-columns // block)
    packed, steps = _array(codes).reshape(rows, -1), _array(scales).reshape(rows, count)
    middles = None if zeros is None else _array(zeros).reshape(rows, -1)

    def read(at: slice) -> StoredRows:
        q = _unpacked(packed[at], bits)[:, :columns]
        s = np.repeat(steps[at], block, 1)[:, :columns]
        if middles is None:
            return StoredRows(q, np.full_like(q, 2 ** (bits - 1)), s, bits)
        return StoredRows(q, np.repeat(_unpacked(middles[at], bits)[:, :count], block, 1)[:, :columns], s, bits)

    return StoredMatrix(_name(codes), rows, block, read)


def _unpacked(array: _Array, bits: int) -> _Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: _Array = ((array[..., None] >> shifts) & (2**bits - 1)).reshape(len(array), -1)
    return codes


def _integer_product(node: ir.Node, codes: ir.Value) -> StoredMatrix:
    """``MatMulInteger``: codes (in, out), zero points as an input, the scales in a product behind it."""
    after = node.outputs[0].consumers()[0]  # the cast of the sum
    by_column = after.outputs[0].consumers()[0]
    scales = next(value for value in by_column.inputs if value is not None and value.is_initializer())
    return _by_column(codes, scales, _at(node, 3))


def _dequantized(node: ir.Node, codes: ir.Value) -> StoredMatrix:
    """``DequantizeLinear`` of a constant (in, out), with scales and zero points by column."""
    return _by_column(codes, _at(node, 1), _at(node, 2))


def _by_column(codes: ir.Value, scales: ir.Value | None, zeros: ir.Value | None) -> StoredMatrix:
    q = np.ascontiguousarray(_array(codes).T)
    s, z = (np.broadcast_to(_array(value).reshape(-1, 1), q.shape) for value in (scales, zeros))
    return StoredMatrix(_name(codes), len(q), q.shape[1], lambda at: StoredRows(q[at], z[at], s[at], 8))


_READERS = {
    "MatMulNBits": (1, _blocks),
    "GatherBlockQuantized": (0, _rows),
    "MatMulInteger": (1, _integer_product),
    "DequantizeLinear": (0, _dequantized),
}


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return the constant matrix of integers behind an input, whatever shape it is given in; None where none is."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    whole = value is not None and value.const_value is not None and len(value.const_value.shape) >= 2
    return value if whole else None


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _array(value: ir.Value | None) -> _Array:
    """Return a constant, or a constant of half floats in the type that it is cast to."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        wide: _Array = _array(node.inputs[0]).astype(ir.DataType(node.attributes["to"].as_int()).numpy())
        return wide
    if value is None or value.const_value is None:
        raise ValueError("a part is no constant")
    found: _Array = value.const_value.numpy()
    return found


def _name(codes: ir.Value) -> str:
    return _SUFFIX.sub("", str(codes.name))
