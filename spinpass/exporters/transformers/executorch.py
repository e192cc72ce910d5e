"""transformers' ExecutorchExporter, rotated."""

from __future__ import annotations

from transformers.exporters import ExecutorchExporter

from .mixin import RotationMixin


class RotatedExecutorchExporter(ExecutorchExporter, RotationMixin):  # type: ignore[misc]  # transformers has no types
    """Exports to a rotated ExecuTorch program, online Hadamards as linear layers that a backend takes like any other."""

    lowers_hadamards = True
    extra = "executorch"
