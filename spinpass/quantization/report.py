"""What quantizing has done to a program: the integers of each weight, and the program that computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch.export import ExportedProgram

from .rounding import Codes
from .scheme import Weights


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight: its integers, the axis of the constant that was contracted, and the relative error.

    ``error``: ‖X Wᵀ − X̂ Ŵᵀ‖² / ‖X Wᵀ‖² on the calibration inputs, X̂ behind the layers that are quantized already and
    X in the unquantized program where the weight follows it, else X = X̂; ‖W − Ŵ‖² / ‖W‖² without inputs.
    """

    codes: Codes
    dim: int
    scheme: Weights
    error: float


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized, and why the rest was not. ``bytes_before`` and ``bytes_after``: of all constants."""

    weights: Mapping[str, QuantizedWeight]
    activations: tuple[str, ...]
    caches: tuple[str, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the integers."""
        weights = {
            name: asdict(w.scheme) | {"error": w.error, "bytes": w.codes.nbytes} for name, w in self.weights.items()
        }
        return {
            "weights": weights,
            "activations": list(self.activations),
            "caches": list(self.caches),
            "kept": dict(self.kept),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class Quantized:
    """A simulated quantized program and what was done to it."""

    program: ExportedProgram
    report: QuantizationReport
