"""A plan: every decision about a program as a frozen value, which prints as a table and turns into JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spinpass.analysis import Refusal
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.rotations import GIVEN_KINDS, Rotation, rotation_by
from spinpass.values import Fields, check_told, columns, notebook_table, titled

from .planned import OfferedSpace, PlannedSpace
from .summary import grouped_refusals, grouped_spaces, online_parts

_VERSION = 1
_VALUES = ("matrix", "factors")  # of a rotation's description, what a matrix of the user's holds


@dataclass(frozen=True, repr=False)
class RotationPlan:
    """Every decision about a program: what is rotated, in which form and at what cost, and what is refused and why.

    ``print(plan)`` shows a table, a notebook one in HTML. :func:`spinpass.save_plan` keeps a plan in a file, and
    ``spinpass.transform(program, plan)`` carries it out.

    Attributes:
        config: what was asked for.
        spaces: what is rotated.
        refusals: what is left alone, and why.
        parameters: the shape of every parameter of the program that it was made for, by name; empty where it is not
            known. The plan fits any program with the same ones, whatever their values.
        offers: spaces that take a matrix of yours and nothing else; empty in a plan that was read from a document.
    """

    config: RotationConfig
    spaces: tuple[PlannedSpace, ...]
    refusals: tuple[Refusal, ...] = ()
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    offers: tuple[OfferedSpace, ...] = field(default=(), compare=False)

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
        reasons = {(s.role, s.form, s.group, s.heads): s.admits for s in self.spaces}
        return [
            f"{role} {form} admits {group} matrices{f', one for each of {heads} heads' * (heads > 1)}: {why}"
            for (role, form, group, heads), why in sorted(reasons.items())
        ]

    @property
    def total(self) -> str:
        """Say in one line how much is rotated, and what it adds."""
        return f"{len(self.spaces)} spaces, {self.flops:,} FLOP per token added, {self.bytes_added:,} bytes added"

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

    def to_dict(self, *, matrices: bool = True) -> dict[str, Any]:
        """Return the plan as values that JSON can hold, for :meth:`from_dict`.

        Args:
            matrices: keep the matrices that were learned or given, base64 of float64. Without them they are named
                alone, which is enough to read the plan and too little to carry it out.

        Raises:
            ConfigError: a matrix of the configuration, which no space uses, has no inverse.
        """
        rotations = {s.rotation.fingerprint(): s.rotation for s in self.spaces}
        given = {key: _rotations(found) for key, found in self.config.matrices.items()} if matrices else {}
        for of_key in given.values():
            rotations |= {r.fingerprint(): r for r in (of_key if isinstance(of_key, list) else [of_key])}
        told = {key: r.to_dict() for key, r in rotations.items()} if matrices else _described(rotations)
        fields = {
            "config": self.config.to_dict(),
            "flops_per_token": self.flops,
            "bytes_added": self.bytes_added,
            "spaces": [s.to_dict() for s in self.spaces],
            "refusals": [{"what": r.what, "why": r.why, "nodes": list(r.nodes)} for r in self.refusals],
            "rotations": told,
            "matrices": {key: _fingerprints(of_key) for key, of_key in given.items()},
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
        }
        return titled("plan", _VERSION, fields)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RotationPlan:
        """Return the plan that :meth:`to_dict` has written, but for the ``folds`` of its spaces, which are for a graph
        to say.

        Raises:
            ConfigError: it is no plan, one of another version, incomplete, or was changed by hand in one place alone.
        """
        fields = Fields.of(data, "plan", _VERSION)
        rotations = {key: _rotation(key, told) for key, told in fields.plain("rotations").items()}
        given = {key: _of_key(key, told, rotations) for key, told in fields.plain("matrices").items()}
        shapes = fields.inner("parameters")
        found = RotationPlan(
            RotationConfig.from_dict(fields.plain("config"), given),
            tuple(PlannedSpace.from_dict(each, rotations) for each in fields.each("spaces")),
            tuple(Refusal(r.text("what"), r.text("why"), r.texts("nodes")) for r in fields.each("refusals")),
            {name: shapes.counts(name) for name in fields.plain("parameters")},
        )
        check_told("plan", data, found.to_dict())
        return found

    def check_parameters(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError, which names what differs, where the plan was made for other parameters than these."""
        if not self.parameters or self.parameters == parameters:
            return
        for name in (*self.parameters, *parameters):
            here, there = parameters.get(name), self.parameters.get(name)
            if here != there:
                raise ConfigError(
                    f"the plan is of another program: {name} {_shape(here)} here and {_shape(there)} there; plan this "
                    "program anew, or give the one that the plan was made for"
                )

    def __repr__(self) -> str:
        roles = [s.role for s in self.spaces]
        counted = ", ".join(f"{role} {roles.count(role)}" for role in dict.fromkeys(roles))
        refused = f", {len(self.refusals)} refused" if self.refusals else ""
        return f"<RotationPlan: {self.total}{f' ({counted})' if counted else ''}{refused}>"

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
        lines = columns([head, *rows], ruled=True)
        lines += self.admissions
        lines += [f"refused  {r}" for r in self.refusals]
        return "\n".join([*lines, f"total: {self.total}"])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: spaces that differ only in their layer stand in one row."""
        head = ("space", "matrix", "form", "admits", "online", "size", "FLOP/token", "bytes")
        groups = grouped_spaces(self).items()
        notes = dict.fromkeys(note for s in self.spaces for note in s.notes)
        table = notebook_table(
            "Rotations", head, (_row(*each) for each in groups), numbers=3, notes=[self.total, *self.admissions, *notes]
        )
        if not self.refusals:
            return table
        refused = ((_times(what, count), why) for (what, why), count in grouped_refusals(self).items())
        return table + notebook_table("Refused", ("left alone", "why"), refused)


def _row(name: str, spaces: Sequence[PlannedSpace]) -> tuple[object, ...]:
    first, flops, added = spaces[0], sum(s.flops for s in spaces), sum(s.bytes_added for s in spaces)
    name = _times(name, len(spaces))
    return name, first.rotation, first.form, first.group, online_parts(spaces), first.size, f"{flops:,}", f"{added:,}"


def _times(name: str, count: int) -> str:
    return f"{name} ({count}×)" if count > 1 else name


def _short(names: tuple[str, ...]) -> str:
    if len(names) <= 2:
        return ", ".join(names) or "–"
    return f"{names[0]}, … ({len(names)})"


def _online_text(space: PlannedSpace) -> str:
    parts = [online_parts([space])] if space.online else []
    parts += [f"cache: {', '.join(space.cache)}"] if space.cache else []
    return "; ".join(parts + list(space.notes)) or "none"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"is {list(shape)}"


# -- matrices in a document --------------------------------------------------------------------------------------------


def _rotations(given: Any) -> Rotation | list[Rotation]:
    """Return a key's matrix of a configuration, or its matrices, as changes of basis."""
    return [rotation_by(each) for each in given] if isinstance(given, list | tuple) else rotation_by(given)


def _fingerprints(rotations: Rotation | list[Rotation]) -> str | list[str]:
    return [r.fingerprint() for r in rotations] if isinstance(rotations, list) else rotations.fingerprint()


def _described(rotations: Mapping[str, Rotation]) -> dict[str, dict[str, Any]]:
    """Return what rotations are without the values of those that nothing draws."""
    names = ("kind", "size", "order", "seed", "identity")
    return {key: {name: getattr(r, name) for name in names} for key, r in rotations.items()}


def _rotation(fingerprint: str, told: object) -> Rotation:
    """Return a rotation of a document. Raises ConfigError where its values were left out."""
    described = Fields(told, f"plan.rotations.{fingerprint[:12]}…")
    if described.text("kind") in GIVEN_KINDS and not any(map(described.has, _VALUES)):
        raise ConfigError(
            f"the plan was written without its matrices (one of size {described.count('size')}): keep it with "
            "spinpass.save_plan, or with to_dict() as it is"
        )
    return Rotation.from_dict(described.all)


def _of_key(key: str, told: Any, rotations: Mapping[str, Rotation]) -> Rotation | tuple[Rotation, ...]:
    """Return the matrix of a key, or its matrices, by fingerprint. Raises ConfigError where one is not there."""
    several = isinstance(told, list)
    for each in told if several else [told]:
        if not isinstance(each, str) or each not in rotations:
            raise ConfigError(f"plan.matrices: the matrix for {key} ({str(each)[:12]}…) is not in the document")
    return tuple(rotations[each] for each in told) if several else rotations[told]
