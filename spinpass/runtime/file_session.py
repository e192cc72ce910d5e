"""A written file opened to be checked: here where it is small, in a process of its own where it is not.

A process takes a second or two to start. The runtime of a large file takes as much memory as the file has, most of
which would not come back before this process ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from spinpass.formats import EXTERNAL_BYTES, model_path, runtime_file

from .decoder import Generation
from .elsewhere import Elsewhere
from .served import Served

_Self = TypeVar("_Self", bound="_Asked")
_AT_ONCE = 1 << 25  # bytes of logits


class _Asked:
    """A file, and who runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = Elsewhere() if _is_large(path) else None
        self._answer: Callable[[dict[str, Any]], Any] = Served().answer if self._process is None else self._process.ask

    def ask(self, do: str, **about: Any) -> Any:
        return self._answer({"do": do, "path": str(self.path), "threads": None, **about})

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.__exit__(kind, error, trace)  # which does not wait for what nobody wants any more


class FileSession(_Asked):
    """A file in ONNX Runtime on the CPU, with the default optimisations, for as long as a ``with`` lasts."""

    def open(self, *, prepack: bool = True) -> tuple[list[tuple[str, list[int | str]]], list[str]]:
        """Load it; ``prepack`` is that of :func:`.onnx_session.open_session`.

        Returns:
            The names and shapes of what it takes, where a size that is not fixed is a name, and the names of what it
            returns.

        Raises:
            NoKernelError, ExportError, DamageError, VerificationError: as :func:`.onnx_session.open_session`.
        """
        inputs, outputs = self.ask("open", prepack=prepack)
        return inputs, outputs

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for the inputs, both in the file's order. Raises ExportError where the runtime fails."""
        found: list[Tensor] = self.ask("run", inputs=list(values))
        return found


class DecoderSession(_Asked):
    """The decoder of a folder in its runtime, for as long as a ``with`` lasts.

    Args:
        folder: one that ``spinpass export`` wrote, or a file in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(runtime_file(folder) or model_path(folder))

    def open(self) -> int | None:
        """Load it, and return how many tokens fit into its cache; None without a limit. Raises what
        :func:`.opened.open_decoder` raises."""
        context: int | None = self.ask("open decoder")
        return context

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits of every position, see :meth:`.decoder.Decoder.logits`.

        They come over some rows at a time: of a large vocabulary, several copies at once take more than a model.
        """
        length, vocabulary = self.ask("logits", ids=list(ids))
        found = torch.empty(length, vocabulary, device="cpu")
        rows = max(1, _AT_ONCE // (4 * vocabulary))
        for first in range(0, length, rows):
            found[first : first + rows] = self.ask("rows of logits", first=first, last=first + rows)
        return found

    def generate(self, ids: Sequence[int], max_new_tokens: int, *, end: Collection[int] | None = None) -> Generation:
        """Continue a prompt with the likeliest tokens, see :meth:`.decoder.Decoder.generate`."""
        stop = None if end is None else list(end)
        return Generation(**self.ask("generate", ids=list(ids), new=max_new_tokens, end=stop))


def _is_large(path: Path) -> bool:
    """Say whether a file, with the weights that lie beside it under its name, is large."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*")) > EXTERNAL_BYTES
