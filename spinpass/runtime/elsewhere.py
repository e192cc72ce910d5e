"""A process of its own in which a runtime works, and answers one request after the other.

    this process  ->  request  ->  another python  ->  runtime  ->  answer  ->  this process

A runtime that dies takes nobody with it, nothing that this process holds can help a file, and the memory that the
runtime took is the system's again when the process ends. It writes no file: a parent that is killed leaves nothing
behind. What it answers to is in :mod:`.served`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

import torch

from spinpass.errors import ConfigError, DamageError, ExportError, SpinpassError, VerificationError

from .onnx_session import NoKernelError

# isolated: neither the current folder nor the environment says what is imported, but the paths of this process
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from spinpass.runtime.served import serve; serve()"
_KINDS = {kind.__name__: kind for kind in (ConfigError, DamageError, ExportError, NoKernelError, VerificationError)}
_REPORT = 2**10  # characters of what a dying process says
_KILLED = -9  # SIGKILL
_LENGTH = 8  # bytes in front of a message, which say how long it is


class Elsewhere:
    """Another process, which lives until :meth:`close` or the end of a ``with``."""

    def __init__(self) -> None:
        self._said = TemporaryFile()  # noqa: SIM115  closed by close(); a pipe that nobody reads would fill
        command = [sys.executable, "-I", "-c", _CHILD, *map(os.path.abspath, sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Return what the process answers: tensors, and what JSON can hold.

        Raises:
            ConfigError, DamageError, ExportError, NoKernelError, VerificationError: the runtime's own classes raise it
                there; ExportError also where the process dies, from a MemoryError where the system has ended it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            send(self._process.stdin, dict(request))
        except BrokenPipeError:
            answer = None
        else:
            answer = received(self._process.stdout)
        if answer is None:
            how, words = self._end(), self._last_words()
            # no process ends itself by this signal, and the system ends those that take too much memory by it
            cause = MemoryError(words) if self._process.returncode == _KILLED else None
            raise ExportError(f"the process that ran the written folder died ({how}): {words}") from cause
        kind, found = answer
        if kind in _KINDS:
            raise _KINDS[kind](found)
        return found

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
        self._said.close()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def _end(self) -> str:
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-_REPORT:].strip() or "without a word"


def send(pipe: IO[bytes], message: Any) -> None:
    """Write a message, and how long it is in front of it."""
    stored = io.BytesIO()
    torch.save(message, stored)
    pipe.write(stored.tell().to_bytes(_LENGTH, "little"))
    pipe.write(stored.getbuffer())
    pipe.flush()


def received(pipe: IO[bytes]) -> Any:
    """Return the next message; None where the other end is gone."""
    length = int.from_bytes(pipe.read(_LENGTH), "little")
    stored = pipe.read(length)
    return torch.load(io.BytesIO(stored), weights_only=True) if length and len(stored) == length else None


def message_of(error: SpinpassError) -> tuple[str, str]:
    """Return an error as a message: the name of the nearest class that :meth:`Elsewhere.ask` raises, and its text."""
    return next(each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS), str(error)
