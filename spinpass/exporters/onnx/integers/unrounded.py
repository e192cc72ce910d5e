"""A file without what its operators round as they run:  accuracy_level 4 -> 0, caches of integers -> of floats.

``MatMulNBits`` may round activations by blocks, and GroupQueryAttention what it keeps. A program does not, or does it
otherwise, so the file can be near it at best. The copy is to be equal to it, and all else in the two files is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from spinpass.errors import ExportError, VerificationError
from spinpass.formats import model_path

from ..fusion.attention import GQA
from .cache import SCALES, cache_bits
from .copies import load

_LEVEL = "accuracy_level"


@dataclass(frozen=True)
class KernelRounding:
    """It counts the operators of a file that round as they run: ``products`` what they multiply, ``caches`` what they
    keep."""

    products: int
    caches: int

    def __bool__(self) -> bool:
        return bool(self.products or self.caches)


def kernel_rounding(path: str | Path) -> KernelRounding:
    """Return what the operators of a file round. Raises ExportError where there is no readable ONNX model."""
    graph = load(model_path(path)).graph
    return KernelRounding(len(_products(graph)), len(_caches(graph)))


def unrounded_copy(source: str | Path, destination: Path) -> Path:
    """Write a file that computes what ``source`` does, without the rounding that :func:`kernel_rounding` counts.

    Args:
        source: an ``.onnx`` file, or a folder with ``model.onnx``.
        destination: a file beside it, which goes on naming the data file of the source.

    Raises:
        ExportError: there is no readable ONNX model, or ``destination`` cannot be written.
        VerificationError: the parts of an operator do not fit together.
    """
    origin = model_path(source)
    if destination.parent.resolve() != origin.parent.resolve():
        raise ValueError("the copy names the data file of the source, and has to lie beside it")
    model = load(origin)
    for node in _products(model.graph):
        node.attributes.add(ir.AttrInt64(_LEVEL, 0))
    for node in _caches(model.graph):
        _in_floats(node)
    try:
        ir.save(model, destination)
    except OSError as error:
        raise ExportError(f"cannot write {destination}: {error}") from error
    return destination


def _products(graph: ir.Graph) -> list[ir.Node]:
    levels = ((node, node.attributes.get(_LEVEL)) for node in graph if node.op_type == "MatMulNBits")
    return [node for node, level in levels if level is not None and level.as_int() == 4]


def _caches(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == GQA and cache_bits(node)]


def _in_floats(node: ir.Node) -> None:
    """Let an attention keep floats: the reverse of what :mod:`.cache` does, of what its operator documents."""
    bits = cache_bits(node)
    for value in (node.inputs[3], node.inputs[4], node.outputs[1], node.outputs[2]):
        if value is None or value.shape is None or not isinstance(value.shape[-1], int):
            raise VerificationError(f"the cache of integers of {node.name} has no shape")
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([*value.shape[:-1], value.shape[-1] * 8 // bits])
    for index in range(SCALES, len(node.inputs)):
        node.replace_input_with(index, None)
    for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
        node.attributes.pop(name)
