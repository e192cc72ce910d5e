"""Space: what the basis analysis finds, with the edges at which it meets everything else."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from spinpass.graph import Layout


@dataclass(frozen=True)
class Pending:
    """A per-channel scale, perhaps with a shift, that is being moved into constants.

    Attributes:
        after: true behind a norm, where the original value is (this one)·scale + shift; false in front of a layer
            scale, where this one is still to be multiplied by ``scale``.
        scale: a constant node, indexed by the coordinate of the space. None stands for 1.
        shift: likewise. None stands for 0.
        origin: the operator that applies the scale in the original.
    """

    after: bool
    scale: Node | None
    shift: Node | None = None
    origin: Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class AxisType:
    """The basis of an axis: where the space's vectors lie in the tensor, and what is pending on them.

    Attributes:
        layout: where the vectors lie.
        pending: the scale that is being moved past the value.
        centred: the value lies behind a LayerNorm's centring, so that it stays the same when the stream is centred.
        reads: of a constant, whether it contracts the space along this axis.
    """

    layout: Layout
    pending: Pending | None = None
    centred: bool = False
    reads: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Entry:
    """A value that enters the space: it leaves a barrier in the original basis and has to be rotated online.

    Attributes:
        node: the value.
        layout: where the space's vectors lie in it.
        keep: the users that read it in the original basis; all others read it in the space's basis.
        why: what does not commute with a rotation, as a phrase.
        centre: the value has to be centred as well.
        dual: the value stands in products with others of the space, and on the side that has the dual basis: it takes
            R⁻ᵀ rather than R.
    """

    node: Node
    layout: Layout
    keep: tuple[Node, ...]
    why: str
    centre: bool = False
    dual: bool = False


@dataclass(frozen=True)
class Exit:
    """A value that leaves the space and has to be rotated back online.

    Attributes:
        node: the value, which is in the space's basis.
        layout: where the space's vectors lie in it.
        users: the users that need it in the original basis.
        why: what does not commute with a rotation, as a phrase.
    """

    node: Node
    layout: Layout
    users: tuple[Node, ...]
    why: str


@dataclass(frozen=True)
class ConstantUse:
    """A constant with an axis in the space: a reader, which contracts it, or a writer.

    Attributes:
        node: the constant.
        type: where the space's vectors lie in it.
        swapped: its values stand in products with others of the space, and on the side that has the dual basis.
    """

    node: Node
    type: AxisType
    swapped: bool = False

    @property
    def reads(self) -> bool:
        """Return whether the constant contracts the space; otherwise it writes into it."""
        return self.type.reads

    @property
    def dual(self) -> bool:
        """Return whether it takes R⁻ᵀ rather than R: what reads, where its values have the basis, not the dual."""
        return self.reads != self.swapped


@dataclass(frozen=True)
class CacheEdge:
    """A KV cache that enters or leaves the program in the space's basis.

    Attributes:
        node: the value that enters or leaves.
        layout: where the space's vectors lie in it.
        output: the index of the graph's output as which it leaves; None for an input.
    """

    node: Node
    layout: Layout
    output: int | None = None


@dataclass(frozen=True)
class ShiftUse:
    """A linear operator whose input lost a constant shift, so that its result must gain shift · weight.

    Attributes:
        node: the operator.
        operand: its input.
        weight: its weight, a matrix.
        shift: what the input lost, a constant node.
    """

    node: Node
    operand: Node
    weight: Node
    shift: Node


@dataclass(frozen=True)
class Space:
    """All that shares one basis, with every edge accounted for.

    Attributes:
        seed: the value that the walk began with.
        width: how many coordinates the space has.
        members: the values of the space, with the basis of each of their axes that lie in it.
        constants: the constants with an axis in the space.
        entries: where a rotation has to stand in the graph.
        exits: where its inverse has to stand in the graph.
        carried: the KV caches that enter or leave the program in the space's basis.
        scales: multiplications by a norm's or layer's scale, and norm operators with one, to be moved into constants.
        shifts: the linear operators that have to make up for a shift.
        centrings: operators that subtract mean(x), which changes nothing once all writers are centred.
        centred: whether the writers have to be centred.
        kept: constants that stay as they are, and why.
    """

    seed: Node
    width: int
    members: dict[Node, tuple[AxisType, ...]]
    constants: tuple[ConstantUse, ...]
    entries: tuple[Entry, ...]
    exits: tuple[Exit, ...]
    carried: tuple[CacheEdge, ...]
    scales: tuple[Node, ...]
    shifts: tuple[ShiftUse, ...]
    centrings: tuple[Node, ...]
    centred: bool
    kept: dict[Node, str]

    @property
    def online(self) -> tuple[Entry | Exit, ...]:
        """Return the edges at which a rotation, or its inverse, has to stand in the graph."""
        return (*self.entries, *self.exits)

    @property
    def is_offline(self) -> bool:
        """Return whether the rotation folds into constants entirely."""
        return not self.online

    @property
    def writers(self) -> list[Node]:
        """Return the constants that write into the space."""
        return [c.node for c in self.constants if not c.reads]

    @property
    def readers(self) -> list[Node]:
        """Return the constants that contract the space."""
        return [c.node for c in self.constants if c.reads]


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it is.

    Attributes:
        what: the space, rotation or place that it is about.
        why: the reason, as a phrase.
        nodes: the names of the nodes or parameters that are to blame.
    """

    what: str
    why: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f" [{', '.join(self.nodes)}]" if self.nodes else "")
