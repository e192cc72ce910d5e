"""Statistics of activations, gathered as they come, so that nothing grows with the number of tokens.

    max|x| per channel;  max|x| / median|x| per vector;  excess kurtosis  m₄/m₂² − 3  of all values

A vector is what a quantizer rounds with one scale: a token's input of a linear layer, a head's key or value.
Sources: the ratios of QuaRot (arXiv 2404.00456, figure 1) and SpinQuant (2405.16406, figures 2 and 3);
moments are merged as in Pébay, Sandia report 2008-6212, equations 3.1 (one-pass, stable).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WORST = 5


@dataclass(frozen=True)
class SiteStatistics:
    """The statistics of one site. Without vectors, or where nothing varies, a number is nan.

    ``vectors``: how many were seen; ``peaks``: float32 (channels,), the largest |x| of each channel; ``ratio``: the
    largest max|x| / median|x| of any vector, infinite where a median is 0; ``mean_ratio``: the mean of that over the
    vectors where it is finite (vectors of zeros count in neither); ``kurtosis``: the excess over all values, 0 for
    Gaussian ones.
    """

    vectors: int
    peaks: Tensor
    ratio: float
    mean_ratio: float
    kurtosis: float

    @property
    def peak(self) -> float:
        """The largest |x|."""
        return float(self.peaks.max()) if self.vectors else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: numbers, None where not finite, and the channels with the largest peaks."""
        numbers = {
            "peak": self.peak,
            "max_over_median": self.ratio,
            "mean_max_over_median": self.mean_ratio,
            "excess_kurtosis": self.kurtosis,
        }
        worst = self.peaks.topk(min(_WORST, len(self.peaks))) if self.vectors else None
        channels = [] if worst is None else zip(worst.indices.tolist(), worst.values.tolist())
        return {
            "vectors": self.vectors,
            "channels": len(self.peaks),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "worst_channels": [{"channel": channel, "peak": peak} for channel, peak in channels],
        }


class Accumulator:
    """Takes the values of one site, window by window."""

    def __init__(self, channels: int) -> None:
        self._vectors, self._finite, self._ratios = 0, 0, 0.0
        self._peaks = torch.zeros(channels, device="cpu")
        self._ratio = math.nan
        self._moments = CentralMoments()

    def update(self, values: Tensor) -> None:
        """Take ``values``, float (..., channels), which are read and not kept."""
        x = values.detach().reshape(-1, values.shape[-1]).float()
        if not len(x):
            return
        size = x.abs()
        self._vectors += len(x)
        self._peaks = torch.maximum(self._peaks, size.amax(0).cpu())
        self._add_ratios(size.sort(-1).values)
        self._moments = self._moments.merged(CentralMoments.of(x))

    def _add_ratios(self, ordered: Tensor) -> None:
        count = ordered.shape[-1]
        largest = ordered[:, -1]
        median = (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2
        ratios = (largest / median)[largest > 0]
        if not len(ratios):
            return
        worst, finite = float(ratios.max()), ratios[ratios.isfinite()]
        self._ratio = worst if math.isnan(self._ratio) else max(self._ratio, worst)
        self._ratios += float(finite.double().sum())
        self._finite += len(finite)

    def result(self) -> SiteStatistics:
        """The statistics of everything so far."""
        mean = self._ratios / self._finite if self._finite else math.nan
        return SiteStatistics(self._vectors, self._peaks.clone(), self._ratio, mean, self._moments.excess_kurtosis)


@dataclass(frozen=True)
class CentralMoments:
    """The count and mean of values, and the sums of the 2nd to 4th powers of their distances from it, in float64."""

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> CentralMoments:
        """The moments of all elements."""
        x = values.double().flatten()
        mean = x.mean()
        d = x - mean
        square = d * d
        return cls(
            x.numel(), float(mean), float(square.sum()), float((square * d).sum()), float((square * square).sum())
        )

    def merged(self, other: CentralMoments) -> CentralMoments:
        """The moments of both together."""
        a, b = self, other
        n = a.count + b.count
        if not n:
            return a
        d, na, nb = b.mean - a.mean, a.count, b.count
        second = a.second + b.second + d**2 * na * nb / n
        third = a.third + b.third + d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * b.second - nb * a.second) / n
        fourth = (
            a.fourth
            + b.fourth
            + d**4 * na * nb * (na**2 - na * nb + nb**2) / n**3
            + 6 * d**2 * (na**2 * b.second + nb**2 * a.second) / n**2
            + 4 * d * (na * b.third - nb * a.third) / n
        )
        return CentralMoments(n, a.mean + d * nb / n, second, third, fourth)

    @property
    def excess_kurtosis(self) -> float:
        """n·Σd⁴ / (Σd²)² − 3; nan where nothing varies."""
        return self.count * self.fourth / self.second**2 - 3 if self.second > 0 else math.nan
