"""A cache that several components share: whether all of them keep it in the same basis."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from spinpass import execution, record
from spinpass.errors import ExportError
from spinpass.record import Carried, Record

_RETURNED = re.compile(r'"type": "[\w.]+:\w*Cache"')


@dataclass(frozen=True)
class RotatedComponent:
    """This is a rotated component: its record, and whether it takes and returns a cache, in whatever basis."""

    record: Record
    takes_cache: bool
    returns_cache: bool

    @staticmethod
    def of(program: ExportedProgram, metadata: Any) -> RotatedComponent:
        """Read the component off a rotated program and transformers' metadata of it.

        Raises ExportError where the program has no record.
        """
        found = record.read(program)
        if found is None:
            raise ExportError("no output of the rotated program is computed: there is nothing to export")
        tensors = re.compile(rf"{cache_argument(metadata)}(_\d|$)")  # an empty cache has none
        takes = any(map(tensors.match, execution.user_input_names(program)))
        return RotatedComponent(found, takes, _RETURNED.search(metadata.out_spec or "") is not None)


def cache_argument(metadata: Any) -> str | None:
    """Return which argument of a component is its cache, by its class: the name is another in other transformers.

    None where the component takes none.
    """
    kinds = ((name, kind.get("container", "")) for name, kind in metadata.kwargs.items() if isinstance(kind, Mapping))
    return next((name for name, kind in kinds if kind.endswith("Cache")), None)


def check_caches(components: Mapping[str, RotatedComponent]) -> None:
    """Raise ExportError unless every component that takes or returns a cache keeps it in the basis of the others.

    Bases agree where names of spaces, fingerprints of rotations and axes do: one component may have refused what
    another accepted.
    """
    found = {f"{name} takes": _bases(c.record.inputs) for name, c in components.items() if c.takes_cache}
    found |= {f"{name} returns": _bases(c.record.outputs) for name, c in components.items() if c.returns_cache}
    for what, bases in found.items():
        first, expected = next(iter(found.items()))
        differing = sorted(space for space, *_ in bases ^ expected)
        if differing:
            raise ExportError(
                f"the cache that {what} is not in the basis of the one that {first}: {differing[0]} differs; "
                'set RotationConfig(cache="plain"), which keeps caches in the original basis'
            )


def _bases(carried: Mapping[Any, Carried]) -> frozenset[tuple[str, str, int, int | None]]:
    return frozenset((entry.space, entry.rotation.fingerprint(), entry.dim, entry.heads) for entry in carried.values())
