"""Records: one JSON file per type and variant, which says with what sources it was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.imports import ROOT
from benchmarks.sources import digest

from . import states

Record = dict[str, Any]

OUT = Path("out/zoo")


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


def sources(root: Path = ROOT, *, variant: str = "prefill") -> dict[str, str]:
    """What a record of the variant depends on: the product, how it is measured, how programs are made."""
    return {
        "pass": pass_version(root, variant=variant),
        "measuring": measuring_version(root, variant=variant),
        "building": building_version(root),
    }


def pass_version(root: Path = ROOT, *, variant: str = "prefill") -> str:
    """A hash of what the measuring runs of spinpass."""
    return digest(_measured_by(variant), within=("spinpass",), root=root)


def measuring_version(root: Path = ROOT, *, variant: str = "prefill") -> str:
    """A hash of what decides about the figures beside the product."""
    return digest(_measured_by(variant), within=("benchmarks",), root=root)


def _measured_by(variant: str) -> str:
    return "benchmarks.zoo.folder" if variant == "folder" else "benchmarks.zoo.measure"


def building_version(root: Path = ROOT) -> str:
    """A hash of what decides about the exported programs: the zoo's own code, torch and transformers."""
    installed = version("torch"), version("transformers")
    return digest("benchmarks.zoo.variants", *installed, within=("benchmarks",), root=root)


def is_fresh(record: Record | None, now: Mapping[str, str] | None = None) -> bool:
    """The record is finished and was measured with the present sources."""
    if record is None or record.get("status") in (None, states.RUNNING):
        return False
    return record.get("sources") == dict(now or sources(variant=record.get("variant", "prefill")))


def is_failure(record: Mapping[str, Any], known: Iterable[str]) -> bool:
    """The pass failed, or a type outside ``known`` did not become a program."""
    if record.get("left"):
        return True
    if record["status"] in (states.NOT_BUILT, states.NOT_EXPORTED):
        return record["type"] not in known and record.get("variant") == "prefill"
    if record["status"] == states.NOISIER:  # in half precision the choice of an expert may tip over
        return record.get("variant") not in ("bf16", "fp16")
    return record["status"] in states.FAILURES
