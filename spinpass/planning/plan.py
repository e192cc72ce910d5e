"""A plan: every decision about a program as a frozen value, which prints as a table and turns into JSON."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from spinpass.analysis import Group, Refusal, Space
from spinpass.config import Role, RotationConfig
from spinpass.errors import ConfigError
from spinpass.graph import Layout
from spinpass.rotations import Rotation


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


@dataclass(frozen=True)
class Fold:
    """A constant that takes up a rotation.

    Attributes:
        constant: the name of the parameter.
        layout: where vectors of the space lie in it.
        reads: it contracts the space, so that it takes R⁻ᵀ; otherwise it writes into it and takes R.
    """

    constant: str
    layout: Layout
    reads: bool


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
        folds: the constants that take up the rotation.
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
    folds: tuple[Fold, ...] = field(default=(), repr=False, compare=False)

    @property
    def flops(self) -> int:
        """Return the floating-point operations that are added per token."""
        return sum(part.flops for part in self.online)


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


@dataclass(frozen=True)
class RotationPlan:
    """Every decision about a program: what is rotated, in which form and at what cost, and what is refused and why.

    ``print(plan)`` shows a table.
    """

    config: RotationConfig
    spaces: tuple[PlannedSpace, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def flops(self) -> int:
        """Return the floating-point operations that are added per token."""
        return sum(s.flops for s in self.spaces)

    @property
    def bytes_added(self) -> int:
        """Return the bytes of constants that the rotated program has and the original has not."""
        return sum(s.bytes_added for s in self.spaces)

    @property
    def admissions(self) -> list[str]:
        """Return which matrices the spaces admit, and why, a sentence for each kind of them."""
        reasons = {(s.role, s.form, s.group): s.admits for s in self.spaces}
        return [f"{role} {form} admits {group} matrices: {why}" for (role, form, group), why in sorted(reasons.items())]

    def without(self, *names: str) -> RotationPlan:
        """Return the plan without the spaces of these names, which are left alone.

        Raises:
            ConfigError: the plan has no space of such a name.
        """
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
        """Return the plan as values that JSON can hold."""
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
                    "group": s.group,
                    "admits": s.admits,
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
        head = ("space", "size", "rotation", "form", "admits", "writers", "readers", "online", "FLOP/token", "bytes")
        rows = [
            (
                s.name,
                str(s.size),
                str(s.rotation),
                s.form,
                s.group,
                _short(s.writers),
                _short(s.readers),
                _online_text(s),
                f"{s.flops:,}",
                f"{s.bytes_added:,}",
            )
            for s in self.spaces
        ]
        lines = _table([head, *rows])
        lines += self.admissions
        lines += [f"refused  {r}" for r in self.refusals]
        lines.append(
            f"total: {len(self.spaces)} spaces, {self.flops:,} FLOP per token added, {self.bytes_added:,} bytes added"
        )
        return "\n".join(lines)


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
