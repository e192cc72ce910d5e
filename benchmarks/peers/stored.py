"""What the weights of a file are, read off the file: its name says what was asked for.

    model.onnx:  122×4 bits/32, 29×8 bits/32; table 8 bits/32; floats 0.6M
    model.gguf:  Q5_0 ×210, Q8_0 ×30, F32 ×61

A group of 128 does not divide a width of 576, and blocks of 256 neither: tools pad, skip a layer, or fall back to
another kind, and say nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PRODUCTS = ("MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_FLOATS = {1: "float32", 10: "float16", 16: "bfloat16"}  # of onnx.TensorProto
_INTEGERS = {2: 8, 3: 8, 21: 4, 22: 4}  # bits of what linear layers without a width of their own multiply
_TABLES = 2  # axes of a weight


def stored(path: Path) -> str:
    """A line on a folder with ``model.onnx``, a GGUF file or a safetensors file; empty where there is none of them."""
    if path.suffix == ".gguf":
        return of_gguf(path)
    return of_onnx(path / "model.onnx") if (path / "model.onnx").is_file() else ""


def of_gguf(path: Path) -> str:
    """Count its tensors by their type."""
    from gguf import GGUFReader

    return counted(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors))


def of_onnx(path: Path) -> str:
    """Count its products and tables by bits and block, and the values of the matrices that are floats."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    nodes = list(_nodes(graph))
    kinds = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in graph.initializer}
    products = Counter(kind for node in nodes if (kind := _product(node, kinds)))
    tables = Counter(_blocks(node) for node in nodes if node.op_type == "GatherBlockQuantized")
    left = floats(kinds, _side_inputs(nodes))
    parts = [counted(products), "table " + counted(tables) if tables else "", counted_values(left)]
    return "; ".join(part for part in parts if part)


def counted(kinds: Mapping[str, int]) -> str:
    """``3×a, 1×b``, the most frequent first."""
    return ", ".join(f"{count}×{kind}" for kind, count in Counter(kinds).most_common())


def counted_values(left: Mapping[str, int]) -> str:
    """``floats 28.3M float32``, with less than a tenth of a million left out."""
    found = [f"{count / 1e6:.1f}M {kind}" for kind, count in Counter(left).most_common() if count >= 1e5]
    return "floats " + ", ".join(found) if found else ""


def floats(kinds: Mapping[str, tuple[int, list[int]]], beside: Iterable[str]) -> dict[str, int]:
    """How many values of matrices are floats of which dtype, without scales, which are ``beside`` their codes."""
    found: Counter[str] = Counter()
    skipped = set(beside)
    for name, (dtype, shape) in kinds.items():
        if dtype in _FLOATS and len(shape) >= _TABLES and name not in skipped:
            found[_FLOATS[dtype]] += math.prod(shape)
    return dict(found)


def _product(node: Any, kinds: Mapping[str, tuple[int, list[int]]]) -> str:
    """What a product's weight is; empty for a node that is none, or whose operands are both computed."""
    if node.op_type == "MatMulNBits":
        return _blocks(node)
    if node.op_type in PRODUCTS and len(node.input) > 1 and node.input[1] in kinds:
        return f"{_INTEGERS.get(kinds[node.input[1]][0], 8)} bits/channel"
    if node.op_type in ("MatMul", "Gemm") and node.input[1] in kinds:
        dtype, shape = kinds[node.input[1]]
        return _FLOATS.get(dtype, "") if len(shape) >= _TABLES else ""
    return ""


def _blocks(node: Any) -> str:
    given = {attribute.name: attribute.i for attribute in node.attribute}
    return f"{given.get('bits', 4)} bits/{given.get('block_size', 128)}"


def _side_inputs(nodes: Collection[Any]) -> Iterator[str]:
    """Scales and zero points, and what scales are cast from."""
    cast = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Cast"}
    for node in nodes:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            yield from (cast.get(name, name) for name in node.input[2:])
        elif node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            yield from node.input[1:]


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
