"""What a mask lets through, found by running the part of the graph that makes it.

A mask that is made of sizes alone is the same for all values of the inputs: it is evaluated for a few sizes, among them
some beyond every number that occurs in its making (a window of 4096 shows itself at 4099 keys), and compared with the
causal one. A mask that depends on values (of an attention mask, for rows of different length) is asked whether anything
of the future can pass for several values; it is then added to the scores as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from .match import constant, integer, names, sizes

_SIZES = ((5, 0), (1, 7), (4, 3))  # new tokens, tokens in the cache
_LONGEST = 2**20  # a number above this is no window: nothing is evaluated beyond it
_CLOSED = -1e4  # what is added to a score that must not count; -65504 in float16
_BATCH = 1
_FILLS = ("ones", "counted", "ended", "drawn", "drawn again")
_NUMPY = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(float)": np.float32,
          "tensor(float16)": np.float16}  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """This is what a causal mask does: ``window`` is how many keys a query sees, its own included, and None for all up
    to its own. ``needed`` says that the values themselves have to be added to the scores: they do more than that, or
    depend on inputs."""

    window: int | None
    needed: bool


def read_mask(
    bias: ir.Value, graph: ir.Graph, opsets: dict[str, int], tokens: str, past: str, batch: str | int
) -> Mask | str:
    """Return what ``bias``, which is added to the scores, does.

    ``tokens``, ``past`` and ``batch`` are the symbols of the sizes in the shapes of the graph's inputs. The result is a
    reason where the mask lets a query see later keys, or cannot be evaluated.
    """
    cone = _Cone.of(bias, graph)
    try:
        session = cone.session(opsets)
        probes = [
            (s, p, cone.run(session, _Sizes(s, p, {tokens: s, past: p, batch: _BATCH}), fill))
            for s, p in (*_SIZES, *((2, n) for n in sorted(cone.numbers)))
            for fill in (_FILLS if cone.takes_values else _FILLS[:1])
        ]
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        return f"its mask cannot be evaluated: {str(error).splitlines()[0]}"
    if any(not (_future(s, p) <= (mask <= _CLOSED)).all() for s, p, mask in probes):
        return "its mask lets a token see later ones"
    if cone.takes_values:
        return Mask(None, needed=True)
    window = _window(probes[-1][-1])
    for candidate in (None, window):
        if all(_equals(mask, s, p, candidate) for s, p, mask in probes):
            return Mask(candidate, needed=False)
    return Mask(None, needed=True)


def _future(s: int, p: int) -> np.ndarray[Any, Any]:
    """Return a table (s, p + s) that is True where a key comes after its query."""
    return np.asarray(np.arange(p + s)[None] > np.arange(p, p + s)[:, None])


def _equals(mask: np.ndarray[Any, Any], s: int, p: int, window: int | None) -> bool:
    """Say whether ``mask`` is 0 for the keys of the causal mask with this window, and closed for all others."""
    closed = _future(s, p)
    if window is not None:
        closed = closed | (np.arange(p + s)[None] <= np.arange(p, p + s)[:, None] - window)
    return bool(np.where(closed, mask <= _CLOSED, mask == 0).all())


def _window(mask: np.ndarray[Any, Any]) -> int | None:
    """Count the keys that the last query of the longest probe sees; None where it sees none or all."""
    seen = int((mask.reshape(-1, mask.shape[-1])[-1] == 0).sum())
    return seen if 0 < seen < mask.shape[-1] else None


@dataclass(frozen=True)
class _Cone:
    """The cone holds the nodes that make a value, in order, and the inputs of the graph that they start from."""

    value: ir.Value
    nodes: Sequence[ir.Node]
    inputs: Mapping[ir.Value, frozenset[int]]  # with the axes that something is read of
    initializers: Sequence[ir.Value]
    takes_values: bool

    @staticmethod
    def of(value: ir.Value, graph: ir.Graph) -> _Cone:
        """Collect what makes ``value``."""
        reached = _reached(value)
        nodes = [node for node in graph if any(v in reached for v in node.outputs)]
        inputs = {v: _axes(v, nodes) for v in graph.inputs if v in reached}
        by_value = _reached(value, through_shapes=False)
        constants = [v for v in graph.initializers.values() if v in reached]
        return _Cone(value, nodes, inputs, constants, any(v in by_value for v in inputs))

    @property
    def numbers(self) -> set[int]:
        """Return sizes of a cache that lie beyond the numbers that occur."""
        arrays = (constant(v) for node in self.nodes for v in node.inputs)
        small = (a for a in arrays if a is not None and a.size <= 4 and a.dtype.kind in "if")
        found = {abs(int(x)) for a in small for x in a.flatten() if np.isfinite(x)}
        return {n + 1 for n in found if max(map(sum, _SIZES)) <= n + 2 and n < _LONGEST}

    def session(self, opsets: dict[str, int]) -> ort.InferenceSession:
        """Load the cone as a model of its own."""
        graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="mask")
        copies: dict[ir.Value, ir.Value] = {}
        for v in self.inputs:
            copies[v] = ir.Value(name=v.name, type=v.type, shape=v.shape)
            graph.inputs.append(copies[v])
        for v in self.initializers:
            copies[v] = ir.Value(name=v.name, type=v.type, shape=v.shape, const_value=v.const_value)
            graph.register_initializer(copies[v])
        for node in self.nodes:
            operands = [None if v is None else copies[v] for v in node.inputs]
            new = ir.Node(node.domain, node.op_type, operands, node.attributes.values(), num_outputs=len(node.outputs))
            for old, made in zip(node.outputs, new.outputs):
                made.name, copies[old] = old.name, made
            graph.append(new)
        result = copies[self.value]
        result.type = self.value.type
        graph.outputs.append(result)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        text = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        return ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])

    def run(self, session: ort.InferenceSession, at: _Sizes, fill: str) -> np.ndarray[Any, Any]:
        """Return the mask in float64, of inputs that are filled as :func:`_filled` says."""
        types = {i.name: _NUMPY[i.type] for i in session.get_inputs()}
        feed = {str(v.name): _filled(at.shape(v, axes), types[str(v.name)], fill) for v, axes in self.inputs.items()}
        (mask,) = session.run(None, feed)
        return np.asarray(mask, np.float64)


@dataclass(frozen=True)
class _Sizes:
    """These are the sizes of one run: new ``tokens`` on top of a ``past``, and what symbols stand for."""

    tokens: int
    past: int
    known: dict[str | int, int]

    def shape(self, value: ir.Value, axes: frozenset[int]) -> list[int]:
        """Return the shape of an input as numbers. Raises ValueError where a size is neither known nor a sum, and its
        axis is among those that matter.

        The last size of a matrix of unknown sizes is taken for all keys, as that of an attention mask, and its first
        for the rows of the batch: exported programs need not say that these are the same as elsewhere.
        """
        rank = len(sizes(value))
        unknown = [_BATCH, self.past + self.tokens] if rank == 2 else [None if i in axes else 1 for i in range(rank)]
        return [self._size(size, other) for size, other in zip(names(sizes(value)), unknown)]

    def _size(self, size: int | str | None, otherwise: int | None) -> int:
        if isinstance(size, int):
            return size
        parts = str(size).split(" + ")
        total = [self.known.get(part, int(part) if part.isdigit() else None) for part in parts]
        if None not in total:
            return sum(n for n in total if n is not None)
        if otherwise is None:
            raise ValueError(f"the size {size} of an input is not known")
        return otherwise


def _filled(shape: list[int], kind: Any, fill: str) -> np.ndarray[Any, Any]:
    """Return values of an input: ones, the numbers 0, 1, ... along the last axis, ones that end with a 0, or zeros and
    ones that are drawn."""
    ones: np.ndarray[Any, Any] = np.ones(shape, kind)
    if fill == "counted":
        return np.asarray((np.cumsum(ones, -1) - 1).astype(kind))
    if fill == "ended":
        ones[..., -1:] = 0
    elif fill != "ones":
        return np.random.default_rng(_FILLS.index(fill)).integers(0, 2, shape).astype(kind)
    return ones


def _axes(value: ir.Value, nodes: Sequence[ir.Node]) -> frozenset[int]:
    """Return the axes of an input whose size ``nodes`` read; all of them where they read its values."""
    axes = range(len(sizes(value)))
    found: set[int] = set()
    for node in (node for node in nodes if value in node.inputs):
        if node.op_type != "Shape":
            return frozenset(axes)
        found.update(axes[integer(node, "start", 0) : integer(node, "end", len(axes))])
    return frozenset(found)


def _reached(value: ir.Value, *, through_shapes: bool = True) -> set[ir.Value]:
    """Collect everything that ``value`` is made of; without what only its size matters of, if asked."""
    found: set[ir.Value] = set()
    todo = [value]
    while todo:
        at = todo.pop()
        if at in found:
            continue
        found.add(at)
        node = at.producer()
        if node is not None and (through_shapes or node.op_type != "Shape"):
            todo += _operands(node)
    return found


def _operands(node: ir.Node) -> Iterator[ir.Value]:
    yield from (v for v in node.inputs if v is not None)
