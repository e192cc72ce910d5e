"""What the records of the variant ``folder`` add up to: how far each type comes on the way of a user."""

from __future__ import annotations

from . import states
from .records import Record
from .targets import Records

STEPS = ("written", "opens", "generates")
_ABOUT = {"written": "written", "opens": "opened", "generates": "generating past its window"}


def counts(folders: Records) -> dict[str, int]:
    """How many types come how far. Switches of a configuration (``type@name``) are not counted as types."""
    types = [record for name, record in folders.items() if "@" not in name]
    return {step: sum(bool(record.get(step)) for record in types) for step in STEPS}


def settled(folders: Records, decode: Records) -> tuple[int, int]:
    """Of the types that decode as a program, how many run as a folder or are refused before anything is rotated or
    left on the disk; and how many there are."""
    names = [name for name, record in decode.items() if "@" not in name and record["status"] == states.SAME]
    done = sum(_is_settled(folders[name]) for name in names if name in folders)
    return done, len(names)


def _is_settled(record: Record) -> bool:
    return record["status"] == states.GENERATES or (record["status"] == states.REFUSED and not record.get("left"))


def summary(folders: Records, decode: Records) -> str:
    """The counts in a sentence."""
    types = sum("@" not in name for name in folders)
    found = ", ".join(f"{count} {_ABOUT[step]}" for step, count in counts(folders).items())
    done, decoders = settled(folders, decode)
    text = f"Of {types} types: {found}."
    if decoders:
        text += f" {decoders} decode as a program; {done} of these run as a folder or are refused at once."
    return text


def others(folders: Records) -> list[tuple[str, str, str]]:
    """(type, how far it came, why not farther) of all that do not generate."""
    stopped = ((name, record) for name, record in folders.items() if record["status"] != states.GENERATES)
    return [(name, record["status"], _why(name, record)) for name, record in stopped]


def _why(name: str, record: Record) -> str:
    """The reason in a line, without the place that the model lay in."""
    why = next(iter(str(record.get("why", "")).strip().splitlines()), "")
    for word in why.split():
        if word.rstrip(":").endswith(f"folders/{name}/model"):
            why = why.replace(word.rstrip(":"), "the model")
    left = f" (left behind: {', '.join(record['left'])})" if record.get("left") else ""
    return why.partition(": ")[2] + left if why.partition(": ")[0].endswith("Error") else why + left
