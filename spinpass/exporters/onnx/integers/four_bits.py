"""4-bit weights for ONNX Runtime: constant MatMuls become ``MatMulNBits``, token tables ``GatherBlockQuantized``.

Rounding is ONNX Runtime's own round-to-nearest per block of ``block_size`` weights along the contracted axis; the
Hadamards' factors live in functions and are not touched. The output head is left as ``Transpose(constant) -> MatMul``
by every exporter as long as it shares its constant with the embedding, and other tools skip it; here the transpose is
folded into the packing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import PROTOBUF_LIMIT, data_name, model_path, remove_stale_data, staged
from spinpass.runtime import open_session

_DOMAIN = "com.microsoft"
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_ELEMENTWISE = {"Identity", "Cast", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"}
_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_4bit` did.

    ``matmuls`` counts the 4-bit ones without the heads; ``heads`` and ``tables`` those quantized, ``shared`` the tables
    that are read from a head's constant; ``kept`` says of every other float matrix product and table with a constant
    why it stayed.
    """

    path: Path
    files: tuple[Path, ...]
    bytes_before: int
    bytes_after: int
    matmuls: int
    heads: int
    tables: int
    shared: int
    kept: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.__dict__ | {"path": str(self.path), "files": [str(f) for f in self.files], "kept": list(self.kept)}


def quantize_4bit(
    source: str | Path,
    destination: str | Path,
    *,
    block_size: int = 32,
    symmetric: bool = True,
    accuracy_level: int = 4,
    head_bits: int | None = 8,
    table_bits: int | None = 8,
    keep: Collection[str] = (),
    external_data: bool | None = None,
) -> QuantizeReport:
    """Write a weight-only quantized copy of an ONNX model.

    A table tied to the head is the largest constant of a small model, so what happens to the two decides the file's
    size. With ``head_bits == table_bits`` one packed constant serves both and the float table goes (538 MB become 99 MB
    for a model of 135M parameters with 49k tokens; 212 MB with the float table kept beside an 8-bit head, 180 MB with
    one float constant for both). Eight bits are the default for both because the head is where four bits cost most.

    Args:
        source, destination: an ``.onnx`` file, or a folder with ``model.onnx``, whose other files (tokenizer,
            configuration) are copied.
        block_size: weights per scale, 16 to 256.
        symmetric: no zero points; else one per block.
        accuracy_level: how ``MatMulNBits`` computes, 0 to 4; 4 rounds activations to int8 per block and is fastest on a
            CPU.
        head_bits: 4 or 8 for the constant products that yield a graph output, through elementwise ops at most; None
            keeps them.
        table_bits: 4 or 8 for tables that are looked up by row; None keeps them.
        keep: names of constants to leave as they are.
        external_data: as in :func:`spinpass.exporters.onnx.export`.

    Raises:
        ConfigError: an option out of its range.
        ExportError: no readable model at ``source``, nothing in it to quantize, ONNX Runtime cannot load the result,
            ``destination`` cannot be written; nothing is left behind.
    """
    _check_options(block_size, accuracy_level, head_bits, table_bits)
    origin, target = model_path(source), model_path(destination)
    model = load(origin)
    work = Work(model.graph, block_size, symmetric, accuracy_level, head_bits, table_bits, frozenset(keep))
    work.run()
    return write(model, work, source, target, external_data)


def write(model: ir.Model, work: Work, source: str | Path, target: Path, external_data: bool | None) -> QuantizeReport:
    """Store a model whose nodes ``work`` has replaced, whole or not at all; see :func:`quantize_4bit`."""
    origin = model_path(source)
    if not (work.matmuls or work.heads or work.tables):
        reasons = "; ".join(work.kept) or "it multiplies by no constant matrix"
        raise ExportError(f"there is nothing to quantize in {origin}: {reasons}")
    model.opset_imports[_DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    before = _size(origin, model)
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = weights > PROTOBUF_LIMIT if external_data is None else external_data
    if not external:  # else the tensors that stayed would go on naming the source's data file
        ir.external_data.load_to_model(model)
    with staged(target.parent, weights) as staging:
        ir.save(model, staging / target.name, external_data=data_name(target) if external else None)
        open_session(staging / target.name)
        written = sorted(staging.iterdir())
        after = sum(file.stat().st_size for file in written)
        for file in companions(source, origin) if origin.parent.resolve() != target.parent.resolve() else ():
            shutil.copyfile(file, staging / file.name)
        files = tuple(target.parent / file.name for file in sorted(staging.iterdir()))
    remove_stale_data(target, files)
    return QuantizeReport(
        target, files, before, after, work.matmuls, work.heads, work.tables, work.shared, tuple(work.kept)
    )


def _check_options(block_size: int, accuracy_level: int, head_bits: int | None, table_bits: int | None) -> None:
    if block_size not in _BLOCKS:
        raise ConfigError(f"block_size {block_size} is not one of {', '.join(map(str, _BLOCKS))}")
    if accuracy_level not in range(5):
        raise ConfigError(f"accuracy_level {accuracy_level} is not one of 0, 1, 2, 3, 4")
    for name, bits in (("head_bits", head_bits), ("table_bits", table_bits)):
        if bits not in (4, 8, None):
            raise ConfigError(f"{name} {bits} is not 4, 8 or None")


def load(path: Path) -> ir.Model:
    if not path.is_file():
        raise ExportError(f"there is no ONNX model at {path}")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's DecodeError and whatever a damaged file leads to
        raise ExportError(f"{path} is not a readable ONNX model: {error}") from error


def _size(path: Path, model: ir.Model) -> int:
    """Bytes of the model file and of the data files it names."""
    values = (value.const_value for value in model.graph.initializers.values())
    data = {Path(path.parent, t.location) for t in values if isinstance(t, ir.ExternalTensor)} | {
        path.with_name(data_name(path))
    }
    return path.stat().st_size + sum(file.stat().st_size for file in data if file.is_file())


def companions(source: str | Path, origin: Path) -> Iterator[Path]:
    """The files beside the model that belong to it, if ``source`` is a folder."""
    if Path(source).is_dir():
        yield from (f for f in origin.parent.iterdir() if f.is_file() and not f.name.endswith((".onnx", ".onnx.data")))


@dataclass(frozen=True)
class Packed:
    """A quantized matrix of N columns and K rows, as the inputs of ``MatMulNBits``."""

    rows: int
    columns: int
    bits: int
    block_size: int
    inputs: tuple[ir.Value, ...]  # packed (N, blocks, bytes), scales (N, blocks), zero points


@dataclass
class Work:
    """One pass over the nodes of a graph, and what it counted."""

    graph: ir.Graph
    block_size: int
    symmetric: bool
    accuracy_level: int
    head_bits: int | None
    table_bits: int | None
    keep: frozenset[str]
    matmuls: int = 0
    heads: int = 0
    tables: int = 0
    shared: int = 0
    kept: list[str] = field(default_factory=list)
    packed: dict[tuple[str, bool, int], Packed] = field(default_factory=dict)

    def run(self) -> None:
        nodes = [node for node in self.graph if node.domain in ("", "ai.onnx")]
        for node in nodes:
            if node.op_type == "MatMul":
                self._matmul(node)
        for node in nodes:  # after the heads, to share with them
            if node.op_type == "Gather":
                self._gather(node)

    def _matmul(self, node: ir.Node) -> None:
        x, matrix = node.inputs[0], constant_matrix(node.inputs[1])
        if x is None or matrix is None:
            return
        constant, by_column = matrix
        head = _is_head(node)
        bits = self.bits_of(constant, by_column, head)
        reason = self._why_keep(constant, bits, rank=2)
        if reason or bits is None:
            self.kept.append(f"{constant.name}: {reason}")
            return
        packed = self._pack(constant, by_column, bits)
        attributes = {"K": packed.rows, "N": packed.columns, "bits": bits, "block_size": packed.block_size}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        self._replace(node, "MatMulNBits", (x, *packed.inputs), attributes)
        if head:
            self.heads += 1
        else:
            self.matmuls += 1

    def bits_of(self, constant: ir.Value, by_column: bool, head: bool) -> int | None:
        """How many bits a matrix gets; None keeps it."""
        return self.head_bits if head else 4

    def table_bits_of(self, constant: ir.Value) -> int | None:
        """How many bits a table gets; None keeps it."""
        return self.table_bits

    def _gather(self, node: ir.Node) -> None:
        table, indices = node.inputs
        if table is None or not table.is_initializer() or table.dtype not in _FLOATS or len(table.shape or ()) != 2:
            return
        axis = node.attributes.get("axis")
        if axis is not None and axis.as_int() != 0:
            return
        bits = self.table_bits_of(table)
        reason = self._why_keep(table, bits, rank=2)
        if not reason and self.block_size and _static(table)[1] % self.block_size:
            reason = f"its rows of {_static(table)[1]} are no multiple of the block size {self.block_size}"
        if reason or bits is None:
            self.kept.append(f"{table.name}: {reason}")
            return
        self.shared += (str(table.name), True, bits) in self.packed
        packed = self._pack(table, True, bits)
        flat = ir.node("Reshape", [packed.inputs[0], self.constant("rows", np.array([packed.columns, -1], np.int64))])
        self.graph.insert_before(node, flat)
        attributes = {"bits": bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = (flat.outputs[0], indices, *packed.inputs[1:])
        self._replace(node, "GatherBlockQuantized", inputs, attributes)
        self.tables += 1

    def _why_keep(self, constant: ir.Value, bits: int | None, rank: int) -> str:
        if bits is None or constant.name in self.keep:
            return "asked for"
        if constant.dtype not in _FLOATS:
            return f"its type is {constant.dtype}"
        shape = _static(constant)
        if len(shape) != rank:
            return f"its shape {list(shape)} is not that of a matrix"
        return f"its shape {list(shape)} is smaller than a block" if max(shape) < self.block_size else ""

    def _pack(self, constant: ir.Value, by_column: bool, bits: int) -> Packed:
        """Quantize along the contracted axis: rows, or the columns of a constant that is used transposed. Once per
        constant."""
        key = (str(constant.name), by_column, bits)
        if key not in self.packed:
            self.packed[key] = self.quantized(constant, by_column, bits)
        return self.packed[key]

    def quantized(self, constant: ir.Value, by_column: bool, bits: int) -> Packed:
        """The integers of a constant, as constants of the graph."""
        assert constant.const_value is not None
        array = constant.const_value.numpy()
        matrix = np.ascontiguousarray((array.T if by_column else array).astype(np.float32))
        data, scales, zero_points = _round_to_nearest(matrix, self.block_size, self.symmetric, bits)
        kind = ml_dtypes.bfloat16 if constant.dtype == ir.DataType.BFLOAT16 else array.dtype
        name = f"{constant.name}{'.T' if by_column else ''}.q{bits}"
        inputs = [self.constant(name, data), self.constant(f"{name}.scales", scales.astype(kind))]
        if not self.symmetric:
            inputs.append(self.constant(f"{name}.zero_points", zero_points))
        return Packed(matrix.shape[0], matrix.shape[1], bits, self.block_size, tuple(inputs))

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        unique = name
        while unique in self.graph.initializers:
            unique += "_"
        tensor = ir.tensor(array, name=unique)
        value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def _replace(self, node: ir.Node, op: str, inputs: tuple[ir.Value | None, ...], attributes: dict[str, int]) -> None:
        listed = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        new = ir.Node(_DOMAIN, op, inputs, listed, name=node.name)
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], node.outputs, new.outputs)


def _round_to_nearest(
    matrix: np.ndarray[Any, Any], block_size: int, symmetric: bool, bits: int
) -> tuple[Any, Any, Any]:
    """ONNX Runtime's packing of a (K, N) matrix: data (N, blocks, bytes), scales (N, blocks), zero points."""
    with _root_logger_kept():  # importing the module below sets up the process's logging
        from onnxruntime.quantization import (
            matmul_nbits_quantizer as quantizer,
        )
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=symmetric, bits=bits)
    data, scales, zero_points = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return data, scales, zero_points


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def constant_matrix(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The constant behind the right operand of a MatMul, and whether it is used transposed; None if there is none."""
    if value is None:
        return None
    if value.is_initializer():
        return value, False
    node = value.producer()
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return None
    constant, order = node.inputs[0], node.attributes.get("perm")
    if constant is None or not constant.is_initializer() or (order is not None and list(order.as_ints()) != [1, 0]):
        return None
    return constant, True


def _static(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None  # an initializer has one
    return tuple(value.shape.numpy())


def _is_head(node: ir.Node) -> bool:
    """Whether the result, or something elementwise of it, is an output of the graph."""
    value = node.outputs[0]
    if value.is_graph_output():
        return True
    return any(user.op_type in _ELEMENTWISE and _is_elementwise_end(user) for user in value.consumers())


def _is_elementwise_end(node: ir.Node) -> bool:
    """A chain of single elementwise uses that ends in an output of the graph."""
    while not node.outputs[0].is_graph_output():
        users = node.outputs[0].consumers()
        if len(users) != 1 or users[0].op_type not in _ELEMENTWISE:
            return False
        node = users[0]
    return True
