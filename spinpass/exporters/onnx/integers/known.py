"""Which constant of a model has integers that are known:  initializer  ->  name of a weight  ->  its codes.

A model that was just translated says which constants of the program it was made of
(:class:`..streamed.ConstantPart`). A model that is read from a file has names that another exporter may have given:
there a constant is known by its values.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from spinpass.graph import storage_key
from spinpass.quantization import Codes, QuantizedWeight, matrices_of

from ..streamed import ConstantPart, part_of
from .rewrite import FLOATS

_ROWS = 1024  # that are hashed at once
_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


class KnownCodes(Protocol):
    """The codes of a model's constants."""

    codes: Mapping[str, Codes]
    """Of every matrix, by name."""

    def name(self, constant: ir.Value, by_column: bool) -> str | None:
        """Return the name of the matrix (out, in) that a constant is, or its transpose is unless ``by_column``; None
        where it has no integers."""

    def left(self, found: set[str]) -> list[str]:
        """Return the matrices that are none of those found, and not equal to one of them."""


class ByValue:
    """The codes of constants that are what they stand for, value for value.

    A constant may be several matrices whose outputs lie one after the other, as exporters join the products that read
    one value:  [x W₁ᵀ, x W₂ᵀ]  ->  x [W₁; W₂]ᵀ.  Its name is those of the matrices with a plus between them.

    Args:
        graph: whose constants they are.
        codes: by name of a matrix. Several may be equal.
    """

    def __init__(self, graph: ir.Graph, codes: Mapping[str, Codes]) -> None:
        self.codes: Mapping[str, Codes] = dict(codes)
        kinds = {_DTYPES[v.dtype] for v in graph.initializers.values() if v.dtype in FLOATS and v.dtype is not None}
        self._named: dict[bytes, list[str]] = {}
        self._begun: dict[bytes, list[str]] = {}
        for name, found in codes.items():
            for digest in {_digest_of_codes(found, kind) for kind in kinds}:
                self._named.setdefault(digest, []).append(name)
            for digest in {_digest_of_codes(found.rows(slice(1)), kind) for kind in kinds}:
                self._begun.setdefault(digest, []).append(name)
        self._names: dict[tuple[str, bool], str | None] = {}
        self._parts: dict[str, list[str]] = {}

    def name(self, constant: ir.Value, by_column: bool) -> str | None:
        """See :class:`KnownCodes`."""
        held = constant.const_value
        if held is None or len(held.shape) != 2:
            return None
        key = (str(constant.name), by_column)
        if key not in self._names:  # hashing a table takes a while
            matrix = _stored(held, by_column)
            self._names[key] = next(iter(self._named.get(_digest(matrix), ())), None) or self._joined(matrix)
            del matrix
            if isinstance(held, ir.ExternalTensor):
                held.release()  # a file that stays mapped counts as memory
        return self._names[key]

    def _joined(self, matrix: Tensor) -> str | None:
        """Return the name of several matrices that lie in one, and keep their codes; None where it is another."""
        parts: list[str] = []
        rows = 0
        while rows < len(matrix):
            begun = self._begun.get(_digest(matrix[rows : rows + 1]), ())
            sizes = {len(self.codes[name].q) for name in begun}
            digests = (_digest(matrix[rows : rows + size]) for size in sizes if rows + size <= len(matrix))
            name = next((self._named[digest][0] for digest in digests if digest in self._named), None)
            if name is None:
                return None
            parts.append(name)
            rows += len(self.codes[name].q)
        joined = _one_below_the_other([self.codes[name] for name in parts])
        if joined is None:
            return None
        name = "+".join(parts)
        self.codes, self._parts[name] = {**self.codes, name: joined}, parts
        return name

    def left(self, found: set[str]) -> list[str]:
        """See :class:`KnownCodes`. An exporter makes one constant of weights that are equal."""
        found = found.union(*(self._parts.get(name, ()) for name in found))
        equal = {name for names in self._named.values() if not found.isdisjoint(names) for name in names}
        return sorted(set(self.codes) - equal - set(self._parts))


class ByOrigin:
    """The codes of constants that are parts of a program's; what was computed of those is known by its values.

    Args:
        graph: the translated program.
        constants: of the program, by name.
        weights: by names of these.
    """

    def __init__(
        self, graph: ir.Graph, constants: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]
    ) -> None:
        self.codes: Mapping[str, Codes] = matrices_of(weights)
        self._graph, self._weights = graph, weights
        self._names = {storage_key(constants[name]): name for name in weights}
        self._by_shape: dict[tuple[int, ...], ByValue] = {}

    def name(self, constant: ir.Value, by_column: bool) -> str | None:
        """See :class:`KnownCodes`."""
        held = constant.const_value
        part = part_of(held)
        found = None if part is None else self._name_of(part, by_column)
        if found is not None or held is None or len(held.shape) != 2 or (part is not None and self._is_known(part)):
            return found
        shape = tuple(held.shape.numpy())
        return self._of_shape(shape if by_column else shape[::-1]).name(constant, by_column)

    def _is_known(self, part: ConstantPart) -> bool:
        return storage_key(part.constant) in self._names

    def _name_of(self, part: ConstantPart, by_column: bool) -> str | None:
        name = self._names.get(storage_key(part.constant))
        axes = part.axes
        if name is None or len(axes) != 2 or axes[1 if by_column else 0] != self._weights[name].dim % len(part.order):
            return None
        label = name if part.index is None else f"{name}.{part.index}"
        return label if label in self.codes else None

    def _of_shape(self, shape: tuple[int, ...]) -> ByValue:
        """Return the matrices of a shape by their values."""
        if shape not in self._by_shape:
            alike = {name: codes for name, codes in self.codes.items() if tuple(codes.q.shape) == shape}
            self._by_shape[shape] = ByValue(self._graph, alike)
        return self._by_shape[shape]

    def left(self, found: set[str]) -> list[str]:
        """See :class:`KnownCodes`. An exporter makes one constant of small weights that are equal."""
        left = set(self.codes) - found
        shapes = {tuple(self.codes[name].q.shape) for name in left}
        return sorted(left.intersection(name for shape in shapes for name in self._of_shape(shape).left(found)))


def _one_below_the_other(parts: list[Codes]) -> Codes | None:
    """Return the codes of matrices with the same inputs as those of one; None where their groups are not alike."""
    first = parts[0]
    index = first.group_of
    alike = all(p.bits == first.bits and p.group_bits is None and torch.equal(p.group_of, index) for p in parts)
    if not alike:
        return None
    q, scales, zeros = (torch.cat([getattr(part, name) for part in parts]) for name in ("q", "scales", "zeros"))
    return replace(first, q=q, scales=scales, zeros=zeros, symmetric=all(part.symmetric for part in parts))


def _stored(held: ir.TensorProtocol, by_column: bool) -> Tensor:
    """Return a stored matrix as (out, in), float32, which may lie in a mapped file."""
    array = held.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of memory that may not be written: nothing is
        stored = torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.float32))
    return stored if by_column else stored.T


def _digest(matrix: Tensor) -> bytes:
    """Hash the values of a matrix (out, in), in float32."""
    return _digest_of_rows(matrix.shape, torch.split(matrix, _ROWS))


def _digest_of_codes(codes: Codes, dtype: torch.dtype) -> bytes:
    """Hash what codes stand for in a dtype, as :func:`_digest` does."""
    starts = range(0, len(codes.q), _ROWS)
    return _digest_of_rows(codes.q.shape, (codes.rows(slice(k, k + _ROWS)).dequantized().to(dtype) for k in starts))


def _digest_of_rows(shape: Any, parts: Iterable[Tensor]) -> bytes:
    found = hashlib.sha256(str(tuple(shape)).encode())
    for part in parts:
        found.update(part.float().contiguous().numpy().tobytes())
    return found.digest()
