"""transformers' OnnxExporter, rotated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.export import ExportedProgram
from transformers.exporters.exporter_onnx import OnnxExporter

from spinpass import operators  # noqa: F401  # registers the operator that is translated
from spinpass.config import RotationConfig
from spinpass.errors import ExportError

from ..onnx.operators.hadamard import attach_hadamards, hadamard_translation
from .four_bits import KeptCodes, MatMulNBitsQuantizer, RoundedProgram
from .mixin import RotationMixin
from .quantizers import calibrated, refuse_graph_quantizer, traced_samples


class RotatedOnnxExporter(OnnxExporter, RotationMixin):
    """This exporter makes a rotated ``onnx_ir.Model`` that stock ONNX Runtime runs, ``ort_fusions`` included.

    Online Hadamards are opaque nodes while transformers optimizes and fuses the graph; then they become calls of named
    functions with bodies of standard operators (:mod:`spinpass.exporters.onnx.operators.hadamard`), and the quantizer
    runs. A :class:`.four_bits.MatMulNBitsQuantizer` rounds the rotated program instead, before it is converted, and
    packs the integers then.
    """

    extra = "onnx,transformers"

    def __init__(self, rotation: RotationConfig | None = None) -> None:
        super().__init__(rotation)
        self._rounding: Callable[[ExportedProgram], RoundedProgram] | None = None
        self._rounded: RoundedProgram | None = None
        self._codes = KeptCodes()

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
        """Export as transformers does; the quantizer's samples hold the cache in the rotated basis."""
        refuse_graph_quantizer(config)
        quantizer = config.quantizer
        rounds_program = isinstance(quantizer, MatMulNBitsQuantizer)
        if rounds_program:
            quantizer.validate_for_program(config.export_format)
        elif quantizer is not None:
            quantizer.validate_environment(config.export_format)
        self._rounded, self._rounding = None, partial(self._round, config, sample_inputs) if rounds_program else None
        with _hadamards_translated():
            plain = dataclasses.replace(config, quantizer=None)
            converted, metadata = super().export_program(model, sample_inputs, plain)
        attach_hadamards(converted)
        if rounds_program:
            return quantizer.packed(converted, self.rounded_program().weights), metadata
        quantizer = calibrated(config, sample_inputs, self.rotated_program).quantizer
        if quantizer is not None:
            functions = dict(converted.functions)
            converted = quantizer.quantize(converted, sample_inputs, config.export_format)
            # it leaves what functions hold in a folder that is gone; their bodies are not quantized
            converted.functions.update({key: functions[key] for key in converted.functions if key in functions})
        return converted, metadata

    def lowered(self, program: ExportedProgram) -> ExportedProgram:
        """Return the program that is converted: with rounded weights, where the quantizer rounds programs."""
        if self._rounding is None:
            return program
        self._rounded = self._rounding(program)
        return self._rounded.program

    def _round(self, config: Any, sample_inputs: Any, program: ExportedProgram) -> RoundedProgram:
        if len(self._components) == 1:  # of another export than what was rounded before
            self._codes = KeptCodes()
        quantizer: MatMulNBitsQuantizer = calibrated(config, sample_inputs, lambda: program).quantizer
        return quantizer.rounded(program, traced_samples(program, quantizer.calibration_dataset or ()), self._codes)

    def rounded_program(self) -> RoundedProgram:
        """Return the program that was rounded last, which computes what its file does but for the kernels' rounding of
        activations. Raises ExportError where none was."""
        if self._rounded is None:
            raise ExportError("no program was rounded: export with a MatMulNBitsQuantizer in the config first")
        return self._rounded


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
