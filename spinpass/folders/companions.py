"""The folder that a model is written to, and what lies beside the model in it: tokenizer, configuration,
``spinpass.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError
from spinpass.formats import (
    MANIFEST,
    PREFIX,
    README,
    Draft,
    finish,
    hashes,
    is_for_people,
    listed_files,
    sealed,
    staged,
)
from spinpass.loading import LoadedModel, LoadingReport

from .card import Card
from .judge import FolderTrial
from .model_card import model_card
from .result import Result

SETTINGS = "recipe.yaml"
"""In each folder: the options of ``spinpass export`` that make it again."""


@dataclass(frozen=True)
class Written:
    """A folder that was written: the exporter's report, what ``spinpass.json`` holds, the names of all files, and what
    loading did to the model."""

    report: Any
    manifest: Mapping[str, Any]
    files: list[str]
    loading: LoadingReport


def write_companions(
    loaded: LoadedModel,
    result: Result,
    made: Mapping[str, Any],
    files: Iterable[str],
    draft: Draft,
    tried: Callable[[], Sequence[FolderTrial]],
    scored: Callable[[], Card | str | None] = lambda: None,
) -> tuple[dict[str, Any], list[str]]:
    """Put the tokenizer, the configuration, ``README.md``, the licence and ``spinpass.json`` beside the ``files`` of an
    export.

    A README or a licence that somebody else has put into the folder stays as it is.

    Args:
        loaded: the model that was exported.
        result: what was made of it.
        made: the reports of the export and of what followed, by name.
        files: what is in the draft.
        draft: of the folder.
        tried: runs the folder when all that a runtime reads is there; ``spinpass.json`` lists what it returns.
        scored: makes the card after that.

    Returns:
        What ``spinpass.json`` holds, and the names of all files.
    """
    written = set(files)
    if loaded.companions is not None:
        written |= {path.name for path in loaded.companions.save(draft.folder)}
    if result.settings is not None:
        (draft.folder / SETTINGS).write_text(settings_text(result.settings), encoding="utf-8")
        written.add(SETTINGS)
    trials: dict[str, Any] = {"trials": [trial.to_dict() for trial in tried()]}
    card = scored()
    trials["card"] = card.to_dict() if isinstance(card, Card) else card
    source = {"files": loaded.files.to_dict()}
    origin = {"model": loaded.source.location, "source": source, "loading": loaded.report.to_dict()}
    about = origin | result.to_dict() | dict(made) | trials
    written |= _for_people(loaded, result, about, draft)
    about = write_manifest(draft.folder, about | {"files": hashes(draft.folder, written)})
    return about, sorted(written | {MANIFEST})


def write_again(loaded: LoadedModel, result: Result, about: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Write ``README.md`` and ``spinpass.json`` anew, for what is said of the folder by now. Returns the latter."""
    written = {*about["files"], *_for_people(loaded, result, about, draft)}
    return write_manifest(draft.folder, dict(about) | {"files": hashes(draft.folder, written)})


def _for_people(loaded: LoadedModel, result: Result, about: Mapping[str, Any], draft: Draft) -> set[str]:
    """Write the model card and the texts that go with the model, of a program nothing. Returns their names."""
    if loaded.companions is None:
        return set()
    texts = {**loaded.papers.texts, README: model_card(loaded, about, result.settings).encode()}
    own = listed_files(draft.out)
    made = {name: text for name, text in texts.items() if name in own or not os.path.lexists(draft.out / name)}
    with staged(draft.folder) as staging:
        for name, text in made.items():
            (staging / name).write_bytes(text)
    return set(made)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return the YAML of settings, one line each."""
    lines = ["# spinpass export MODEL OUT --config recipe.yaml"]
    lines += [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def write_manifest(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``spinpass.json``, sealed, and return what it holds."""
    found = sealed(dict(about))
    with staged(folder) as staging:
        (staging / MANIFEST).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def check_target(out: Path, model: str, *, force: bool) -> None:
    """Make sure that an export replaces nothing but an earlier export.

    Args:
        out: the folder that is to be written: absent, empty, or holding only what its own ``spinpass.json`` lists.
        model: what is exported, perhaps a folder.
        force: write into a folder that holds other files, too. MODEL itself is never written to.

    Raises:
        ConfigError: OUT is MODEL or lies in it; or it holds other files.
        ExportError: a killed run has left OUT half moved, and it cannot be finished.
    """
    source, target = Path(model).expanduser(), out.expanduser()
    if source.is_dir() and (target.resolve() == source.resolve() or source.resolve() in target.resolve().parents):
        raise ConfigError(f"{out} is the model that is exported, or lies in it: name another folder")
    if force or not target.is_dir():
        return
    finish(target)
    here = {path.name for path in target.iterdir() if not path.name.startswith(PREFIX)}  # of a run cut short
    others = sorted(here - listed_files(target))
    if others:
        edited = " as it is" if is_for_people(others[0]) else ""
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"{out} holds {others[0]}{more}, which no export of spinpass has put there{edited}: name another folder, "
            "or add --force (force=True) to write into it"
        )


def check_writable(folder: Path) -> None:
    """Raise ExportError, before minutes of work, where the folder cannot be written to. Leaves no new folder behind."""
    with staged(folder):
        pass
