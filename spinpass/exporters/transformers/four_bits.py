"""A quantizer for transformers' ``OnnxConfig``: weights of few bits as ONNX Runtime's ``MatMulNBits``.

    OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=MatMulNBitsQuantizer("w4g128-gptq-a8-head8-embed8", samples))

Behind a rotation it rounds the rotated program, calibrated if the scheme asks for that, and packs those integers into
the converted model. In transformers' own exporter there is no program to round, only the converted model: its weights
are rounded to nearest in blocks, as ONNX Runtime's own tool does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer

from spinpass.errors import ConfigError
from spinpass.graph import with_other_values
from spinpass.quantization import QuantizationConfig, QuantizedWeight, Weights, quantize

from ..onnx.integers.four_bits import round_converted
from ..onnx.integers.weights import pack_converted
from .quantizers import Sample

_DEFAULT = "w4g32-rtn-a8-head8-embed8"


class MatMulNBitsQuantizer(ExportQuantizer):
    """This is what ``OnnxConfig(quantizer=…)`` takes to have integer weights in the file.

    Args:
        scheme: how weights are rounded, as ``spinpass export --quantize`` spells it: those of the layers, ``head8`` and
            ``embed8``, and ``a8``, with which the kernel rounds activations to int8 (``accuracy_level`` 4, several
            times faster on a CPU); without it it multiplies in floats.
        calibration_dataset: inputs that GPTQ calibrates on, as transformers takes them: forward kwargs, or generate
            kwargs for ``export_for_generation``.

    Raises:
        ConfigError: the scheme cannot be read, or says what no ``MatMulNBits`` does.

    transformers calls :meth:`validate_environment` before it traces, which raises ConfigError for a scheme that takes a
    program, and ValueError for another format than ONNX.
    """

    supported_formats: tuple[Any, ...] = (ExportFormat.ONNX,)
    required_packages = ("onnx", "onnx_ir", "onnxruntime")

    def __init__(self, scheme: str = _DEFAULT, calibration_dataset: Iterable[dict[str, Any]] | None = None) -> None:
        super().__init__(calibration_dataset)
        self.scheme = scheme
        self.config = _checked(scheme)

    @property
    def accuracy_level(self) -> int:
        """How ``MatMulNBits`` computes: 4 with activations rounded to int8 per block, 0 in floats."""
        return 0 if self.config.activations is None else 4

    def validate_environment(self, export_format: Any) -> None:
        """Check, before anything is traced, what transformers' own exporter can do with the scheme.

        Raises:
            ConfigError: the scheme takes a program.
            ValueError, ImportError: transformers raises them, for another format or a missing package.
        """
        self.validate_for_program(export_format)
        _options_of_blocks(self.scheme, self.config)

    def validate_for_program(self, export_format: Any) -> None:
        """Check the format and the packages, where a program is rounded. Raises as transformers does."""
        super().validate_environment(export_format)

    def quantize(self, model: ir.Model, sample_inputs: Sample, export_format: Any) -> ir.Model:
        """Round the weights of a converted model to nearest, as transformers' own exporter asks for.

        Raises:
            ConfigError: the scheme asks for more than that.
            ExportError: there is nothing to round.
        """
        options = _options_of_blocks(self.scheme, self.config)
        round_converted(model, **options, accuracy_level=self.accuracy_level)
        return model

    def rounded(self, program: ExportedProgram, samples: Iterable[Sample], kept: KeptCodes) -> RoundedProgram:
        """Round the weights of a program, and say what their integers are.

        Args:
            program: rotated or not.
            samples: its keyword arguments, to calibrate on.
            kept: what the weights of a program before this one were rounded to.

        Raises:
            ConfigError: the samples do not fit the program, or it has nothing to round.
        """
        read = list(samples) if self.config.needs_calibration else []
        if self.config.needs_calibration and len(read) == 1:
            warnings.warn(
                f"{self.scheme} calibrates on a single sample: give MatMulNBitsQuantizer some texts, "
                "calibration_dataset=[…]",
                stacklevel=2,
            )
        made = quantize(program, self.config, read, store=kept.of(program))
        weights = made.report.weights
        # the kernels round activations, so the graph stays as it is, and only its constants are others
        values = {name: made.program.state_dict[name] for name in weights}
        return RoundedProgram(with_other_values(program, values), weights)

    def packed(self, model: ir.Model, weights: Mapping[str, QuantizedWeight]) -> ir.Model:
        """Put integers in the place of the constants that they stand for, and return the model.

        Raises ExportError where the model has no product or lookup of one of them.
        """
        pack_converted(model, weights, accuracy_level=self.accuracy_level)
        return model


@dataclass(frozen=True)
class RoundedProgram:
    """This is a program whose constants are what integers stand for, and these integers, by name."""

    program: ExportedProgram
    weights: Mapping[str, QuantizedWeight]


@dataclass
class KeptCodes:
    """These are the integers of an export's first component, which the next ones take for the same weights: prefill and
    decode are one model."""

    found: dict[str, QuantizedWeight] = field(default_factory=dict)
    made_of: dict[str, Tensor] = field(default_factory=dict)

    def of(self, program: ExportedProgram) -> _Store:
        """Return where the codes of a program are kept, and found if its weights are those of a program before it."""
        state = program.state_dict
        same = {name for name, before in self.made_of.items() if name in state and torch.equal(state[name], before)}
        return _Store(self, state, same)


@dataclass(frozen=True)
class _Store:
    """A :class:`spinpass.quantization.CodesStore` of one program."""

    kept: KeptCodes
    state: Mapping[str, Tensor]
    same: set[str]

    def get(self, name: str, scheme: Weights) -> QuantizedWeight | None:
        found = self.kept.found.get(name) if name in self.same else None
        return found if found is not None and found.scheme == scheme else None

    def put(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        self.kept.found[name], self.kept.made_of[name] = weight, self.state[name]
        return weight


def _checked(scheme: str) -> QuantizationConfig:
    """Return what a scheme says. Raises ConfigError where that is not all of weights, or of how they are multiplied."""
    found = QuantizationConfig.parse(scheme)
    rounded = found.activations
    plain = rounded is None or (rounded.bits == 8 and not rounded.static and rounded.is_symmetric)
    refused = {
        "no weights": found.weights is None,
        "activations of another kind than a8": not plain,
        "a cache": found.cache is not None,
        "widths that differ": found.average_bits is not None,
        "learning": found.learn is not None,
    }
    asked = next((what for what, is_asked in refused.items() if is_asked), None)
    if asked is not None:
        raise ConfigError(
            f"{scheme} has {asked}, and MatMulNBits is a product with rounded weights: name weights, as in {_DEFAULT}, "
            "or use spinpass export"
        )
    return replace(found, stacks=False)  # which no kernel multiplies by


def _options_of_blocks(scheme: str, config: QuantizationConfig) -> dict[str, Any]:
    """Return how the blocks of a converted model are rounded. Raises ConfigError where that takes a program."""
    weights = config.weights
    assert weights is not None  # checked before
    tables = {"head": config.head, "embed": config.embedding}
    others = [
        f"{name}{each.bits}" + (f"g{each.group_size}" if each.group_size else "")
        for name, each in tables.items()
        if each is not None and (each.bits not in (4, 8) or each.group_size not in (None, weights.group_size))
    ]
    why = {
        weights.method: weights.method != "rtn",
        f"w{weights.bits}": weights.bits != 4,
        "no groups": weights.group_size is None,
        "bf16": weights.scales != "float16",
        **dict.fromkeys(others, True),
    }
    asked = next((what for what, is_asked in why.items() if is_asked), None)
    if asked is not None:
        raise ConfigError(
            f"{scheme} has {asked}, which takes a program, and transformers' own exporter has converted it: use "
            f"RotatedOnnxExporter, or four bits in groups to nearest, as in {_DEFAULT}"
        )
    return {
        "block_size": weights.group_size,
        "symmetric": weights.symmetric,
        "head_bits": None if config.head is None else config.head.bits,
        "table_bits": None if config.embedding is None else config.embedding.bits,
    }
