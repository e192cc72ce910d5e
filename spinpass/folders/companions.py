"""The folder that a model is written to, and what lies beside the model in it: tokenizer, configuration,
``spinpass.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinpass.formats import MANIFEST, hashes, staged
from spinpass.loading import LoadedModel, LoadingReport

from .result import Result


@dataclass(frozen=True)
class Written:
    """A folder that was written: the exporter's report, what ``spinpass.json`` holds, the names of all files, and what
    loading did to the model."""

    report: Any
    manifest: Mapping[str, Any]
    files: list[str]
    loading: LoadingReport


def write_companions(
    loaded: LoadedModel, result: Result, made: Mapping[str, Any], files: Iterable[str], out: Path
) -> tuple[dict[str, Any], list[str]]:
    """Put the tokenizer, the configuration and ``spinpass.json`` beside the ``files`` of an export.

    ``made``: the reports of the export and of what followed, by name. Returns what ``spinpass.json`` holds, and the
    names of all files.
    """
    written = set(files)
    if loaded.companions is not None:
        written |= {path.name for path in loaded.companions.save(out)}
    origin = {"model": loaded.source.location, "loading": loaded.report.to_dict()}
    about = origin | result.to_dict() | dict(made) | {"files": hashes(out, written)}
    with staged(out) as staging:
        (staging / MANIFEST).write_text(json.dumps(about, indent=2), encoding="utf-8")
    return about, sorted(written | {MANIFEST})


def check_writable(folder: Path) -> None:
    """Raise ExportError, before minutes of work, where the folder cannot be written to. Leaves no new folder behind."""
    created = not folder.exists()
    with staged(folder):
        pass
    if created:
        folder.rmdir()
