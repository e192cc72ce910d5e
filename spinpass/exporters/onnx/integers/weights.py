"""Integer weights for ONNX Runtime from integers that exist: what :func:`spinpass.quantization.quantize` found goes
into integer kernels as it is, without another rounding.

8-bit weights behind 8-bit activations, per token or static, become integer products (:mod:`.kernels`), all others
``MatMulNBits``, tables ``GatherBlockQuantized``. A head that is the table, too, is ``MatMulNBits`` unless its
activations are static: one copy serves both. The last two take blocks of 16 to 256 weights: one scale per output
channel, or a group of several blocks, is the same scale repeated; three bits are stored as four, whose grid holds them.
The values (q − z)·s are those of the simulated program, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import model_path
from spinpass.quantization import QuantizedWeight, matrices_of

from ..blocks import STORED_BITS, block_size, by_block, packed_bits, padded
from ..operators.hadamard import Body
from ..operators.rounding import ROWS, TOKENS, is_rounding, rounding_arguments
from ..streamed import RowsTensor
from .copies import QuantizeReport, check_replaced, load, write_quantized
from .kernels import IntegerProducts, arrays, has_integer_kernel, is_rounded_per_token
from .known import ByOrigin, ByValue, KnownCodes
from .rewrite import PackedMatrix, Work, constant_matrix

_PICKS = {"Gather", "Split"}  # channels, or the tokens of an expert


def pack_weights(
    source: str | Path,
    destination: str | Path,
    weights: Mapping[str, QuantizedWeight],
    *,
    accuracy_level: int = 0,
    external_data: bool | None = None,
) -> QuantizeReport:
    """Write a copy of an ONNX model whose constants of these names are integers.

    Args:
        source, destination: an ``.onnx`` file, or a folder with ``model.onnx``, whose other files are copied. The model
            is that of the quantized program: its constants must be what the integers stand for.
        weights: what the report of :func:`spinpass.quantization.quantize` holds, by parameter name.
        accuracy_level: how ``MatMulNBits`` computes: 0 in the model's dtype (weight-only), 4 with activations rounded
            to int8 per block as they come, in place of a rounding to int8 per token that the program has there. What
            the program rounds to fewer bits is multiplied in its dtype all the same.
        external_data: where the weights go, as :func:`spinpass.exporters.onnx.export` has it.

    Raises:
        ConfigError: the accuracy level is out of range, or the kernels' blocks do not fit the groups.
        ExportError: there is no readable model at ``source``, it has no product or lookup of what the integers of a
            weight stand for, or ``destination`` cannot be written. Nothing is left behind.
    """
    _check_level(accuracy_level)
    model = load(model_path(source))
    work = _packed(model, ByValue(model.graph, matrices_of(weights)), accuracy_level, model_path(source).name)
    return write_quantized(model, work, source, model_path(destination), external_data)


def pack_translated(
    model: ir.Model, constants: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight], *, accuracy_level: int
) -> Work:
    """Replace the constants of these names by integers in a model that was just translated, in place.

    Nothing is computed: the integers are packed while the model is written. Returns what was replaced.

    Args:
        model: of the quantized program.
        constants: of that program, by name.
        weights: by names of these; see :func:`pack_weights`.
        accuracy_level: that of :func:`pack_weights`.

    Raises:
        ConfigError: the accuracy level is out of range, or the kernels' blocks do not fit the groups.
        ExportError: the model has no product or lookup of what the integers of a weight stand for.
    """
    _check_level(accuracy_level)
    work = _packed(model, ByOrigin(model.graph, constants, weights), accuracy_level, "the model")
    check_replaced(model, work, "the program")
    return work


def pack_converted(model: ir.Model, weights: Mapping[str, QuantizedWeight], *, accuracy_level: int) -> Work:
    """Replace the constants that these integers stand for in a model that another exporter has made, in place.

    Constants are known by their values, so the model must be that of the quantized program. Weights that one product
    joins stay joined. Returns what was replaced. Raises as :func:`pack_translated` does.
    """
    _check_level(accuracy_level)
    known = ByValue(model.graph, matrices_of(weights))
    work = _packed(model, known, accuracy_level, "the model", "leave out ort_fusions, which may have changed it")
    check_replaced(model, work, "the model")
    return work


def _check_level(accuracy_level: int) -> None:
    if accuracy_level not in range(5):
        raise ConfigError(f"accuracy_level {accuracy_level} is not one of 0, 1, 2, 3, 4")


def _packed(
    model: ir.Model,
    known: KnownCodes,
    accuracy_level: int,
    where: str,
    advice: str = "export the program that quantize returned",
) -> _Packing:
    """Pack all that is known. Raises ExportError where a weight has no use in the model."""
    work = _Packing(model.graph, 0, True, accuracy_level, None, None, frozenset(), known=known)
    work.run()
    left = known.left(work.found)
    if left:
        raise ExportError(
            f"no matrix product or table lookup of {where} has the constant that the integers of "
            f"{left[0]} stand for; {advice}"
        )
    return work


@dataclass(kw_only=True)
class _Packing(Work):
    """This pass replaces the products and lookups of constants whose integers are known."""

    known: KnownCodes
    found: set[str] = field(default_factory=set)
    integers: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)
    products: IntegerProducts = field(default_factory=IntegerProducts)
    split: dict[ir.Node, ir.Node] = field(default_factory=dict)
    why_float: str = "the scheme leaves it in floats"

    @cached_property
    def looked_up(self) -> frozenset[str]:
        """The weights that are tables as well: MatMulNBits and GatherBlockQuantized read one copy of them."""
        tables = [node.inputs[0] for node in self.graph if node.op_type == "Gather"]
        names = [self.known.name(table, True) for table in tables if table is not None and table.is_initializer()]
        return frozenset(name for name in names if name is not None)

    def _matmul(self, node: ir.Node) -> None:
        x, matrix = node.inputs[0], constant_matrix(node.inputs[1])
        name = None if matrix is None else self.known.name(*matrix)
        if x is None or name is None:
            return super()._matmul(node)
        shared = name in self.looked_up and is_rounded_per_token(x)
        if has_integer_kernel(x, self.known.codes[name]) and not shared:
            return self._integer_product(node, x, name)
        if self.accuracy_level == 4:  # the kernel rounds
            node.replace_input_with(0, self._before_rounding(x))
        return super()._matmul(node)

    def picks(self, node: ir.Node) -> bool:
        """Say whether the largest values of a product are picked. Whose integers are given is rounded all the same."""
        return False

    def level_of(self, x: ir.Value) -> int:
        """Say how a product with this operand is computed: in floats where it is coarser than the kernel's codes."""
        node = x.producer()
        while node is not None and node.op_type in _PICKS and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        rounded = node is not None and (is_rounding(node, TOKENS) or is_rounding(node, ROWS))
        return 0 if node is not None and rounded and rounding_arguments(node)[0] < 8 else self.accuracy_level

    def _before_rounding(self, x: ir.Value) -> ir.Value:
        """Return what was rounded to int8 per token, also where channels or tokens of the rounded are picked; else
        ``x``."""
        node = x.producer()
        source = None if node is None else node.inputs[0]
        if node is None or source is None:
            return x
        if is_rounded_per_token(x):
            return source
        axis = node.attributes.get("axis")
        if node.op_type == "Split":
            return self._split_before_rounding(node, source).get(x, x)
        if node.op_type != "Gather" or axis is None or x.shape is None or axis.as_int() not in (-1, len(x.shape) - 1):
            return x
        exact = self._before_rounding(source)
        if exact is source:
            return x
        picked = ir.node("Gather", [exact, node.inputs[1]], {"axis": -1})
        picked.outputs[0].type, picked.outputs[0].shape = x.type, x.shape
        self.graph.insert_before(node, picked)
        return picked.outputs[0]

    def _split_before_rounding(self, node: ir.Node, source: ir.Value) -> dict[ir.Value, ir.Value]:
        """Return by part of what was rounded the same part of what it was before; nothing where it was not."""
        if node not in self.split:
            exact = self._before_rounding(source)
            if exact is source:
                return {}
            self.split[node] = made = ir.node(
                "Split", [exact, *node.inputs[1:]], dict(node.attributes), num_outputs=len(node.outputs)
            )
            for part, old in zip(made.outputs, node.outputs, strict=True):
                part.type, part.shape = old.type, old.shape
            self.graph.insert_before(node, made)
        return dict(zip(node.outputs, self.split[node].outputs, strict=True))

    def _integer_product(self, node: ir.Node, x: ir.Value, name: str) -> None:
        self.found.add(name)
        if name not in self.integers:
            made = arrays(self.known.codes[name]).items()
            q, scales, zeros = (self.constant(f"{name}.{suffix}", array) for suffix, array in made)
            self.integers[name] = (q, scales, zeros)
        body = Body()
        result = self.products.build(body, x, self.integers[name])
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], body.nodes, node.outputs, [result])
        self.matmuls += 1

    def bits_of(self, constant: ir.Value, by_column: bool, head: bool) -> int | None:
        """Say in how many bits the integers of a matrix are stored; None where none are given."""
        name = self.known.name(constant, by_column)
        return None if name is None else STORED_BITS[self.known.codes[name].bits]

    def table_bits_of(self, constant: ir.Value) -> int | None:
        """Say in how many bits the integers of a table are stored; None where none are given."""
        return self.bits_of(constant, True, False)

    def key_of(self, constant: ir.Value, by_column: bool, bits: int) -> tuple[str, bool, int]:
        """Return the weight behind a constant, whatever the constant is called and however it lies."""
        return self.known.name(constant, by_column) or str(constant.name), True, bits

    def quantized(self, constant: ir.Value, by_column: bool, bits: int) -> PackedMatrix:
        """Return the integers that are given for a constant, as constants of the graph."""
        name = self.known.name(constant, by_column)
        assert name is not None and constant.dtype is not None  # by its bits
        self.found.add(name)
        codes = self.known.codes[name]
        rows, columns = codes.q.shape
        block = block_size(codes, name)
        count = -(-columns // block)
        kind = ml_dtypes.bfloat16 if constant.dtype == ir.DataType.BFLOAT16 else constant.dtype.numpy()
        label = f"{name}.q{bits}"

        def packed(at: slice) -> np.ndarray[Any, Any]:
            q = padded(codes.rows(at), block)
            return packed_bits(q, bits).reshape(len(q), count, -1)

        def scales(at: slice) -> np.ndarray[Any, Any]:
            some = codes.rows(at)
            found: np.ndarray[Any, Any] = by_block(some, some.scales, block).float().numpy()
            return found

        def zeros(at: slice) -> np.ndarray[Any, Any]:
            some = codes.rows(at)
            return packed_bits(by_block(some, some.zeros, block), bits)

        inputs = [
            self.lazy(RowsTensor(packed, ir.DataType.UINT8, (rows, count, block * bits // 8), label)),
            self.scales(f"{label}.scales", (rows, count), kind, scales),
        ]
        if bool((codes.zeros != 2 ** (bits - 1)).any()):
            shape = (rows, -(-count * bits // 8))
            inputs.append(self.lazy(RowsTensor(zeros, ir.DataType.UINT8, shape, f"{label}.zero_points")))
        return PackedMatrix(columns, rows, bits, block, tuple(inputs))
