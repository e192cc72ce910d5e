"""Checkpoints whose weights spinpass has rotated: what they declare, in ``config.json`` and in ``spinpass.json``.

    config.json      spinpass: version, config, rotations     whatever else is lost: transformers carries it along
    spinpass.json    record: the same, among more             and the hash of every file

A loader of checkpoints needs neither, as the function is the original's. Whoever compares two checkpoints weight by
weight, or looks into their caches, does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinpass.errors import ProgramError, VerificationError
from spinpass.formats import MANIFEST, read_manifest
from spinpass.record import RECORD_KEY, Record


def declaration(made: Record) -> dict[str, Any]:
    """Return what ``config.json`` of a rotated checkpoint says of it, as JSON has it."""
    return {"version": made.version, "config": made.config, "rotations": made.rotations}


def declared_rotations(location: str, config: Any) -> Record | None:
    """Return what a folder of transformers with this configuration declares of its rotations; None where it is nothing.

    Raises VerificationError: it cannot be read, or ``spinpass.json`` of the folder says something else.
    """
    said = getattr(config, RECORD_KEY, None)
    stated = read_manifest(Path(location)).get("record") if Path(location).is_dir() else None
    listed = _record(location, "record in " + MANIFEST, stated)
    declared = _record(location, f"{RECORD_KEY} in config.json", said)
    if declared is None or listed is None:
        return declared or listed
    for space in sorted(declared.rotations.keys() | listed.rotations.keys()):
        if declared.rotations.get(space) != listed.rotations.get(space):
            raise VerificationError(
                f"config.json and {MANIFEST} of {location} disagree about the rotation of {space}: they come from "
                "different checkpoints; copy the whole folder again, or rotate the original again"
            )
    return declared


def _record(location: str, where: str, said: Any) -> Record | None:
    if said is None:
        return None
    try:
        if not isinstance(said, Mapping):
            raise ProgramError(f"it is a {type(said).__name__}")
        found = Record.from_dict({"inputs": {}, "outputs": {}, **said})
    except (KeyError, TypeError, ValueError, AttributeError, ProgramError) as error:
        raise VerificationError(
            f"{location} declares rotations that cannot be read ({where}: {error}): rotate the original again"
        ) from error
    return found if found.rotations else None
