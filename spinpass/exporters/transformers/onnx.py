"""transformers' OnnxExporter, rotated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from transformers.exporters.exporter_onnx import OnnxExporter

from spinpass import operators  # noqa: F401  # registers the operator that is translated

from ..onnx.operators.hadamard import attach_hadamards, hadamard_translation
from .mixin import RotationMixin
from .quantizers import calibrated, refuse_graph_quantizer


class RotatedOnnxExporter(OnnxExporter, RotationMixin):
    """This exporter makes a rotated ``onnx_ir.Model`` that stock ONNX Runtime runs, ``ort_fusions`` included.

    Online Hadamards are opaque nodes while transformers optimizes and fuses the graph; then they become calls of named
    functions with bodies of standard operators (:mod:`spinpass.exporters.onnx.operators.hadamard`), and the quantizer
    runs.
    """

    extra = "onnx,transformers"

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
        """Export as transformers does; the quantizer's samples hold the cache in the rotated basis."""
        refuse_graph_quantizer(config)
        if config.quantizer is not None:
            config.quantizer.validate_environment(config.export_format)
        with _hadamards_translated():
            plain = dataclasses.replace(config, quantizer=None)
            converted, metadata = super().export_program(model, sample_inputs, plain)
        attach_hadamards(converted)
        quantizer = calibrated(config, sample_inputs, self.rotated_program).quantizer
        if quantizer is not None:
            functions = dict(converted.functions)
            converted = quantizer.quantize(converted, sample_inputs, config.export_format)
            # it leaves what functions hold in a folder that is gone; their bodies are not quantized
            converted.functions.update({key: functions[key] for key in converted.functions if key in functions})
        return converted, metadata


@contextmanager
def _hadamards_translated() -> Iterator[None]:
    """Let transformers' table of translations have one for the Hadamard."""
    exporter = import_module("transformers.exporters.exporter_onnx")
    table: dict[Any, Any] = exporter._ONNX_TRANSLATION_TABLE  # noqa: SLF001  # OnnxExporter has no argument for translations
    operator = torch.ops.spinpass.hadamard.default
    before = table.get(operator)
    table[operator] = hadamard_translation()
    try:
        yield
    finally:
        if before is None:
            del table[operator]
        else:
            table[operator] = before
