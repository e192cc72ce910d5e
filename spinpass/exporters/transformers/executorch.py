"""transformers' ExecutorchExporter, rotated."""

from __future__ import annotations

from torch.export import ExportedProgram
from transformers.exporters.exporter_executorch import ExecutorchExporter

from spinpass.passes import give_own_constants, lower_hadamards

from .mixin import RotationMixin


class RotatedExecutorchExporter(ExecutorchExporter, RotationMixin):
    """This exporter makes a rotated ExecuTorch program, online Hadamards as linear layers, which backends take like any
    other."""

    extra = "executorch"

    def lowered(self, program: ExportedProgram) -> ExportedProgram:
        """Return the program with Hadamards as linear layers, each with a matrix of its own: partitions share none."""
        return give_own_constants(lower_hadamards(program))
