"""transformers' ExecutorchExporter, rotated."""

from __future__ import annotations

from transformers.exporters.exporter_executorch import ExecutorchExporter

from .mixin import RotationMixin


class RotatedExecutorchExporter(ExecutorchExporter, RotationMixin):
    """Exports to a rotated ExecuTorch program, online Hadamards as linear layers that backends take like any other."""

    lowers_hadamards = True
    extra = "executorch"
