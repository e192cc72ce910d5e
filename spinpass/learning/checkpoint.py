"""A run of learning that was stopped, and what goes on from there:  one file, replaced as a whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ExportError, first_line

SAVED_EVERY = 20.0
"""Seconds between two times that a run is saved, or more where saving takes long."""
_SHARE = 50  # times as long as saving took is learned before the next
BEST = "best"
"""The name of the moves that :meth:`Checkpoint.remember` keeps beside a run."""


@dataclass
class Checkpoint:
    """Where a run is saved.

    Args:
        path: of the file.
        run: what the run is of; a file of another run is not used.
        writes: whether this rank saves; all of them read.
    """

    path: Path
    run: str
    writes: bool = True
    _last: float = field(default_factory=time.monotonic, init=False)
    _took: float = field(default=0.0, init=False)

    def load(self) -> dict[str, Any] | None:
        """Return what was saved of this very run; None where there is nothing that can be read."""
        if not self.path.exists():
            return None
        try:
            found: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError):
            return None
        except Exception as error:  # a damaged pickle raises errors of its own
            if type(error).__module__.split(".")[0] not in ("_pickle", "pickle", "zipfile"):
                raise
            return None
        return found if isinstance(found, dict) and found.get("run") == self.run else None

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.writes and time.monotonic() - self._last >= max(SAVED_EVERY, _SHARE * self._took)

    def save(self, state: dict[str, Any]) -> None:
        """Save a state of this run. Raises ExportError: it cannot be written; what was saved before is still there."""
        if self.writes:
            began = time.monotonic()
            _write(self.path, state | {"run": self.run})
            self._last = time.monotonic()
            self._took = self._last - began

    def remember(self, moves: Sequence[Tensor], name: str) -> None:
        """Keep moves beside the run. Raises ExportError as :meth:`save`."""
        if self.writes:
            _write(_beside(self.path, name), [move.detach() for move in moves])

    def recalled(self, name: str) -> list[Tensor]:
        """Return what :meth:`remember` has kept."""
        found: list[Tensor] = torch.load(_beside(self.path, name), map_location="cpu", weights_only=True)
        return found


def _on_host(content: Any) -> Any:
    """The content with its tensors on the host, from which any device can go on."""
    if isinstance(content, Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {name: _on_host(each) for name, each in content.items()}
    return [_on_host(each) for each in content] if isinstance(content, (list, tuple)) else content


def forget(path: Path) -> None:
    """Delete what runs have saved at ``path``, where there is any; what else has a name like it stays."""
    for each in (path, _beside(path, BEST)):
        each.unlink(missing_ok=True)


def _beside(path: Path, name: str) -> Path:
    return path.with_suffix(f".{name}")


def make_folder(path: Path) -> None:
    """Make the folder that a file is to lie in. Raises ExportError: it cannot be made."""
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _write(path: Path, content: object) -> None:
    """Write a file that is there whole or not at all."""
    staging = path.with_name(path.name + ".new")
    with _told(path):
        try:
            torch.save(_on_host(content), staging)
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say in an ExportError what the operating system, or torch in its place, has against writing a file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise ExportError(
            f"learning cannot be saved at {path}: {why}; free the disk, or name another place, and run it again: it "
            "goes on from what was saved before"
        ) from error
