"""One decision of a plan, in names and numbers, and with the graph nodes that it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch.fx import Node

from spinpass.analysis import Group, Space
from spinpass.config import ROLES, Role
from spinpass.errors import ConfigError
from spinpass.graph import Layout
from spinpass.rotations import Rotation
from spinpass.values import Fields


@dataclass(frozen=True)
class OnlinePart:
    """A rotation that stays in the graph.

    Attributes:
        node: the name of the node behind which it stands.
        why: the reason for which it cannot be folded.
        flops: the floating-point operations it adds per token.
        inverse: whether it is the inverse rotation, at an exit of the space.
    """

    node: str
    why: str
    flops: int
    inverse: bool

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {"node": self.node, "why": self.why, "flops_per_token": self.flops, "inverse": self.inverse}

    @staticmethod
    def from_dict(data: Fields) -> OnlinePart:
        """Read what :meth:`to_dict` has written. Raises ConfigError where a field is missing or wrong."""
        return OnlinePart(data.text("node"), data.text("why"), data.count("flops_per_token"), data.flag("inverse"))


@dataclass(frozen=True)
class Fold:
    """A constant that takes up a rotation.

    Attributes:
        constant: the name of the parameter.
        layout: where vectors of the space lie in it.
        dual: it takes R⁻ᵀ, as what contracts the space does; otherwise R, as what writes into it does.
    """

    constant: str
    layout: Layout
    dual: bool


@dataclass(frozen=True)
class PlannedSpace:
    """One decision, in names and numbers.

    Attributes:
        name: what the space is called.
        role: which rotation it is.
        size: how many coordinates the space has.
        form: ``offline`` or ``online``.
        rotation: the matrix.
        writers: the parameters that write into the space.
        readers: the parameters that read it.
        online: the rotations that stay in the graph.
        cache: the KV caches that travel in the rotated basis, by placeholder name or as ``output 1``.
        bytes_added: bytes of constants that the rotation adds; 0 until its passes have run.
        notes: what stays as it is, and why.
        group: the matrices that the space admits in this form: ``orthogonal`` ones alone, or any ``invertible``.
        admits: why no larger group, or why this one, as a phrase.
        heads: how many matrices it takes, one for each head; 1 where all heads share one.
        folds: the constants that take up the rotation; empty in a plan that was read from a document.
    """

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
    group: Group = "orthogonal"
    admits: str = ""
    heads: int = 1
    folds: tuple[Fold, ...] = field(default=(), repr=False, compare=False)

    @property
    def flops(self) -> int:
        """Return the floating-point operations that are added per token."""
        return sum(part.flops for part in self.online)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; of the matrix its description and fingerprint."""
        return {
            "name": self.name,
            "rotation": self.role,
            "size": self.size,
            "form": self.form,
            "matrix": str(self.rotation),
            "group": self.group,
            "admits": self.admits,
            "heads": self.heads,
            "fingerprint": self.rotation.fingerprint(),
            "writers": list(self.writers),
            "readers": list(self.readers),
            "cache": list(self.cache),
            "flops_per_token": self.flops,
            "bytes_added": self.bytes_added,
            "notes": list(self.notes),
            "online": [part.to_dict() for part in self.online],
        }

    @staticmethod
    def from_dict(data: Fields, rotations: Mapping[str, Rotation]) -> PlannedSpace:
        """Read what :meth:`to_dict` has written; ``rotations`` are the matrices by fingerprint.

        Raises ConfigError where a field is missing or wrong, or the matrix is not among those.
        """
        name, fingerprint = data.text("name"), data.text("fingerprint")
        if fingerprint not in rotations:
            raise ConfigError(f"{data.place}: the matrix of {name} ({_cut(fingerprint)}) is not in the document")
        return PlannedSpace(
            name=name,
            role=data.text("rotation", ROLES),  # type: ignore[arg-type]
            size=data.count("size"),
            form=data.text("form", ("offline", "online")),
            rotation=rotations[fingerprint],
            writers=data.texts("writers"),
            readers=data.texts("readers"),
            online=tuple(map(OnlinePart.from_dict, data.each("online"))),
            cache=data.texts("cache"),
            bytes_added=data.integer("bytes_added"),
            notes=data.texts("notes"),
            group=data.text("group", get_args(Group)),  # type: ignore[arg-type]
            admits=data.text("admits"),
            heads=data.count("heads"),
        )


@dataclass(frozen=True)
class OfferedSpace:
    """A space that takes a matrix of the user's and nothing else, and for which there is none.

    Attributes:
        name: what the space is called, by which it takes one from ``matrices``.
        size: how many coordinates it has.
        group: the matrices that it admits.
        heads: how many it takes.
        rotation: None.
    """

    name: str
    size: int
    group: Group
    heads: int = 1
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Site:
    """A decision with the graph nodes it is about."""

    planned: PlannedSpace
    space: Space

    @property
    def name(self) -> str:
        """Return the name of the space."""
        return self.planned.name


@dataclass(frozen=True)
class UntieRequest:
    """Constants that the planner asks to have untied: every use but one shall get a copy of its own."""

    constants: tuple[Node, ...]


def _cut(fingerprint: str) -> str:
    return f"{fingerprint[:12]}…"
