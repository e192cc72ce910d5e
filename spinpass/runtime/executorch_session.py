"""ExecuTorch's runtime behind torch tensors, with errors that say what failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executorch.runtime import Runtime
from torch import Tensor

from spinpass.errors import ExportError
from spinpass.formats import check_opened, finish

_METHOD = "forward"


class PteMethod:
    """The method ``forward`` of a file, with the state of its own buffers, which start as zeros.

    Raises:
        ExportError: no file is there, or the runtime cannot load it.
        VerificationError: it is not the file that ``spinpass.json`` beside it lists.
    """

    def __init__(self, path: Path) -> None:
        finish(path)
        if not path.is_file():
            raise ExportError(f"there is no model at {path}")
        check_opened(path)
        try:
            self._program: Any = Runtime.get().load_program(path)  # must outlive the method
            loaded: Any = self._program.load_method(_METHOD)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"ExecuTorch cannot load {path.name}: {error}") from error
        if loaded is None:
            raise ExportError(f"{path.name} has no method {_METHOD!r}")
        self._path, self._method = path, loaded

    @property
    def input_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all inputs, at their largest."""
        meta = self._method.metadata
        return [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """All outputs for one value per input, in order. They are copies, the caller's to keep.

        Raises:
            ExportError: the runtime fails.
        """
        try:
            returned = self._method.execute([x.contiguous() if isinstance(x, Tensor) else x for x in inputs])
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"ExecuTorch cannot run {self._path.name}: {error}") from error
        return [value.clone() if isinstance(value, Tensor) else value for value in returned]
