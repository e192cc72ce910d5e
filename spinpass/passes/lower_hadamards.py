"""``spinpass::hadamard(x) -> linear, transpose, linear, transpose``, for runtimes that know no operator of spinpass.

    x (I ⊗ F1 ⊗ F2)  =  flatten(F1ᵀ (unflatten(x) F2))

The Kronecker factors of :func:`spinpass.rotations.hadamard.kronecker_factors` become parameters of the program. Every
factor is one ``aten::linear``, which is what the delegates of ExecuTorch and OpenVINO take; axes are split and joined
without mentioning the others, so dynamic shapes stay dynamic.

    copy(empty_like(x), y) -> y,  for the same runtimes:  products with stored factors keep the strides of x by it
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass import record
from spinpass.errors import ExportError
from spinpass.graph import ProgramEditor, arguments, op_name, same_strides, shape, value
from spinpass.operators import HADAMARD
from spinpass.rotations import hadamard

_PACKAGE = "spinpass.hadamard_factor"


def lower_hadamards(program: ExportedProgram) -> ExportedProgram:
    """Return a program without ``spinpass::hadamard`` that computes what ``program`` does, to float rounding.

    Half-precision Hadamards are computed in float32 and rounded once, as by the operator. Signature, dynamic shapes and
    the record (:mod:`spinpass.record`) are kept. Copies that only keep strides give way as well. The program given is
    not changed, and it is what is returned where it has neither.

    Raises:
        ProgramError, QuantizedWeightError: as :class:`spinpass.graph.editor.ProgramEditor`.
        ExportError: a Hadamard runs along an axis of dynamic size.
    """
    if not any(_is_hadamard(node) or _keeps_strides(node) for node in program.graph.nodes):
        return program
    editor = ProgramEditor(program)
    replace_hadamards(editor)
    found = record.read(program)
    if found is not None:
        record.write(editor.graph, found)
    return editor.finish()


def replace_hadamards(editor: ProgramEditor) -> None:
    """Put linear layers in place of every Hadamard, as :func:`lower_hadamards`, which says what is raised."""
    factors: dict[tuple[int, bool, torch.dtype], Node] = {}
    for node in [n for n in editor.nodes if _keeps_strides(n)]:
        put_in_place(editor, node, arguments(node)["src"])
    for node in [n for n in editor.nodes if _is_hadamard(n)]:
        put_in_place(editor, node, _lowered(editor, node, factors))


def put_in_place(editor: ProgramEditor, node: Node, by: Node) -> None:
    """Let what reads ``node`` read ``by``, an equal value whose strides may be others."""
    if not same_strides(by, node):
        _allow_copies(node.users)
    editor.replace(node, by)


def _is_hadamard(node: Node) -> bool:
    return op_name(node) == HADAMARD


def _keeps_strides(node: Node) -> bool:
    """Return whether a node is a copy of a value, equal but for its strides: those of a value that is not read."""
    if op_name(node) != "aten::copy":
        return False
    into, source = arguments(node)["self"], arguments(node)["src"]
    same = value(into).dtype == value(source).dtype and tuple(shape(into)) == tuple(shape(source))
    return op_name(into) == "aten::empty_like" and same


def _lowered(editor: ProgramEditor, node: Node, factors: dict[tuple[int, bool, torch.dtype], Node]) -> Node:
    """Return the last of the nodes that stand for one Hadamard.

    Raises:
        ExportError: its axis has a dynamic size.
    """
    given = arguments(node)
    x, order, transpose = given["x"], given["order"], given["transpose"]
    size = shape(x)[-1]
    if not isinstance(size, int):
        raise ExportError(
            f"{node.name}: a Hadamard of order {order} runs along an axis of dynamic size {size}: make it static"
        )
    chain = _Chain(editor, x, node)
    dtype, compute = value(x).dtype, hadamard.precision_of(value(x))
    if dtype != compute:
        chain.call(torch.ops.aten.to.dtype, compute)
    if size != order:
        chain.split(size // order, order)
    orders = hadamard.kronecker_factors(order)
    device = value(x).device
    _multiply(chain, [(f, _weight(editor, factors, f, transpose, compute, device)) for f in reversed(orders)])
    if size != order:
        chain.join()
    if dtype != compute:
        chain.call(torch.ops.aten.to.dtype, dtype)
    return chain.last


def _multiply(chain: _Chain, weights: Sequence[tuple[int, Node]]) -> None:
    """Multiply the last axis by every factor, the last factor first.

    The axis of a factor that was multiplied moves to the front, so that after all of them the axes are in their old
    order again.
    """
    if len(weights) == 1:
        return chain.call(torch.ops.aten.linear.default, weights[0][1])
    order = math.prod(size for size, _ in weights)
    for done, (size, weight) in enumerate(weights):
        if done and len(weights) > 2:
            chain.join()
        if not done or len(weights) > 2:  # of two factors, the first one's transpose is the second one's split
            chain.split(order // size, size)
        chain.call(torch.ops.aten.linear.default, weight)
        chain.call(torch.ops.aten.transpose.int, -2, -1)
    chain.join()


def _weight(
    editor: ProgramEditor,
    factors: dict[tuple[int, bool, torch.dtype], Node],
    order: int,
    transpose: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Node:
    """Return the weight of an ``aten::linear`` that multiplies by ``F/√f``, which is its transpose.

    It is made once per program, and has the shape (f, f).
    """
    matrix = hadamard.matrix(order)
    transpose = transpose and not torch.equal(matrix, matrix.t())
    if (order, transpose, dtype) not in factors:
        weight = ((matrix if transpose else matrix.t()) / math.sqrt(order)).to(device, dtype).contiguous()
        name = f"{_PACKAGE}.{order}{'_transposed' if transpose else ''}_{str(dtype).removeprefix('torch.')}"
        factors[order, transpose, dtype] = editor.add_constant(name, weight)
    return factors[order, transpose, dtype]


class _Chain:
    """Nodes in a row, each of which reads the one before."""

    def __init__(self, editor: ProgramEditor, first: Node, at: Node) -> None:
        self.last = first
        self._editor, self._at = editor, at
        origin = at.meta.get("custom", {}).get("spinpass_origin")
        self._origin = str(origin or at.name)

    def call(self, target: Any, *args: Any) -> None:
        """Append ``target(last, *args)``."""
        self._at = self.last = self._editor.call(target, self.last, *args, after=self._at, origin=self._origin)

    def split(self, rows: int, columns: int) -> None:
        """Split the last axis into two."""
        self.call(torch.ops.aten.unflatten.int, -1, [rows, columns])

    def join(self) -> None:
        """Join the last two axes into one."""
        self.call(torch.ops.aten.flatten.using_ints, -2, -1)


def _allow_copies(users: Iterable[Node]) -> None:
    """view -> reshape:  let every view behind a value copy, because its strides are not those of the traced program."""
    todo, seen = list(users), set[Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo += node.users
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
