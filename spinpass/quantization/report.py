"""What quantizing has done to a program: the codes of each weight, and the program that computes with them."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch.export import ExportedProgram

from spinpass.learning import LearningRecord

from .rounding import Codes
from .scheme import Weights

EXCLUDED, NOT_ASKED = "excluded", "not asked for"
"""Why a weight is kept by the scheme itself, and not because it could not be rounded."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of a quantized program.

    Args:
        codes: of the weight as a matrix (out, in).
        dim: the axis of the stored constant that its layer contracts.
        scheme: how the codes were chosen.
        error: relative, ‖X Wᵀ − X̂ Ŵᵀ‖² / ‖X Wᵀ‖² on the calibration inputs. X̂ are the layer's inputs behind the layers
            that are quantized already. X are those in the original program where the scheme follows it, else X = X̂.
            Without calibration inputs the error is ‖W − Ŵ‖² / ‖W‖².
        stack: how many matrices it is, whose rows lie one after the other in the codes.
        tokens: how many of the calibration's tokens each matrix of a stack was multiplied by, where GPTQ rounded it by
            those; empty elsewhere.
    """

    codes: Codes
    dim: int
    scheme: Weights
    error: float
    stack: int = 1
    tokens: tuple[int, ...] = ()

    def matrices(self, name: str) -> dict[str, Codes]:
        """Return the codes of every matrix by the name of the weight, behind which a stack has their numbers."""
        if self.stack == 1:
            return {name: self.codes}
        rows = len(self.codes.q) // self.stack
        return {f"{name}.{i}": self.codes.rows(slice(i * rows, (i + 1) * rows)) for i in range(self.stack)}


def matrices_of(weights: Mapping[str, QuantizedWeight]) -> dict[str, Codes]:
    """Return the codes of all matrices of weights by name, those of stacks one by one."""
    return {label: codes for name, weight in weights.items() for label, codes in weight.matrices(name).items()}


class CodesStore(Protocol):
    """Where codes are kept, so that a run that was stopped can go on from them."""

    def get(self, name: str, scheme: Weights) -> QuantizedWeight | None:
        """Return what a weight was rounded to by a scheme, None where it was not."""

    def put(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        """Keep a weight, and return it as it is read from there."""


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized, and why the rest was not.

    Args:
        weights: by parameter name.
        activations: the names of the nodes that round inputs of linear layers.
        caches: the names of the nodes that round keys and values.
        kept: by name of a linear layer's node, why its weight was not quantized.
        bytes_before: the size of all constants of the original program.
        bytes_after: the same with the codes of the weights packed.
        learning: what learning has done to the codes and other constants; None where nothing was learned.
    """

    weights: Mapping[str, QuantizedWeight]
    activations: tuple[str, ...]
    caches: tuple[str, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    learning: LearningRecord | None = None

    @property
    def obstacles(self) -> Counter[str]:
        """What kept weights from being rounded that the scheme is for, with the number of layers."""
        return Counter(why for why in self.kept.values() if why not in (EXCLUDED, NOT_ASKED))

    @property
    def experts(self) -> str:
        """Say by how many tokens the matrices of stacks were rounded; empty where GPTQ was asked for none."""
        asked = [weight for weight in self.weights.values() if weight.stack > 1 and weight.scheme.method == "gptq"]
        tokens = sorted(count for weight in asked for count in weight.tokens)
        if not tokens:
            why = "the program does not sort tokens by expert, or no text was read"
            return f"{len(asked)} stacks of experts were rounded to nearest: {why}" if asked else ""
        none = bisect.bisect_right(tokens, 0)
        alone = f"; {none} saw none, and are rounded by those of all" if none else ""
        return (
            f"{len(tokens)} matrices of experts were rounded by {tokens[0]:,} to {tokens[-1]:,} tokens each, "
            f"{tokens[len(tokens) // 2]:,} in the median{alone}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it: of each weight the scheme, the error and the size, but no codes."""
        weights = {
            name: asdict(w.scheme) | {"error": w.error, "bytes": w.codes.nbytes, "tokens": list(w.tokens)}
            for name, w in self.weights.items()
        }
        return {
            "weights": weights,
            "activations": list(self.activations),
            "caches": list(self.caches),
            "kept": dict(self.kept),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "learning": None if self.learning is None else self.learning.to_dict(),
        }


@dataclass(frozen=True)
class Quantized:
    """A program that computes as the quantized one would, in floating point, and what was done to it."""

    program: ExportedProgram
    report: QuantizationReport
