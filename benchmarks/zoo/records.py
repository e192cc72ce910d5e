"""Records: one JSON file per type and variant, which says with what sources it was measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import spinpass

from . import states

Record = dict[str, Any]

OUT = Path("out/zoo")

_ZOO = Path(__file__).parent
_BUILDING = ("shrink.py", "overrides.py", "models.py", "export.py", "variants.py")
_MEASURING = ("structure.py", "decoding.py", "measure.py")
_NOT_THE_PASS = ("exporters", "quantization", "reporting", "console.py", "cli.py", "commands.py", "options.py",
                 "runtime.py", "evaluation.py", "scoring.py", "eval_request.py", "texts.py", "tuning.py",
                 "folder.py")  # fmt: skip


def record_path(arch: str, variant: str, out: Path = OUT) -> Path:
    return out / "records" / variant / f"{arch}.json"


def program_path(arch: str, variant: str, out: Path = OUT) -> Path:
    """The exported program; what is derived from the prefill program shares its file."""
    return out / "programs" / ("prefill" if variant == "decomposed" else variant) / f"{arch}.pt2"


def write(record: Mapping[str, Any], path: Path) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}.tmp")
    staging.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(staging, path)


def read(path: Path) -> Record | None:
    """The record, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_all(variant: str, out: Path = OUT) -> dict[str, Record]:
    """Type -> record, in alphabetical order."""
    paths = sorted((out / "records" / variant).glob("*.json"))
    return {path.stem: record for path in paths if (record := read(path)) is not None}


def sources() -> dict[str, str]:
    """What a record depends on: the pass, how it is measured, how programs are made."""
    return {"pass": pass_version(), "measuring": _digest(_ZOO / n for n in _MEASURING), "building": building_version()}


@cache
def pass_version() -> str:
    """A hash of the sources of the pass; exporters, quantization and the command line are left out."""
    package = Path(spinpass.__file__).parent
    return _digest(p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in _NOT_THE_PASS)


@cache
def building_version() -> str:
    """A hash of what decides about the exported programs."""
    return _digest((_ZOO / n for n in _BUILDING), version("torch"), version("transformers"))


def is_fresh(record: Record | None, now: Mapping[str, str] | None = None) -> bool:
    """The record is finished and was measured with the present sources."""
    if record is None or record.get("status") in (None, states.RUNNING):
        return False
    return record.get("sources") == dict(now or sources())


def is_failure(record: Mapping[str, Any], known: Iterable[str]) -> bool:
    """The pass failed, or a type outside ``known`` did not become a program."""
    if record["status"] in (states.NOT_BUILT, states.NOT_EXPORTED):
        return record["type"] not in known and record.get("variant") == "prefill"
    if record["status"] == states.NOISIER:  # in half precision the choice of an expert may tip over
        return record.get("variant") not in ("bf16", "fp16")
    return record["status"] in states.FAILURES


def _digest(paths: Iterable[Path], *more: str) -> str:
    hashed = hashlib.sha256()
    for path in sorted(paths):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in more:
        hashed.update(b"\0" + text.encode())
    return hashed.hexdigest()[:12]
