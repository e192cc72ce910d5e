"""From candidates to decisions: which rotation each space gets, and what is left alone and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch.fx import Node

from spinpass.analysis import (
    Admitted,
    CacheEdge,
    Entry,
    Gate,
    Heads,
    Refusal,
    Space,
    SpotCheck,
    admitted_by,
    by_heads,
    find_linears,
    head_count,
    rule_of,
    tokens_per_call,
)
from spinpass.certificate import BOUNDS
from spinpass.config import ROLES, Role, RotationConfig
from spinpass.errors import ConfigError
from spinpass.graph import ProgramEditor, elements, is_region, op_name, value
from spinpass.record import Record
from spinpass.rotations import Rotation, rotation_by

from .candidates import Candidate, Candidates
from .claims import Claims
from .names import common_name, parameter_names
from .plan import RotationPlan
from .planned import Fold, OfferedSpace, OnlinePart, PlannedSpace, Site, UntieRequest


class Planner:
    """The planner decides about candidates, one at a time.

    It edits nothing: whoever iterates over :meth:`edits` carries out each edit before taking the next, and reports an
    applied site by :meth:`applied`.

    Args:
        editor: the program, functional.
        config: what is asked for.
        only: a plan whose spaces alone are taken, with its rotations; what it refuses stays refused.
        earlier: what a program that was rotated before says of itself.
        parameters: the shapes of the program's parameters by name.

    Raises:
        ConfigError: ``only`` was made for other parameters.
        QuantizedWeightError: the weight of a linear layer is unpacked from integers inside the program.
    """

    def __init__(
        self,
        editor: ProgramEditor,
        config: RotationConfig,
        only: RotationPlan | None = None,
        earlier: Record | None = None,
        parameters: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        if only is not None:
            only.check_parameters(parameters)
        self.editor = editor
        self._parameters = dict(parameters)
        self._spot_check = SpotCheck(editor)
        self.earlier = earlier
        self.config = config
        self.only = None if only is None else {s.name: s for s in only.spaces}
        self.planned: list[PlannedSpace] = []
        self.refusals: list[Refusal] = [] if only is None else list(only.refusals)
        self.offers: list[OfferedSpace] = []
        self.carried: list[tuple[PlannedSpace, CacheEdge]] = []
        self._claims = Claims()
        self._tokens = tokens_per_call(editor.user_inputs())
        self._bytes = editor.nbytes()
        self._names_seen: set[str] = set()
        editor.check_weights(linear.weight for linear in find_linears(editor))

    def edits(self) -> Iterator[Site | UntieRequest]:
        """Yield what is to be done to the program, in order; what is refused is noted in ``refusals``.

        Raises:
            ConfigError: a setting, or a matrix of the user's, does not fit a space, or fits none.
        """
        for found in Candidates(self.editor, self.config, self._claims):
            match found:
                case UntieRequest():
                    yield found
                case Refusal():
                    self._refuse(found)
                case Candidate():
                    site = self._accept(found)
                    if site is not None:
                        yield site
        accepted = {s.role for s in self.planned}
        for role in self.config.rotations:
            if role in _NOTHING and role not in accepted and not any(r.what.startswith(role) for r in self.refusals):
                self.refusals.append(Refusal(role, _NOTHING[role]))
        for node in filter(is_region, self.editor.nodes):
            what = f"{op_name(node)} at {node.name}"
            self.refusals.append(Refusal(what, "what it runs is a program of its own, not looked into", (node.name,)))
        if self.only is None:
            self.config.check_used(self._names_seen, self.editor.parameter_names())

    def applied(self, site: Site) -> None:
        """Note the bytes that the site's passes, which have run, and untying for them have added."""
        before, self._bytes = self._bytes, self.editor.nbytes()
        at = next(i for i, s in enumerate(self.planned) if s.name == site.name)
        self.planned[at] = replace(self.planned[at], bytes_added=self._bytes - before)

    def plan(self) -> RotationPlan:
        """Return the decisions so far, in the order of the rotations."""
        spaces = sorted(self.planned, key=lambda s: ROLES.index(s.role))
        return RotationPlan(self.config, tuple(spaces), tuple(self.refusals), self._parameters, tuple(self.offers))

    # -- one candidate -------------------------------------------------------------------------------------------------

    def _accept(self, candidate: Candidate) -> Site | None:
        """Decide about a candidate: return the site, or note the refusal and return None."""
        role, space = candidate.role, candidate.space
        writers, readers = parameter_names(self.editor, space.writers), parameter_names(self.editor, space.readers)
        place = sum(seen.split(":")[0] == role for seen in self._names_seen)
        name = self._unique(f"{role}:{candidate.name or common_name(role, space, writers, readers)}")
        if self.only is not None:
            if name not in self.only:
                return None
            _check_replayed(self.only[name], candidate)
        why = self._objection(name, space, writers + readers, candidate.over)
        if why is not None:
            self._refuse(Refusal(name, why))
            return None
        admitted = _admitted_by_gate(candidate.gate) if candidate.gate else admitted_by(self.editor, space, rule_of)
        if candidate.gate and self.only is None and self.config.matrix(name, place) is None:
            what = _SCALES_AND_ORDERS if admitted.group == "diagonal" else _ORDERS
            self._refuse(Refusal(name, f"it takes {what} of yours, from `matrices`: {admitted.why}"))
            self.offers.append(OfferedSpace(name, space.width, admitted.group))
            return None
        rotation = self.only[name].rotation if self.only is not None else self._rotation(name, space.width, place)
        sides = admitted.sides
        space = replace(space, constants=sides.constants or space.constants, entries=sides.entries or space.entries)
        heads = self._heads(candidate)
        each: tuple[Space, ...] = (space,)
        if candidate.gate:
            each, space = candidate.gate.parts, _folded_at_gate(name, rotation, candidate.gate)
        elif rotation.is_by_heads:
            each, space = self._by_heads(name, rotation, space, candidate)
        checks = [self._spot_check(part) for part in each]
        for checked in checks:
            if checked.fault is not None:
                self._refuse(Refusal(name, checked.fault.why, (checked.fault.node.name,)))
                return None
        _check_admitted(name, rotation, admitted, space)
        if rotation.order == 1 and not rotation.is_offline:
            self._refuse(Refusal(name, f"no Hadamard order above 1 divides {space.width}"))
            return None
        parts = [OnlinePart(e.node.name, e.why, self._flops(e.node, rotation), False) for e in space.entries]
        parts += [OnlinePart(x.node.name, x.why, self._flops(x.node, rotation), True) for x in space.exits]
        planned = PlannedSpace(
            name=name,
            role=role,
            size=space.width,
            form=candidate.form,
            rotation=rotation,
            writers=tuple(parameter_names(self.editor, space.writers)),
            readers=tuple(parameter_names(self.editor, space.readers)),
            online=tuple(parts),
            cache=tuple(c.node.name if c.output is None else f"output {c.output}" for c in space.carried),
            bytes_added=0,
            group=admitted.group,
            admits=admitted.why,
            heads=heads,
            folds=tuple(Fold(self.editor.fqn(c.node), c.type.layout, c.dual) for c in space.constants),
            notes=(*(f"{self.editor.fqn(n)} kept: {w}" for n, w in space.kept.items()), *checks[0].unchecked),
        )
        self.planned.append(planned)
        self.carried += [(planned, c) for c in space.carried]
        if not candidate.gate:  # whatever is folded later lies on top of it
            self._claims.take(name, space)
        return Site(planned, space)

    def _heads(self, candidate: Candidate) -> int:
        """Return how many matrices a space takes, one for each head; 1 where heads cannot be told apart."""
        space = candidate.space
        if candidate.role not in _OF_HEADS or not space.is_offline:
            return 1
        return head_count(self.editor, space)

    def _by_heads(
        self, name: str, rotation: Rotation, space: Space, candidate: Candidate
    ) -> tuple[tuple[Space, ...], Space]:
        """Return the spaces of the heads of a space, and one of all of them side by side.

        Raises ConfigError: the heads cannot have matrices of their own, or there are more of them, or fewer.
        """
        found: Heads | str = "heads are those of values, or of queries and keys, where everything folds"
        if candidate.role in _OF_HEADS and space.is_offline:
            found = by_heads(self.editor, space)
        if isinstance(found, str):
            raise ConfigError(
                f"{name}: there is a matrix for each of {rotation.size // rotation.order} heads, and here all have to "
                f"share one: {found}; give one of size {candidate.space.width}"
            )
        if found.whole.width != rotation.size:
            given = rotation.size // rotation.order
            raise ConfigError(
                f"{name}: there are matrices for {given} head{'s' * (given != 1)}, and {len(found.parts)} key/value "
                "heads: give one for each"
            )
        return found.parts, found.whole

    def _refuse(self, refusal: Refusal) -> None:
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def _objection(self, name: str, space: Space, fqns: list[str], over: Role | None) -> str | None:
        """Return why the space must not be rotated, or None where nothing speaks against it."""
        pattern = self.config.excludes(name, fqns)
        if pattern is not None:
            return f"excluded by {pattern!r}"
        conflict = self._claims.conflict(space, over)
        if conflict is not None:
            return f"{self.editor.fqn(conflict[0])} is already rotated by {conflict[1]}"
        for cache in space.carried:
            if self._is_carried_already(cache):
                return f"the cache at {cache.node.name} is in a rotated basis already"
        edges = [e.node for e in space.online]
        for node in edges:
            if edges.count(node) > 1:
                return f"two axes of {node.name} would have to be rotated online"
        for edge in space.online:
            if isinstance(edge, Entry) and edge.centre and edge.layout.count > 1:
                return f"{edge.node.name} holds several vectors on one axis, which would have to be centred one by one"
            if not edge.layout.is_contiguous:
                return f"an online rotation at {edge.node.name} would have to gather its channels ({edge.layout})"
        return None

    def _is_carried_already(self, cache: CacheEdge) -> bool:
        """Return whether an earlier rotation has put the cache into a basis of its own."""
        if self.earlier is None:
            return False
        if cache.output is None:
            return cache.node.name in self.earlier.inputs
        return self.editor.user_output_index(cache.output) in self.earlier.outputs

    def _rotation(self, name: str, size: int, place: int) -> Rotation:
        matrix = self.config.matrix(name, place)
        if matrix is not None:
            try:
                return _of_size(rotation_by(matrix, name), size)
            except ConfigError as error:
                raise ConfigError(
                    f"{name}: {error}; give another one in `matrices`, or leave the space out with `exclude`"
                ) from error
        try:
            chosen = self.config.settings(name)
            assert chosen.kind is not None and chosen.seed is not None
            return Rotation.create(chosen.kind, size, block_size=chosen.block_size, seed=chosen.seed, identity=name)
        except ConfigError as error:
            raise ConfigError(
                f"{name}: {error}; give this space settings of its own in `overrides`, or leave it out with `exclude`"
            ) from error

    def _flops(self, node: Node, rotation: Rotation) -> int:
        """Return the floating-point operations per token of rotating the value online."""
        return rotation.flops * max(1, elements(node) // rotation.size // self._tokens)

    def _unique(self, name: str) -> str:
        """Return the name, with a number behind it where a space has had it already."""
        unique, k = name, 2
        while unique in self._names_seen:
            unique, k = f"{name}#{k}", k + 1
        self._names_seen.add(unique)  # accepted or not: a space left out must not pass its name on
        return unique


def _of_size(rotation: Rotation, size: int) -> Rotation:
    """Return a rotation of the user's. Raises ConfigError: it is of another size than the space."""
    if rotation.is_by_heads:
        if rotation.order != size:
            raise ConfigError(f"the matrices of heads are of size {rotation.order}, the space has size {size}")
    elif rotation.size != size:
        vector = f"{rotation.size} numbers are given"
        what = vector if rotation.is_offline else f"the matrix is {rotation.size}×{rotation.size}"
        raise ConfigError(f"{what}, the space has size {size}")
    return rotation


def _check_replayed(planned: PlannedSpace, candidate: Candidate) -> None:
    """Raise ConfigError where a space is another one than in the plan that is carried out."""
    rotation = planned.rotation
    for what, here, there in (
        ("size", candidate.space.width, rotation.order if rotation.is_by_heads else planned.size),
        ("form", candidate.form, planned.form),
    ):
        if here != there:
            raise ConfigError(
                f"the plan is of another program: {planned.name} has {what} {here} here and {there} in the plan; plan "
                "this program anew, or give the one that the plan was made for"
            )


def _admitted_by_gate(gate: Gate) -> Admitted:
    """Return what channels that are computed one by one admit."""
    if gate.scaled is None:
        return Admitted("permutation", "what is computed of its channels one by one is linear in no operand")
    return Admitted("diagonal", "it is linear in one operand, which takes scales, and all operands take one order")


def _folded_at_gate(name: str, rotation: Rotation, gate: Gate) -> Space:
    """Return the space that takes scales, or the one that takes an order. Raises ConfigError: the matrix is neither."""
    if rotation.kind == "permutation":
        return gate.permuted
    if rotation.kind == "blocks" and rotation.order == 1 and gate.scaled is not None:
        return gate.scaled
    what = _ORDERS if gate.scaled is None else _SCALES_AND_ORDERS
    raise ConfigError(f"{name}: {rotation} does not pass channels that are computed one by one; give {what}")


def _check_admitted(name: str, rotation: Rotation, admitted: Admitted, space: Space) -> None:
    """Raise ConfigError for a matrix that a space does not admit, or whose rounding would be felt."""
    if rotation.is_offline and space.online:
        raise ConfigError(
            f"{name}: {rotation} can be folded and not run, and here {space.online[0].node.name} needs it online "
            f"({space.online[0].why}); give a matrix of size {space.width}"
        )
    if rotation.is_orthogonal:
        return
    if admitted.group == "orthogonal":
        raise ConfigError(
            f"{name}: the matrix is not orthogonal, and here only orthogonal ones change nothing: {admitted.why}; give "
            "an orthogonal one, or leave the space out with `exclude`"
        )
    values = {value(node).dtype for node in space.members} & BOUNDS.keys()
    dtype = min(values, key=lambda d: (d.itemsize, torch.finfo(d).max), default=torch.float64)
    if not rotation.largest <= torch.finfo(dtype).max:
        raise ConfigError(
            f"{name}: the matrix or its inverse has values up to {rotation.largest:.1e}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:.1e}: give one whose scale is nearer to 1"
        )
    if not rotation.condition * torch.finfo(dtype).eps <= BOUNDS[dtype]:  # what is folded is stored in it
        raise ConfigError(
            f"{name}: the matrix has a condition number of {rotation.condition:.1e}, by which rounding of {dtype} "
            f"grows above the {BOUNDS[dtype]:.0e} that a certificate allows: give one nearer to orthogonal"
        )


_ORDERS = "an order of channels (integers)"
_SCALES_AND_ORDERS = f"a scale for each channel (a vector), or {_ORDERS}"
_OF_HEADS: tuple[Role, ...] = ("R2", "R3")
_NOTHING: dict[Role, str] = {
    "R1": "the program has no residual stream that linear layers write into and read through norms",
    "R2": "the program has no attention whose values come from and go to linear layers",
    "R3": "the program has no attention that contracts queries with keys",
    "R4": "the program has no linear layer that reads a nonlinearity",
    "heads": "the program has no linear layer that reads several heads of attention at once",
    "gates": "the program has no linear layer that reads channels computed one by one",
}
