"""transformers' OpenVINOExporter, rotated."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from transformers.exporters.exporter_openvino import OpenVINOExporter

from spinpass.passes import lower_hadamards, repeat_heads

from .mixin import RotationMixin
from .quantizers import calibrated


class RotatedOpenVINOExporter(OpenVINOExporter, RotationMixin):
    """This exporter makes a rotated ``openvino.Model``, online Hadamards as matrix products."""

    extra = "openvino"

    def lowered(self, program: ExportedProgram) -> ExportedProgram:
        """Return the program with Hadamards as matrix products."""
        return repeat_heads(lower_hadamards(program))

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
        """Export as transformers does; the quantizer's samples hold the cache in the rotated basis."""
        return super().export_program(model, sample_inputs, calibrated(config, sample_inputs, self.rotated_program))
