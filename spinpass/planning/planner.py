"""From spaces to decisions: which rotation each space gets, in which form, and what is left alone and why."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from spinpass.analysis import (
    Attention,
    Carried,
    Entry,
    Linear,
    LinearInputWalk,
    Refusal,
    Space,
    Walk,
    as_linear,
    cache_values,
    find_attention,
    find_down_projections,
    find_linears,
    find_residual_sums,
    normed_value,
    root_of,
    tokens_per_call,
    whole_axis,
)
from spinpass.config import ROLES, Role, RotationConfig
from spinpass.errors import ConfigError
from spinpass.graph import Layout, ProgramEditor, elements, is_float, op_name, shape, value
from spinpass.passes.untie import untie
from spinpass.record import Record
from spinpass.rotations import Rotation

_ONLINE_PER_OFFLINE = 2  # `form="auto"`: an online part in the stream costs as much as that many at inputs of linears
_UNTIE_BELOW = 0.01  # `tied="auto"` unties where that adds less than this share of the constants' bytes


@dataclass(frozen=True)
class OnlinePart:
    """A rotation that stays in the graph: at ``node``, because of ``why``, at ``flops`` per token."""

    node: str
    why: str
    flops: int
    inverse: bool


@dataclass(frozen=True)
class PlannedSpace:
    """One decision, in names and numbers."""

    name: str
    role: Role
    size: int
    form: str
    rotation: Rotation
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    online: tuple[OnlinePart, ...]
    cache: tuple[str, ...]
    bytes_added: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Added floating-point operations per token."""
        return sum(part.flops for part in self.online)


@dataclass(frozen=True)
class Site:
    """A decision with the graph nodes it is about."""

    planned: PlannedSpace
    space: Space

    @property
    def name(self) -> str:
        return self.planned.name


@dataclass(frozen=True)
class RotationPlan:
    """Every decision about a program: what is rotated, in which form and at what cost, and what is refused and why."""

    config: RotationConfig
    spaces: tuple[PlannedSpace, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def flops(self) -> int:
        """Added floating-point operations per token."""
        return sum(s.flops for s in self.spaces)

    @property
    def bytes_added(self) -> int:
        """Bytes of constants that the rotated program has and the original has not."""
        return sum(s.bytes_added for s in self.spaces)

    def without(self, *names: str) -> RotationPlan:
        """The plan with some spaces left alone."""
        unknown = set(names) - {s.name for s in self.spaces}
        if unknown:
            raise ConfigError(
                f"the plan has no space {sorted(unknown)[0]!r}; it has {', '.join(s.name for s in self.spaces)}"
            )
        left_out = tuple(Refusal(n, "left out of the plan") for n in names)
        return replace(
            self, spaces=tuple(s for s in self.spaces if s.name not in names), refusals=self.refusals + left_out
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "config": self.config.to_dict(),
            "flops_per_token": self.flops,
            "bytes_added": self.bytes_added,
            "spaces": [
                {
                    "name": s.name,
                    "rotation": s.role,
                    "size": s.size,
                    "form": s.form,
                    "matrix": str(s.rotation),
                    "fingerprint": s.rotation.fingerprint(),
                    "writers": list(s.writers),
                    "readers": list(s.readers),
                    "cache": list(s.cache),
                    "flops_per_token": s.flops,
                    "bytes_added": s.bytes_added,
                    "notes": list(s.notes),
                    "online": [
                        {"node": p.node, "why": p.why, "flops_per_token": p.flops, "inverse": p.inverse}
                        for p in s.online
                    ],
                }
                for s in self.spaces
            ],
            "refusals": [{"what": r.what, "why": r.why, "nodes": list(r.nodes)} for r in self.refusals],
        }

    def __str__(self) -> str:
        head = ("space", "size", "rotation", "form", "writers", "readers", "online", "FLOP/token", "bytes")
        rows = [
            (
                s.name,
                str(s.size),
                str(s.rotation),
                s.form,
                _short(s.writers),
                _short(s.readers),
                _online_text(s),
                f"{s.flops:,}",
                f"{s.bytes_added:,}",
            )
            for s in self.spaces
        ]
        lines = _table([head, *rows])
        lines += [f"refused  {r}" for r in self.refusals]
        lines.append(
            f"total: {len(self.spaces)} spaces, {self.flops:,} FLOP per token added, {self.bytes_added:,} bytes added"
        )
        return "\n".join(lines)


class Planner:
    """Finds the sites of one rotation at a time. Sites come one by one: apply each before taking the next."""

    def __init__(
        self,
        editor: ProgramEditor,
        config: RotationConfig,
        only: RotationPlan | None = None,
        earlier: Record | None = None,
    ) -> None:
        self.editor = editor
        self.earlier = earlier
        self.config = config
        self.only = None if only is None else {s.name: s for s in only.spaces}
        self.planned: list[PlannedSpace] = []
        self.refusals: list[Refusal] = []
        self.carried: list[tuple[PlannedSpace, Carried]] = []
        self._claims: dict[Node, list[tuple[str, Layout]]] = {}
        self._tokens = tokens_per_call(editor.user_inputs())
        self._bytes = editor.nbytes()
        self._names_seen: set[str] = set()
        editor.check_weights(linear.weight for linear in find_linears(editor))
        self._streams = list(find_residual_sums(editor))
        looked_up = [n for n in editor.nodes if op_name(n) == "aten::embedding" and is_float(n)]
        self._embedding_widths = {w for n in looked_up if isinstance(w := shape(n)[-1], int)}
        self._finders: tuple[tuple[Role, Callable[[], Iterator[Site]]], ...] = (
            ("R1", self._residual),
            ("R2", self._values),
            ("R3", self._queries),
            ("R4", self._down_projections),
            ("heads", self._across_heads),
            ("latent", self._latents),
            ("R1", self._inputs_of_linears),  # last: what costs nothing comes first
        )
        self._stream_widths: set[int] = set()
        self._stream_values: set[Node] = set()
        self._heads = {n for a in find_attention(editor) for n in (a.query, a.key, a.value)}

    def sites(self) -> Iterator[Site]:
        """The sites of all rotations; what is refused is noted in ``refusals``."""
        for role, find in self._finders:
            if role in self.config.rotations:
                yield from find()
        found = {s.role for s in self.planned}
        for role in self.config.rotations:
            if role in _NOTHING and role not in found and not any(r.what.startswith(role) for r in self.refusals):
                self.refusals.append(Refusal(role, _NOTHING[role]))

    def applied(self, site: Site) -> None:
        """The site's passes have run: note the bytes that they, and untying for them, have added."""
        before, self._bytes = self._bytes, self.editor.nbytes()
        at = next(i for i, s in enumerate(self.planned) if s.name == site.name)
        self.planned[at] = replace(self.planned[at], bytes_added=self._bytes - before)

    def plan(self) -> RotationPlan:
        spaces = sorted(self.planned, key=lambda s: ROLES.index(s.role))
        return RotationPlan(self.config, tuple(spaces), tuple(self.refusals))

    # -- R1 ------------------------------------------------------------------------------------------------------------

    def _residual(self) -> Iterator[Site]:
        for space in self._residual_streams():
            if space.readers and self._takes_offline(space):
                site = self._accept("R1", space, "offline")
                if site is not None:
                    yield site

    def _residual_streams(self) -> Iterator[Space]:
        for node in self._streams:
            node = self.editor.current(node)
            if node in self._stream_values or node in self._claims:
                continue
            space = self._stream(node)
            if not space.writers and len(space.readers) <= 1:
                continue  # no stream: what one linear layer reads, a recurrence's states, say
            self._stream_values |= set(space.members)
            if any(n in space.members for n in self._heads):
                continue  # a sum inside attention
            self._stream_widths.add(space.width)
            yield space

    def _stream(self, node: Node) -> Space:
        """The residual stream through a sum; a table that its uses need in two bases is untied or kept, as
        configured.
        """
        layout = whole_axis(node, len(shape(node)) - 1)
        space = Walk(self.editor).grow(node, layout)
        shared = [n for n in space.kept if len(_leaf(self.editor, n).users) > 1]
        if not self._wants_offline or not shared or not self._unties(shared):
            return space
        untie(self.editor, shared)
        return Walk(self.editor).grow(node, layout)

    @property
    def _wants_offline(self) -> bool:
        return "R1" in self.config.rotations and self.config.form != "online"

    def _unties(self, shared: list[Node]) -> bool:
        if self.config.tied != "auto":
            return self.config.tied == "untie"
        added: int = sum(value(n).numel() * value(n).element_size() for n in shared)
        return added < _UNTIE_BELOW * self.editor.nbytes()

    def _takes_offline(self, space: Space) -> bool:
        if self.config.form == "online":
            return False
        if self.config.form == "offline":
            return True
        open_edges = [x for x in space.online if not any(why in x.why for why in space.kept.values())]
        if not open_edges:
            return True
        inputs = self._linear_inputs(space)
        cheap = _ONLINE_PER_OFFLINE * len(open_edges) <= inputs
        if not cheap:
            first = open_edges[0]
            self.refusals.append(
                Refusal(
                    "R1 offline",
                    f"the residual stream needs {_counted(len(space.online), 'online part')} "
                    f"(the first at {first.node.name}: {first.why}), {_counted(inputs, 'input')} of linears would need "
                    "one each; rotated online at the linears' inputs instead",
                    (first.node.name,),
                )
            )
        return cheap

    def _linear_inputs(self, space: Space) -> int:
        """How many rotations the online form of R1 needs in place of this stream."""
        return len({root_of(linear.operand) for linear in find_linears(self.editor)} & space.members.keys())

    def _inputs_of_linears(self) -> Iterator[Site]:
        if self.config.form == "offline":
            return
        widths = self._stream_widths | self._embedding_widths
        done: set[Node] = set()
        for linear in list(find_linears(self.editor)):
            root = root_of(linear.operand)
            if root in done or root in self._claims or shape(root)[-1:] == () or shape(root)[-1] not in widths:
                continue
            if linear.dim != len(shape(linear.operand)) - 1:
                continue
            if self._claimed(linear.weight, whole_axis(linear.weight, linear.weight_dim)):
                continue
            if root not in self._stream_values and normed_value(self.editor, root) is None:
                continue
            done.add(root)
            space = self._linear_input(linear)
            done |= {e.node for e in space.entries}
            if not space.readers:
                why = next(iter(space.kept.values()), "its linears cannot be rotated")
                self._refuse("R1", Refusal(f"R1 at {root.name}", why, tuple(self.editor.fqn(n) for n in space.kept)))
                continue
            site = self._accept("R1", space, "online")
            if site is not None:
                yield site

    def _linear_input(self, linear: Linear) -> Space:
        """The linear layers that read what this one reads; those only that read its operand where not everything that
        is made of the value goes to linear layers.
        """
        root = root_of(linear.operand)
        widens = torch.promote_types(value(root).dtype, value(linear.operand).dtype) != value(root).dtype
        for node in (linear.operand,) if widens else (root, linear.operand):  # never at less precision than it is read
            space = LinearInputWalk(self.editor).grow(node, whole_axis(node, len(shape(node)) - 1))
            if space.readers:
                break
        return space

    # -- R2, R3, R4 ----------------------------------------------------------------------------------------------------

    def _values(self) -> Iterator[Site]:
        for attention in find_attention(self.editor):
            if self._claimed(attention.value, attention.value_layout):
                continue
            space = self._cache_walk(attention.value).grow(attention.value, attention.value_layout)
            if not space.is_offline or not space.writers or not space.readers:
                self._refuse("R2", _open_edge("R2", attention.node, space))
                continue
            site = self._accept("R2", space, "offline")
            if site is not None:
                yield site

    def _queries(self) -> Iterator[Site]:
        for attention in find_attention(self.editor):
            if self._claimed(attention.query, attention.query_layout):
                continue
            space = self._cache_walk(attention.key).grow(attention.query, attention.query_layout)
            if space.exits:
                self._refuse("R3", _open_edge("R3", attention.node, space))
                continue
            site = self._accept("R3", space, "online" if space.entries else "offline", self._attention_name(attention))
            if site is not None:
                yield site

    def _down_projections(self) -> Iterator[Site]:
        for linear in list(find_down_projections(self.editor, self._streams)):
            layout = whole_axis(linear.operand, linear.dim)
            if self._claimed(linear.operand, layout):
                continue
            space = Walk(self.editor).grow(linear.operand, layout)
            if space.exits:  # somebody else reads it: a rotated copy for the linear layer alone
                space = self._linear_input(linear)
            if space.exits or not space.readers:
                self._refuse("R4", _open_edge("R4", linear.node, space))
                continue
            site = self._accept("R4", space, "online" if space.entries else "offline")
            if site is not None:
                yield site

    def _across_heads(self) -> Iterator[Site]:
        """The inputs of the linear layers that read attention: R2 levels every head by itself, this all of them."""
        done: set[Node] = set()
        for attention in find_attention(self.editor):
            reading = set(self._cache_walk(attention.value).grow(attention.value, attention.value_layout).readers)
            for linear in [x for x in find_linears(self.editor) if x.weight in reading - done]:
                layout = whole_axis(linear.operand, linear.dim)
                space = LinearInputWalk(self.editor).grow(linear.operand, layout)
                done |= set(space.readers)
                if linear.dim != len(shape(linear.operand)) - 1 or not space.readers:
                    continue
                site = self._accept("heads", space, "online", over="R2")
                if site is not None:
                    yield site

    def _latents(self) -> Iterator[Site]:
        """Whatever else linear layers write and linear layers read, with nothing but norms between: free of cost."""
        if "R1" not in self.config.rotations:
            deque(self._residual_streams(), maxlen=0)  # the residual stream is left alone then
        open_values: set[Node] = set()  # of spaces that were no latents: from there the same space would grow
        for linear in list(find_linears(self.editor)):
            if root_of(linear.operand) in self._stream_values:
                continue
            seed, dim = linear.operand, linear.dim
            normed = normed_value(self.editor, root_of(seed))
            if normed is not None:  # the space begins in front of the norm, whose scale it passes on
                seed, dim = normed, len(shape(normed)) - 1
            layout = whole_axis(seed, dim)
            block = self.config.settings("latent").block_size or layout.width
            if layout.width == 1 or layout.width % block or seed in open_values or self._claimed(seed, layout):
                continue
            space = Walk(self.editor).grow(seed, layout)
            if not space.is_offline or not space.writers or not space.readers:
                open_values |= space.members.keys()
                continue
            site = self._accept("latent", space, "offline")
            if site is not None:
                yield site

    def _cache_walk(self, operand: Node) -> Walk:
        return Walk(self.editor, cache=cache_values(self.editor, operand) if self.config.cache == "rotated" else ())

    # -- deciding one space --------------------------------------------------------------------------------------------

    def _accept(
        self, role: Role, space: Space, form: str, name: str | None = None, over: Role | None = None
    ) -> Site | None:
        """``over``: the rotation whose blocks this one may lie on top of."""
        writers, readers = self._names(space.writers), self._names(space.readers)
        name = self._unique(f"{role}:{name or self._common_name(role, space, writers, readers)}")
        if self.only is not None and name not in self.only:
            return None
        why = self._objection(name, space, writers + readers, over)
        if why is not None:
            self._refuse(role, Refusal(name, why))
            return None
        rotation = self.only[name].rotation if self.only is not None else self._rotation(name, space.width)
        if rotation.order == 1:
            self._refuse(role, Refusal(name, f"no Hadamard order above 1 divides {space.width}"))
            return None
        parts = [OnlinePart(e.node.name, e.why, self._flops(e.node, rotation), False) for e in space.entries]
        parts += [OnlinePart(x.node.name, x.why, self._flops(x.node, rotation), True) for x in space.exits]
        planned = PlannedSpace(
            name,
            role,
            space.width,
            form,
            rotation,
            tuple(writers),
            tuple(readers),
            tuple(parts),
            tuple(c.node.name if c.output is None else f"output {c.output}" for c in space.carried),
            0,
            tuple(f"{self.editor.fqn(n)} kept: {w}" for n, w in space.kept.items()),
        )
        self.planned.append(planned)
        self.carried += [(planned, c) for c in space.carried]
        for node, types in space.members.items():
            self._claims.setdefault(node, []).extend((name, t.layout) for t in types)
        return Site(planned, space)

    def _refuse(self, role: Role, refusal: Refusal) -> None:
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def _objection(self, name: str, space: Space, fqns: list[str], over: Role | None) -> str | None:
        pattern = self.config.excludes(name, fqns)
        if pattern is not None:
            return f"excluded by {pattern!r}"
        for node, types in space.members.items():
            for other, layout in self._claims.get(node, ()):
                if layout.count > 1 and other.split(":")[0] == over:
                    continue
                if any(layout.overlaps(t.layout) for t in types):
                    return f"{self.editor.fqn(node)} is already rotated by {other}"
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

    def _is_carried_already(self, cache: Carried) -> bool:
        if self.earlier is None:
            return False
        if cache.output is None:
            return cache.node.name in self.earlier.inputs
        return self.editor.user_output_index(cache.output) in self.earlier.outputs

    def _rotation(self, name: str, size: int) -> Rotation:
        matrix = self.config.matrix(name)
        try:
            if matrix is not None:
                rotation = Rotation.from_matrix(matrix, identity=name)
                if rotation.size != size:
                    raise ConfigError(f"the matrix is {rotation.size}×{rotation.size}, the space has size {size}")
                return rotation
            chosen = self.config.settings(name)
            assert chosen.kind is not None and chosen.seed is not None
            return Rotation.create(chosen.kind, size, block_size=chosen.block_size, seed=chosen.seed, identity=name)
        except ConfigError as error:
            raise ConfigError(
                f"{name}: {error}; give this space settings of its own in `overrides`, or leave it out with `exclude`"
            ) from error

    def _flops(self, node: Node, rotation: Rotation) -> int:
        return rotation.flops * max(1, elements(node) // rotation.size // self._tokens)

    # -- names ---------------------------------------------------------------------------------------------------------

    def _names(self, nodes: list[Node]) -> list[str]:
        return sorted({self.editor.fqn(_leaf(self.editor, n)) for n in nodes})

    def _common_name(self, role: Role, space: Space, writers: list[str], readers: list[str]) -> str:
        if role == "R1" and writers:
            return "residual"
        across_weights = writers + readers if role in ("R2", "R3") else readers
        return _common_prefix(across_weights) or space.seed.name

    def _attention_name(self, attention: Attention) -> str:
        """The parameters that the queries and keys are computed with name the space, in every program made of the
        model.
        """
        found: list[str] = []
        todo, seen = [attention.query], set()
        while todo:
            node = todo.pop(0)
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            linear = as_linear(self.editor, node)
            if linear is not None:
                found.append(self.editor.fqn(_leaf(self.editor, linear.weight)))
            else:
                todo += [n for n in node.all_input_nodes if not self.editor.is_constant(n)]
        return _common_prefix([os.path.splitext(found[0])[0].rsplit(".", 1)[0] + "."]) if found else attention.node.name

    def _unique(self, name: str) -> str:
        unique, k = name, 2
        while unique in self._names_seen:
            unique, k = f"{name}#{k}", k + 1
        self._names_seen.add(unique)  # accepted or not: a space left out must not pass its name on
        return unique

    def _claimed(self, node: Node, layout: Layout) -> bool:
        return any(held.overlaps(layout) for _, held in self._claims.get(node, ()))


def _leaf(editor: ProgramEditor, node: Node) -> Node:
    while not editor.is_stored(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _open_edge(role: Role, node: Node, space: Space) -> Refusal:
    edge = next(iter(space.online), None)
    if edge is None:
        missing = "writes into it" if not space.writers else "reads it"
        return Refusal(f"{role} at {node.name}", f"no linear layer {missing}", (node.name,))
    return Refusal(f"{role} at {node.name}", edge.why, (edge.node.name,))


def _common_prefix(names: list[str]) -> str:
    """The module that all the parameters belong to; a single parameter names its own module."""
    paths = [n.split(".")[:-1] for n in names]
    prefix: list[str] = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _short(names: tuple[str, ...]) -> str:
    if len(names) <= 2:
        return ", ".join(names) or "–"
    return f"{names[0]}, … ({len(names)})"


def _online_text(space: PlannedSpace) -> str:
    parts = (
        [f"{len(space.online)} Hadamard{'s' * (len(space.online) != 1)}: {space.online[0].why}"] if space.online else []
    )
    parts += [f"cache: {', '.join(space.cache)}"] if space.cache else []
    return "; ".join(parts + list(space.notes)) or "none"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]


_NOTHING: dict[Role, str] = {
    "R1": "the program has no residual stream that linear layers write into and read through norms",
    "R2": "the program has no attention whose values come from and go to linear layers",
    "R3": "the program has no attention that contracts queries with keys",
    "R4": "the program has no linear layer that reads a nonlinearity",
    "heads": "the program has no linear layer that reads several heads of attention at once",
}
