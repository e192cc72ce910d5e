"""Where rotations could go: one generator for each rotation, which finds candidates and edits nothing.

Candidates come one by one, because finding one looks at what was accepted before it and at the graph as it is by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from spinpass.analysis import (
    Gate,
    Linear,
    LinearInputWalk,
    Refusal,
    Space,
    Walk,
    cache_values,
    find_attention,
    find_down_projections,
    find_gate,
    find_linears,
    find_residual_sums,
    normed_value,
    root_of,
    whole_axis,
)
from spinpass.config import Role, RotationConfig
from spinpass.graph import ProgramEditor, is_float, op_name, shape, value

from .claims import Claims
from .names import attention_name, leaf
from .planned import UntieRequest

_ONLINE_PER_OFFLINE = 2  # ``form="auto"``: an online part in the stream counts as that many at inputs of linears
_UNTIE_BELOW = 0.01  # ``tied="auto"`` unties where that adds less than this share of the constants' bytes


@dataclass(frozen=True)
class Candidate:
    """A space that could be rotated.

    Attributes:
        role: the rotation that it would be.
        space: the space, every edge accounted for.
        form: ``offline`` or ``online``.
        name: what the space is called where its parameters do not say so.
        over: the rotation whose blocks this one may lie on top of.
        gate: what it is, where it is no space of one value.
    """

    role: Role
    space: Space
    form: str
    name: str | None = None
    over: Role | None = None
    gate: Gate | None = None


Found = Candidate | Refusal | UntieRequest


class Candidates:
    """The candidates of all rotations that a configuration asks for.

    Args:
        editor: the program, functional.
        config: what is asked for.
        claims: what was accepted so far. Whoever iterates keeps it up to date.
    """

    def __init__(self, editor: ProgramEditor, config: RotationConfig, claims: Claims) -> None:
        self.editor, self.config, self.claims = editor, config, claims
        self._streams = list(find_residual_sums(editor))
        looked_up = [n for n in editor.nodes if op_name(n) == "aten::embedding" and is_float(n)]
        self._embedding_widths = {w for n in looked_up if isinstance(w := shape(n)[-1], int)}
        self._stream_widths: set[int] = set()
        self._stream_values: set[Node] = set()
        self._heads = {n for a in find_attention(editor) for n in (a.query, a.key, a.value)}
        self._finders: tuple[tuple[Role, Callable[[], Iterator[Found]]], ...] = (
            ("R1", self._residual),
            ("R2", self._values),
            ("R3", self._queries),
            ("gates", self._gates),
            ("R4", self._down_projections),
            ("heads", self._across_heads),
            ("latent", self._latents),
            ("R1", self._inputs_of_linears),  # last: what costs nothing comes first
        )

    def __iter__(self) -> Iterator[Found]:
        for role, find in self._finders:
            if role in self.config.rotations:
                yield from find()

    # -- R1 ------------------------------------------------------------------------------------------------------------

    def _residual(self) -> Iterator[Found]:
        read, unread = False, []
        for found in self._residual_streams():
            if isinstance(found, UntieRequest):
                yield found
            elif found.readers:
                read = True
                refusal = self._offline_refusal(found)
                if refusal is not None:
                    yield refusal
                elif self.config.form != "online":
                    yield Candidate("R1", found, "offline")
            elif found.writers and found.exits:
                unread.append(found)
        if unread and not read and self.config.form != "online":
            yield _unread(unread[0])

    def _residual_streams(self) -> Iterator[Space | UntieRequest]:
        """Yield every residual stream; a table that its uses need in two bases is untied or kept, as configured."""
        for node in self._streams:
            node = self.editor.current(node)
            if node in self._stream_values or node in self.claims or node in self._heads:
                continue  # the stream of a sum before, or inside attention
            space = self._stream(node)
            shared = [n for n in space.kept if len(leaf(self.editor, n).users) > 1]
            if self._wants_offline and shared and self._unties(shared):
                yield UntieRequest(tuple(shared))
                space = self._stream(node)
            if not space.writers and len(space.readers) <= 1:
                continue  # no stream: what one linear layer reads, a recurrence's states, for example
            self._stream_values |= set(space.members)
            if any(n in space.members for n in self._heads):
                continue  # inside attention, where it takes more than the sum to be a head
            self._stream_widths.add(space.width)
            yield space

    def _stream(self, node: Node) -> Space:
        return Walk(self.editor).grow(node, whole_axis(node, len(shape(node)) - 1))

    @property
    def _wants_offline(self) -> bool:
        return "R1" in self.config.rotations and self.config.form != "online"

    def _unties(self, shared: list[Node]) -> bool:
        """Return whether the configuration unties these constants."""
        if self.config.tied != "auto":
            return self.config.tied == "untie"
        added: int = sum(value(n).numel() * value(n).element_size() for n in shared)
        return added < _UNTIE_BELOW * self.editor.nbytes()

    def _offline_refusal(self, space: Space) -> Refusal | None:
        """Return why ``form="auto"`` leaves the stream to the online form.

        Return None where it does not, or where another form is asked for.
        """
        if self.config.form != "auto":
            return None
        open_edges = [x for x in space.online if not any(why in x.why for why in space.kept.values())]
        inputs = self._linear_inputs(space) if open_edges else 0
        if _ONLINE_PER_OFFLINE * len(open_edges) <= inputs:
            return None
        first = open_edges[0]
        return Refusal(
            "R1 offline",
            f"the residual stream needs {_counted(len(space.online), 'online part')} "
            f"(the first at {first.node.name}: {first.why}), {_counted(inputs, 'input')} of linears would need "
            "one each; rotated online at the linears' inputs instead",
            (first.node.name,),
        )

    def _linear_inputs(self, space: Space) -> int:
        """Return how many rotations the online form of R1 needs in place of this stream."""
        return len({root_of(linear.operand) for linear in find_linears(self.editor)} & space.members.keys())

    def _inputs_of_linears(self) -> Iterator[Found]:
        if self.config.form == "offline":
            return
        widths = self._stream_widths | self._embedding_widths
        done: set[Node] = set()
        for linear in list(find_linears(self.editor)):
            root = root_of(linear.operand)
            if root in done or root in self.claims or shape(root)[-1:] == () or shape(root)[-1] not in widths:
                continue
            if linear.dim != len(shape(linear.operand)) - 1:
                continue
            if self.claims.overlap(linear.weight, whole_axis(linear.weight, linear.weight_dim)):
                continue
            if root not in self._stream_values and normed_value(self.editor, root) is None:
                continue
            done.add(root)
            space = self._linear_input(linear)
            done |= {e.node for e in space.entries}
            if space.readers:
                yield Candidate("R1", space, "online")
            else:
                why = next(iter(space.kept.values()), "its linears cannot be rotated")
                yield Refusal(f"R1 at {root.name}", why, tuple(self.editor.fqn(n) for n in space.kept))

    def _linear_input(self, linear: Linear) -> Space:
        """Return the space of the linear layers that read what this one reads.

        Where not everything that is made of the value goes to linear layers, it is that of those that read the very
        operand of this one.
        """
        root = root_of(linear.operand)
        widens = torch.promote_types(value(root).dtype, value(linear.operand).dtype) != value(root).dtype
        for node in (linear.operand,) if widens else (root, linear.operand):  # never at less precision than it is read
            space = LinearInputWalk(self.editor).grow(node, whole_axis(node, len(shape(node)) - 1))
            if space.readers:
                break
        return space

    # -- R2, R3, R4, heads, latents ------------------------------------------------------------------------------------

    def _values(self) -> Iterator[Found]:
        for attention in find_attention(self.editor):
            if self.claims.overlap(attention.value, attention.value_layout):
                continue
            space = self._cache_walk(attention.value).grow(attention.value, attention.value_layout)
            if space.is_offline and space.writers and space.readers:
                yield Candidate("R2", space, "offline")
            else:
                yield _open_edge("R2", attention.node, space)

    def _queries(self) -> Iterator[Found]:
        for attention in find_attention(self.editor):
            if self.claims.overlap(attention.query, attention.query_layout):
                continue
            space = self._cache_walk(attention.key).grow(attention.query, attention.query_layout)
            if space.exits or not space.members:
                yield _open_edge("R3", attention.node, space)
            else:
                form = "online" if space.entries else "offline"
                yield Candidate("R3", space, form, attention_name(self.editor, attention))

    def _gates(self) -> Iterator[Found]:
        done: set[Node] = set()
        for linear in list(find_down_projections(self.editor, self._streams)):
            gate = find_gate(self.editor, linear)
            if isinstance(gate, str):
                yield Refusal(f"gates at {linear.node.name}", gate, (linear.node.name,))
            elif gate.permuted.seed not in done:
                done.add(gate.permuted.seed)
                yield Candidate("gates", gate.permuted, "offline", gate=gate)

    def _down_projections(self) -> Iterator[Found]:
        for linear in list(find_down_projections(self.editor, self._streams)):
            layout = whole_axis(linear.operand, linear.dim)
            if self.claims.overlap(linear.operand, layout):
                continue
            space = Walk(self.editor).grow(linear.operand, layout)
            if space.exits:  # somebody else reads it: a rotated copy for the linear layer alone
                space = self._linear_input(linear)
            if space.exits or not space.readers:
                yield _open_edge("R4", linear.node, space)
            else:
                yield Candidate("R4", space, "online" if space.entries else "offline")

    def _across_heads(self) -> Iterator[Found]:
        """Yield the inputs of the linear layers that read attention: R2 levels each head by itself, this levels all."""
        done: set[Node] = set()
        for attention in find_attention(self.editor):
            reading = set(self._cache_walk(attention.value).grow(attention.value, attention.value_layout).readers)
            for linear in [x for x in find_linears(self.editor) if x.weight in reading - done]:
                layout = whole_axis(linear.operand, linear.dim)
                space = LinearInputWalk(self.editor).grow(linear.operand, layout)
                done |= set(space.readers)
                if linear.dim == len(shape(linear.operand)) - 1 and space.readers:
                    yield Candidate("heads", space, "online", over="R2")

    def _latents(self) -> Iterator[Found]:
        """Yield what else linear layers write and read with nothing but norms between: rotating it costs nothing."""
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
            if layout.width == 1 or layout.width % block or seed in open_values or self.claims.overlap(seed, layout):
                continue
            space = Walk(self.editor).grow(seed, layout)
            if space.is_offline and space.writers and space.readers:
                yield Candidate("latent", space, "offline")
            else:
                open_values |= space.members.keys()

    def _cache_walk(self, operand: Node) -> Walk:
        return Walk(self.editor, cache=cache_values(self.editor, operand) if self.config.cache == "rotated" else ())


def _open_edge(role: Role, node: Node, space: Space) -> Refusal:
    """Return the refusal that names the first edge of the space that stays open."""
    edge = next(iter(space.online), None)
    if edge is None:
        missing = "writes into it" if not space.writers else "reads it"
        return Refusal(f"{role} at {node.name}", f"no linear layer {missing}", (node.name,))
    return Refusal(f"{role} at {node.name}", edge.why, (edge.node.name,))


def _unread(space: Space) -> Refusal:
    """Return the refusal of a stream that linear layers write into, and that reaches none that reads it."""
    first = space.exits[0]
    what = "linear layers write into the residual stream, and no linear layer can read it rotated"
    return Refusal("R1 offline", f"{what}: {first.why} at {first.node.name}", (first.node.name,))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
