"""transformers' OpenVINOExporter, rotated."""

from __future__ import annotations

from typing import Any

from transformers.exporters.exporter_openvino import OpenVINOExporter

from .mixin import RotationMixin
from .quantizers import calibrated


class RotatedOpenVINOExporter(OpenVINOExporter, RotationMixin):
    """Exports to a rotated ``openvino.Model``, online Hadamards as matrix products."""

    lowers_hadamards = True
    extra = "openvino"

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
        """As of transformers; the quantizer's samples hold the cache in the rotated basis."""
        return super().export_program(model, sample_inputs, calibrated(config, sample_inputs, self.rotated_program))
