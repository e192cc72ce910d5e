"""What the basis analysis finds: a space, and the edges at which it meets everything else."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from spinpass.graph import Layout


@dataclass(frozen=True)
class Pending:
    """A per-channel scale (and shift) that is being moved into constants.

    ``after``: the original value is (this one)·scale + shift (behind a norm); otherwise this one is to be multiplied by
    ``scale`` (in front of a layer scale). ``scale`` and ``shift`` are constant nodes, indexed by the space's
    coordinate.
    """

    after: bool
    scale: Node | None
    shift: Node | None = None
    origin: Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class AxisType:
    """The basis of an axis: where the space's vectors lie in the tensor, and what is pending on them.

    ``centred``: the value stays the same when the whole stream is centred (it lies behind a LayerNorm's centring).
    """

    layout: Layout
    pending: Pending | None = None
    centred: bool = False
    reads: bool = field(default=False, compare=False)  # of a constant: it contracts the space along this axis


@dataclass(frozen=True)
class Entry:
    """``node`` leaves a barrier in the original basis; all its users but ``keep`` read it in the space's basis."""

    node: Node
    layout: Layout
    keep: tuple[Node, ...]
    why: str
    centre: bool = False


@dataclass(frozen=True)
class Exit:
    """``users`` need ``node``, a value of the space, in the original basis."""

    node: Node
    layout: Layout
    users: tuple[Node, ...]
    why: str


@dataclass(frozen=True)
class ConstantUse:
    """A constant with an axis in the space: a reader, which contracts it, or a writer."""

    node: Node
    type: AxisType

    @property
    def reads(self) -> bool:
        return self.type.reads


@dataclass(frozen=True)
class CacheEdge:
    """A KV cache that enters or leaves the program in the space's basis."""

    node: Node
    layout: Layout
    output: int | None = None


@dataclass(frozen=True)
class ShiftUse:
    """A linear operator whose input lost a constant shift: its result must gain ``shift`` contracted with its
    weight.
    """

    node: Node
    operand: Node
    weight: Node
    shift: Node


@dataclass(frozen=True)
class Space:
    """All that shares one basis, with every edge accounted for."""

    seed: Node
    width: int
    members: dict[Node, tuple[AxisType, ...]]
    constants: tuple[ConstantUse, ...]
    entries: tuple[Entry, ...]
    exits: tuple[Exit, ...]
    carried: tuple[CacheEdge, ...]
    scales: tuple[
        Node, ...
    ]  # multiplications by a norm's or layer's scale, and norm operators with one, to be moved into constants
    shifts: tuple[ShiftUse, ...]
    centrings: tuple[Node, ...]  # x − mean(x), which are identities once all writers are centred
    centred: bool
    kept: dict[Node, str]  # constants that stay as they are, and why

    @property
    def online(self) -> tuple[Entry | Exit, ...]:
        """Where a rotation, or its inverse, has to stand in the graph."""
        return (*self.entries, *self.exits)

    @property
    def is_offline(self) -> bool:
        return not self.online

    @property
    def writers(self) -> list[Node]:
        return [c.node for c in self.constants if not c.reads]

    @property
    def readers(self) -> list[Node]:
        return [c.node for c in self.constants if c.reads]


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it is, and the nodes it is about."""

    what: str
    why: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f" [{', '.join(self.nodes)}]" if self.nodes else "")
