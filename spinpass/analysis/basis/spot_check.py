"""Every use that a space makes of a rule, checked by running it:  f(T x) = T f(x),  T each operand's change of basis.

A rule is a claim about an operator: where its operands are in another basis, its result is as well, or is unchanged.
The claim needs no weights, so it is checked at any size of model, before anything is rewritten: the operator is run on
drawn values in float64, as it stands in the graph and on operands whose vectors are rotated (scaled and centred, too,
where the space says so), and the results are compared. One check serves all nodes of the same operator, arguments,
layouts and shapes, which are those of one layer. Dynamic sizes are small numbers, and axes that a product does not
rotate are cut to 2 where a value is large. Constants of integers and booleans are the program's own; all other values
are drawn.

It proves rules, not their composition: that is the certificate's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass.graph import ConcreteSizes, Layout, ProgramEditor, called, drawn, frozen, is_op, lifted, op_name, value

from ..ops.rules import Centring, Ignored, Mean, Movement, Multilinear, Normalization, Rule, Several, Square, Zeros
from ..ops.table import rule_of
from .space import AxisType, ShiftUse, Space

_BOUND = 1e-9  # relative; float64 rounds to 2e-16, and no sum here is longer than an axis
_MOST_BYTES = 100 * 2**20  # of all values of a check
_LARGE = 2**16  # elements, above which free axes are cut
_CUT = 2


@dataclass(frozen=True)
class Fault:
    """An operator that does not do what its rule says: ``why`` is a phrase with the node's name."""

    node: Node
    why: str


@dataclass(frozen=True)
class Checked:
    """What came of a space: its first ``fault``, None where there is none; and of its operators that could not be run
    by themselves, a sentence each."""

    fault: Fault | None
    unchecked: tuple[str, ...]


class SpotCheck:
    """The checks of all spaces of a program; what has been checked once is not checked again.

    Args:
        editor: the program, which is not edited.
    """

    def __init__(self, editor: ProgramEditor) -> None:
        self.editor = editor
        self._sizes = (ConcreteSizes(), ConcreteSizes(example=True))
        self._found: dict[Hashable, _Outcome] = {}
        self._directions: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, space: Space) -> Checked:
        """Run every operator that has the space in it."""
        local, as_exported = (_Local(self.editor, space, sizes) for sizes in self._sizes)
        unchecked: dict[str, None] = {}
        for node in local.operators():
            key = _shared(node, local, as_exported)
            if key not in self._found:
                self._found[key] = self._checked(node, local, as_exported)
            outcome = self._found[key]
            if outcome.fault:
                return Checked(Fault(node, f"{node.name}: {outcome.fault}"), tuple(unchecked))
            if outcome.unchecked:
                unchecked[f"{op_name(node)} was not checked by itself: {outcome.unchecked}"] = None
        return Checked(None, tuple(unchecked))

    def _checked(self, node: Node, *sizes: _Local) -> _Outcome:
        why = ""
        for local in sizes:
            try:
                return _Outcome(fault=_Trial(local, node, self._rotated).run() or "")
            except (_NotRun, ValueError) as error:  # the latter of sizes that only a run tells
                why = why or str(error)
        return _Outcome(unchecked=why)

    def _rotated(self, vectors: Tensor, dim: int) -> Tensor:
        """x -> x (I − 2 a aᵀ)(I − 2 b bᵀ):  an orthogonal matrix without symmetry, at the cost of two products."""
        size = vectors.shape[dim]
        if size not in self._directions:
            generator = torch.Generator("cpu").manual_seed(size)
            a, b = torch.randn(2, size, generator=generator, dtype=torch.float64, device="cpu")
            self._directions[size] = (a / a.norm(), b / b.norm())
        moved = vectors.movedim(dim, -1)
        for direction in self._directions[size]:
            moved = moved - 2 * (moved @ direction)[..., None] * direction
        return moved.movedim(-1, dim)


@dataclass(frozen=True)
class _Outcome:
    fault: str = ""
    unchecked: str = ""


class _NotRun(Exception):
    """The operator cannot be run by itself."""


@dataclass
class _Local:
    """A space as its operators see it."""

    editor: ProgramEditor
    space: Space
    sizes: ConcreteSizes

    def __post_init__(self) -> None:
        self.entries = {entry.node: set(entry.keep) for entry in self.space.entries}
        self.left = {(exit.node, user) for exit in self.space.exits for user in exit.users}
        self.whole = {use.node for use in self.space.constants}  # expressions that fold as a whole, whatever they do
        self.scales, self.centrings = set(self.space.scales), set(self.space.centrings)
        self.shifts: dict[Node, list[ShiftUse]] = {}
        for shift in self.space.shifts:
            self.shifts.setdefault(shift.node, []).append(shift)

    def rule(self, node: Node) -> Rule | None:
        return rule_of(node) if node.op == "call_function" else None

    def operators(self) -> Iterator[Node]:
        """Yield what reads or makes a member in the space's basis, and has a rule that says something about it."""
        members = self.space.members
        found = dict.fromkeys(n for m in members for n in (m, *m.users))
        for node in found:
            rule = self.rule(node)
            if rule is None or isinstance(rule, (Ignored, Several, Mean)) or node in self.whole:
                continue
            if (node in members and node not in self.entries) or any(self.reads(node)):
                yield node

    def reads(self, node: Node) -> Iterator[Node]:
        """Yield the operands that the node reads in the space's basis."""
        return (source for source in self.sources(node) if self.types(source, node))

    def types(self, source: Node, user: Node) -> tuple[AxisType, ...]:
        """Return in which basis ``user`` reads ``source``: none where it reads it as it was."""
        readers = {user} if op_name(user) != "getitem" else {user, user.all_input_nodes[0]}
        if any((source, reader) in self.left or reader in self.entries.get(source, ()) for reader in readers):
            return ()
        return self.space.members.get(source, ())

    def made(self, node: Node) -> tuple[AxisType, ...]:
        """Return in which basis the node makes its result."""
        return () if node in self.entries else self.space.members.get(node, ())

    def sources(self, node: Node) -> list[Node]:
        """Return the operands of a node, of a result of several those of the operator that makes them."""
        return (node.all_input_nodes[0] if op_name(node) == "getitem" else node).all_input_nodes

    def chain(self, node: Node) -> list[Node | None]:
        """Return what has to run behind the node before its rule says anything: of a square each of its sums."""
        return list(node.users) if isinstance(self.rule(node), Square) else [None]

    def key(self, node: Node) -> Hashable:
        """Return what two uses of a rule have in common where one check serves both."""
        head = node.all_input_nodes[0] if op_name(node) == "getitem" else node
        after = (
            tuple((u.target, frozen(u.args, lambda n: n is node)) for u in node.users)
            if isinstance(self.rule(node), Square)
            else ()
        )
        operands = tuple(self._operand(source, node) for source in head.all_input_nodes)
        order = {source: index for index, source in enumerate(head.all_input_nodes)}
        arguments = frozen((head.args, head.kwargs), order.get)
        item = node.args[1] if head is not node else None
        role = (node in self.scales, node in self.centrings, len(self.shifts.get(node, ())), self.space.centred)
        return (head.target, arguments, item, operands, tuple(map(_basis, self.made(node))), role, after)

    def _operand(self, source: Node, user: Node) -> Hashable:
        val = value(source)
        if not isinstance(val, Tensor):
            return self.sizes.of(val) if val is not None else source
        own = self.editor.is_constant(source) and not (val.is_floating_point() or val.is_complex())
        zero = isinstance(self.rule(source), Zeros)
        types = tuple(map(_basis, self.types(source, user)))
        return (
            self.sizes.shape(source),
            val.dtype,
            types,
            self.editor.is_weight(source),
            zero,
            source if own else None,
        )


def _shared(node: Node, *sizes: _Local) -> Hashable:
    """Return the key of a node, with sizes that can be told; where none can, it shares a check with no other."""
    for local in sizes:
        try:
            return local.key(node)
        except ValueError:
            continue
    return node


def _basis(axis: AxisType) -> Hashable:
    pending = axis.pending
    about = pending and (pending.after, _count(pending.scale), _count(pending.shift))
    return (axis.layout, about, axis.centred, axis.reads)


def _count(node: Node | None) -> int:
    return 0 if node is None else int(value(node).numel())


class _Trial:
    """One operator, run as it stands and on operands in the space's basis."""

    def __init__(self, local: _Local, node: Node, rotated: Callable[[Tensor, int], Tensor]) -> None:
        self.local, self.node, self.rotated = local, node, rotated
        self.head = node.all_input_nodes[0] if op_name(node) == "getitem" else node
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.vectors: dict[tuple[Node, int], Tensor] = {}  # scales and shifts

    def run(self) -> str | None:
        """Return what is wrong, as a phrase; None where the rule holds. Raises _NotRun where that cannot be told."""
        if not is_op(self.head):
            raise _NotRun("it is no operator of torch")
        cuts: tuple[dict[Node, dict[int, int]], ...] = ({},)
        if self._bytes({}) > 8 * _LARGE:
            cuts = (self._cut(), {}, self._cut(whole=False))
        reason = "it is too large"
        for cut in cuts:
            if self._bytes(cut) > _MOST_BYTES:
                continue
            for positive in (False, True):
                try:
                    worst = max(self._error(cut, positive, then) for then in self.local.chain(self.node))
                except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, NotImplementedError) as error:
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    continue
                if worst <= _BOUND:
                    return None
                if worst == worst:
                    name = op_name(self.head)
                    return f"{name} does not commute with a rotation here as its rule says (error {worst:.1e})"
                reason = "its results are not finite"
        raise _NotRun(reason)

    # -- values -------------------------------------------------------------------------------------------------------

    def _bytes(self, cut: dict[Node, dict[int, int]]) -> int:
        return sum(
            8 * math.prod(self._shape(source, cut)) for source in self.head.all_input_nodes if self._is_tensor(source)
        )

    @staticmethod
    def _is_tensor(node: Node) -> bool:
        return isinstance(value(node), Tensor)

    def _shape(self, node: Node, cut: dict[Node, dict[int, int]]) -> list[int]:
        sizes = list(self.local.sizes.shape(node))
        for dim, size in cut.get(node, {}).items():
            sizes[dim] = min(size, sizes[dim])
        return sizes

    def _cut(self, whole: bool = True) -> dict[Node, dict[int, int]]:
        """Return the axes of operands that no vector lies along, to be cut; the operator must not name their sizes.

        Axes that it acts on itself (the rows of a table that is looked up) stay ``whole`` where that is possible.
        """
        rule = self.local.rule(self.node)
        if isinstance(rule, Multilinear):
            operands = [o for term in rule.terms for o in term]
            mixed = {o.labels[d] for o in operands for t in self.local.types(o.node, self.node) for d in t.layout.dims}
            mixed |= {rule.out[d] for t in self.local.made(self.node) for d in t.layout.dims}
            mixed |= {None} if whole else set()
            return {o.node: {d: _CUT for d, n in enumerate(o.labels) if n not in mixed} for o in operands}
        if isinstance(rule, Movement):
            types = self.local.types(rule.source, self.node)
            held = {d for t in types for d in t.layout.dims}
            return {rule.source: {d: _CUT for d in range(value(rule.source).ndim) if d not in held}} if types else {}
        return {}

    def _drawn(self, node: Node, cut: dict[Node, dict[int, int]], positive: bool) -> Any:
        val, local = value(node), self.local
        if not isinstance(val, Tensor):
            if val is None:
                raise _NotRun(f"the value of {node.name} is not known")
            return local.sizes.of(val)
        made = drawn(local.editor, node, self._shape(node, cut), self.generator)
        if not (made.is_floating_point() or made.is_complex()):
            return made
        if isinstance(local.rule(node), Zeros):
            return torch.zeros_like(made)
        if positive:
            made = made.abs() + 0.1
        for axis in local.types(node, self.node):
            if local.space.centred and axis.centred and not local.editor.is_weight(node):
                made = axis.layout.apply(made, _centred)
        return made

    # -- the change of basis ------------------------------------------------------------------------------------------

    def _changed(self, tensor: Tensor, types: tuple[AxisType, ...], weight: bool) -> Tensor:
        for axis in types:
            tensor = axis.layout.apply(tensor, lambda x, dim, axis=axis: self._vectors(x, dim, axis, weight))  # type: ignore[misc]
        return tensor

    def _vectors(self, x: Tensor, dim: int, axis: AxisType, weight: bool) -> Tensor:
        pending = axis.pending
        if pending is not None and pending.after and not weight:
            if pending.shift is not None:
                x = x - self._along(pending.shift, 1, axis.layout, dim, x.ndim)
            if pending.scale is not None:
                x = x / self._along(pending.scale, 0, axis.layout, dim, x.ndim)
        elif pending is not None and pending.scale is not None:
            x = x * self._along(pending.scale, 0, axis.layout, dim, x.ndim)
        if self.local.space.centred and not axis.centred:
            x = _centred(x, dim)
        return self.rotated(x, dim)

    def _along(self, node: Node, kind: int, layout: Layout, dim: int, rank: int) -> Tensor:
        """Return a scale or shift with its coordinates on axis ``dim``, and where vectors have one each, these on the
        axis before."""
        if (node, kind) not in self.vectors:
            self.vectors[node, kind] = (
                torch.rand(_count(node), generator=self.generator, dtype=torch.float64, device="cpu") + 0.5
            )
        vector, at = self.vectors[node, kind], dim % rank
        if vector.numel() == 1:
            return vector
        blocks = vector.view(-1, layout.width)
        sizes = [1] * rank
        sizes[at] = layout.width
        if len(blocks) > 1:
            sizes[at - 1] = len(blocks)
        return blocks.view(sizes)

    # -- the two runs -------------------------------------------------------------------------------------------------

    def _error(self, cut: dict[Node, dict[int, int]], positive: bool, then: Node | None) -> float:
        """Return how far the result is from what the rule says, relative to it; NaN where it is not finite."""
        self.generator.manual_seed(0)
        local, node = self.local, self.node
        plain = {source: self._drawn(source, cut, positive) for source in self.head.all_input_nodes}
        for source in plain:  # the operator applies a scale that is pending behind it
            canonical = local.editor.canonical(source) if local.editor.is_constant(source) else None
            for kind, known in ((0, self._pending_scale(node)), (1, self._pending_shift(node))):
                if known is not None and canonical is known and isinstance(plain[source], Tensor):
                    self.vectors[known, kind] = plain[source].flatten()
        rule = local.rule(node)
        if isinstance(rule, Centring):
            mean = plain[rule.source].mean(rule.dims, keepdim=True)
            plain |= {source: mean for source in plain if source is not rule.source}
        weights = {source: local.editor.is_weight(source) for source in plain}
        changed = {
            source: self._changed(given, local.types(source, node), weights[source])
            if isinstance(given, Tensor)
            else given
            for source, given in plain.items()
        }
        found = self._called(plain, then)
        wanted = self._changed(found, local.made(node), local.editor.is_weight(node)) if then is None else found
        got = self._rewritten(plain, changed, found, then)
        return _distance(got, wanted)

    def _pending_scale(self, node: Node) -> Node | None:
        return next((t.pending.scale for t in self._around(node) if t.pending is not None), None)

    def _pending_shift(self, node: Node) -> Node | None:
        return next((t.pending.shift for t in self._around(node) if t.pending is not None and t.pending.shift), None)

    def _around(self, node: Node) -> Iterator[AxisType]:
        """Yield the bases of the result and of the operands."""
        yield from self.local.made(node)
        for source in self.head.all_input_nodes:
            yield from self.local.types(source, node)

    def _called(self, values: dict[Node, Any], then: Node | None) -> Tensor:
        found = self._call(self.head, values)
        if self.head is not self.node:
            found = found[self.node.args[1]]
        if then is not None:
            found = self._call(then, {self.node: found})
        if not isinstance(found, Tensor):
            raise _NotRun("its result is no tensor")
        return found.double() if not found.is_complex() else found

    def _call(self, node: Node, values: dict[Node, Any]) -> Any:
        args, kwargs = lifted(node)

        def of(argument: Node) -> Any:
            return values[argument] if argument in values else self._drawn(argument, {}, False)

        return called(node, map_arg(args, of), map_arg(kwargs, of))

    def _rewritten(self, plain: dict[Node, Any], changed: dict[Node, Any], found: Tensor, then: Node | None) -> Tensor:
        """Return what the operator computes in the rewritten program, where a scale, a shift or a centring is taken out
        of it and a bias may be added."""
        local, node = self.local, self.node
        rule = local.rule(node)
        if isinstance(rule, Normalization):
            return self._normed(rule, changed[rule.source])
        if isinstance(rule, Centring):
            if node not in local.centrings:
                raise _NotRun("its centring stays")
            moved: Tensor = changed[rule.source]
            return moved
        if node in local.scales and isinstance(rule, Multilinear):
            source = next(o.node for term in rule.terms for o in term if not local.editor.is_constant(o.node))
            moved = changed[source].expand(found.shape)
            return moved
        got = self._called(changed, then)
        for shift in local.shifts.get(node, ()):
            weight = plain[shift.weight]
            vector = self.vectors.get((shift.shift, 1))
            if vector is None:
                raise _NotRun("its shift is not known")
            added = weight @ vector if op_name(node) == "aten::linear" else vector @ weight
            got = got + self._changed(added.expand(found.shape), local.made(node), True)
        return got

    def _normed(self, rule: Normalization, x: Tensor) -> Tensor:
        """x / √(mean(x²) + ε), which a norm is behind a centring, without its scale and bias."""
        eps = rule.eps if rule.eps is not None else torch.finfo(torch.float64).eps
        normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return normed


def _centred(x: Tensor, dim: int) -> Tensor:
    centred: Tensor = x - x.mean(dim, keepdim=True)
    return centred


def _distance(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return math.inf
    scale = wanted.abs().max() if wanted.numel() else torch.ones((), device="cpu")
    if not bool(torch.isfinite(wanted).all()):
        return math.nan
    return float((got - wanted).abs().max() / scale.clamp(min=1e-3)) if wanted.numel() else 0.0
