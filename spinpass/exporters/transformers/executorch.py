"""transformers' ExecutorchExporter, rotated."""

from __future__ import annotations

from torch.export import ExportedProgram
from transformers.exporters.exporter_executorch import ExecutorchExporter

from spinpass.passes import give_own_constants, lower_hadamards

from .mixin import RotationMixin


class RotatedExecutorchExporter(ExecutorchExporter, RotationMixin):
    """Exports to a rotated ExecuTorch program, online Hadamards as linear layers that backends take like any other."""

    extra = "executorch"

    def lowered(self, program: ExportedProgram) -> ExportedProgram:
        """As :meth:`RotationMixin.lowered`: matrices are not shared, which partitions cannot be."""
        return give_own_constants(lower_hadamards(program))
