"""Integer weights for ONNX Runtime from integers that exist: what :func:`spinpass.quantization.quantize` found goes
into integer kernels as it is, without another rounding.

8-bit weights behind 8-bit activations, per token or static, become integer products (:mod:`.kernels`), all others
``MatMulNBits``, tables ``GatherBlockQuantized``. A head that is the table, too, is ``MatMulNBits`` unless its
activations are static: one copy serves both. The last two take blocks of 16 to 256 weights: one scale per output
channel, or a group of several blocks, is the same scale repeated; three bits are stored as four, whose grid holds them.
The values (q − z)·s are those of the simulated program, bit for bit.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import model_path
from spinpass.quantization import Codes, QuantizedWeight

from ..blocks import STORED_BITS, block_size, blocks, packed_bits
from ..operators.hadamard import Body
from ..operators.rounding import ROWS, TOKENS, is_rounding, rounding_arguments
from .copies import QuantizeReport, load, write_quantized
from .kernels import IntegerProducts, arrays, has_integer_kernel, is_rounded_per_token
from .rewrite import FLOATS, PackedMatrix, Work, constant_matrix

_ROWS = 1024  # that are hashed at once
_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


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
    if accuracy_level not in range(5):
        raise ConfigError(f"accuracy_level {accuracy_level} is not one of 0, 1, 2, 3, 4")
    model = load(model_path(source))
    kinds = {v.dtype for v in model.graph.initializers.values() if v.dtype in FLOATS}
    named: dict[bytes, list[str]] = {}
    for name, weight in weights.items():
        for digest in {_digest_of_codes(weight.codes, _DTYPES[kind]) for kind in kinds}:
            named.setdefault(digest, []).append(name)
    work = _Packing(model.graph, 0, True, accuracy_level, None, None, frozenset(), weights=weights, named=named)
    work.run()
    # an exporter makes one constant of weights that are equal: the integers of the first stand for all of them
    found = {name for equal in named.values() if not work.found.isdisjoint(equal) for name in equal}
    left = sorted(set(weights) - found)
    if left:
        raise ExportError(
            f"no matrix product or table lookup of {model_path(source).name} has the constant that the integers of "
            f"{left[0]} stand for; export the program that quantize returned"
        )
    return write_quantized(model, work, source, model_path(destination), external_data)


@dataclass
class _Packing(Work):
    """This pass replaces the products and lookups of constants whose integers are given.

    Exporters rename and transpose constants, so they are known by their values: ``named`` has the weights by a digest
    of those, several where they are equal.
    """

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    named: Mapping[bytes, list[str]] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    integers: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)
    products: IntegerProducts = field(default_factory=IntegerProducts)
    names: dict[tuple[str, bool], str | None] = field(default_factory=dict)
    why_float: str = "the scheme leaves it in floats"

    @cached_property
    def looked_up(self) -> frozenset[str]:
        """The weights that are tables as well: MatMulNBits and GatherBlockQuantized read one copy of them."""
        tables = [node.inputs[0] for node in self.graph if node.op_type == "Gather"]
        names = [self._name(table, True) for table in tables if table is not None and table.is_initializer()]
        return frozenset(name for name in names if name is not None)

    def _matmul(self, node: ir.Node) -> None:
        x, matrix = node.inputs[0], constant_matrix(node.inputs[1])
        name = None if matrix is None else self._name(*matrix)
        if x is None or name is None:
            return super()._matmul(node)
        shared = name in self.looked_up and is_rounded_per_token(x)
        if has_integer_kernel(x, self.weights[name]) and not shared:
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
        rounded = node is not None and (is_rounding(node, TOKENS) or is_rounding(node, ROWS))
        return 0 if node is not None and rounded and rounding_arguments(node)[0] < 8 else self.accuracy_level

    def _before_rounding(self, x: ir.Value) -> ir.Value:
        """Return what was rounded to int8 per token, also where channels of the rounded are picked; else ``x``."""
        node = x.producer()
        source = None if node is None else node.inputs[0]
        if node is None or source is None:
            return x
        if is_rounded_per_token(x):
            return source
        axis = node.attributes.get("axis")
        if node.op_type != "Gather" or axis is None or x.shape is None or axis.as_int() not in (-1, len(x.shape) - 1):
            return x
        exact = self._before_rounding(source)
        if exact is source:
            return x
        picked = ir.node("Gather", [exact, node.inputs[1]], {"axis": -1})
        picked.outputs[0].type, picked.outputs[0].shape = x.type, x.shape
        self.graph.insert_before(node, picked)
        return picked.outputs[0]

    def _integer_product(self, node: ir.Node, x: ir.Value, name: str) -> None:
        self.found.add(name)
        if name not in self.integers:
            made = arrays(self.weights[name]).items()
            q, scales, zeros = (self.constant(f"{name}.{suffix}", array) for suffix, array in made)
            self.integers[name] = (q, scales, zeros)
        body = Body()
        result = self.products.build(body, x, self.integers[name])
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], body.nodes, node.outputs, [result])
        self.matmuls += 1

    def bits_of(self, constant: ir.Value, by_column: bool, head: bool) -> int | None:
        """Say in how many bits the integers of a matrix are stored; None where none are given."""
        name = self._name(constant, by_column)
        return None if name is None else STORED_BITS[self.weights[name].codes.bits]

    def table_bits_of(self, constant: ir.Value) -> int | None:
        """Say in how many bits the integers of a table are stored; None where none are given."""
        return self.bits_of(constant, True, False)

    def key_of(self, constant: ir.Value, by_column: bool, bits: int) -> tuple[str, bool, int]:
        """Return the weight behind a constant, whatever the constant is called and however it lies."""
        return self._name(constant, by_column) or str(constant.name), True, bits

    def quantized(self, constant: ir.Value, by_column: bool, bits: int) -> PackedMatrix:
        """Return the integers that are given for a constant, as constants of the graph."""
        name = self._name(constant, by_column)
        assert name is not None and constant.dtype is not None  # by its bits
        self.found.add(name)
        codes = self.weights[name].codes
        rows, columns = codes.q.shape
        block = block_size(codes, name)
        q, scales, zeros = blocks(codes, block)
        kind = ml_dtypes.bfloat16 if constant.dtype == ir.DataType.BFLOAT16 else constant.dtype.numpy()
        label = f"{name}.q{bits}"
        inputs = [
            self.constant(label, packed_bits(q, bits).reshape(rows, q.shape[1] // block, -1)),
            self.scales(f"{label}.scales", scales.float().numpy().astype(kind)),
        ]
        if bool((zeros != 2 ** (bits - 1)).any()):
            inputs.append(self.constant(f"{label}.zero_points", packed_bits(zeros, bits)))
        return PackedMatrix(columns, rows, bits, block, tuple(inputs))

    def _name(self, constant: ir.Value, by_column: bool) -> str | None:
        if constant.const_value is None or len(constant.const_value.shape) != 2:
            return None
        key = (str(constant.name), by_column)
        if key not in self.names:  # hashing a table takes a while
            digest = _digest_of_stored(constant.const_value, by_column)
            self.names[key] = next(iter(self.named.get(digest, ())), None)
            if isinstance(constant.const_value, ir.ExternalTensor):
                constant.const_value.release()  # a file that stays mapped counts as memory
        return self.names[key]


def _digest_of_stored(held: ir.TensorProtocol, by_column: bool) -> bytes:
    """Hash the values of a stored matrix, which may lie in a mapped file: nothing holds on to it afterwards."""
    array = held.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of memory that may not be written: nothing is
        stored = torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.float32))
    return _digest(stored if by_column else stored.T)


def _digest(matrix: Tensor) -> bytes:
    """Hash the values of a matrix (out, in), in float32."""
    return _digest_of_rows(matrix.shape, torch.split(matrix, _ROWS))


def _digest_of_codes(codes: Codes, dtype: torch.dtype) -> bytes:
    """Hash what codes stand for in a dtype, as :func:`_digest` does."""
    starts = range(0, len(codes.q), _ROWS)
    return _digest_of_rows(codes.q.shape, (codes.rows(slice(k, k + _ROWS)).dequantized().to(dtype) for k in starts))


def _digest_of_rows(shape: torch.Size, parts: Iterable[Tensor]) -> bytes:
    found = hashlib.sha256(str(tuple(shape)).encode())
    for part in parts:
        found.update(part.float().contiguous().numpy().tobytes())
    return found.digest()
