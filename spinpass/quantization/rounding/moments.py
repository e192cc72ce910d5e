"""Second moments of a layer's inputs: all that its calibration needs to know of the calibration inputs.

With X the layer's inputs in the original program and X̂ those behind the layers that are quantized already, what a
layer's weight should be is not W but what makes up best for their difference:

    min ‖X Wᵀ − X̂ Vᵀ‖²   at   V = W (XᵀX̂)(X̂ᵀX̂)⁻¹

Tokens may count unlike: with D the diagonal matrix of their weights, XᵀX̂ is XᵀDX̂, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spinpass.workers import Team

from .gptq import Factors

_TINY = 1e-30


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, each float64 (in, in).

    Args:
        own: X̂ᵀX̂.
        cross: XᵀX̂.
        original: XᵀX.
        factors: what :func:`.gptq.rounded_by_gptq` has computed of X̂ᵀX̂, for the layers that share these inputs.
    """

    own: Tensor
    cross: Tensor
    original: Tensor
    factors: Factors = field(default_factory=dict, compare=False)
    _solvers: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)

    @classmethod
    def of(
        cls,
        values: Sequence[Tensor],
        originals: Sequence[Tensor],
        team: Team | None = None,
        counts: Sequence[Tensor] | None = None,
    ) -> Moments:
        """The moments of X̂ and X, both in tensors (…, in), pairwise of one shape. Where X̂ = X, one list is both.

        Of a ``team`` each rank gives those that it has, and they are the moments of all. ``counts`` has a tensor
        (tokens,) for each, of how much a token counts; None lets all count 1.
        """
        team = team or Team()
        own = team.sum(_product(values, values, counts))
        if originals is values:
            return cls(own, own, own)
        cross, original = (_product(originals, other, counts) for other in (values, originals))
        return cls(own, team.sum(cross), team.sum(original))

    def target(self, matrix: Tensor, damping: float) -> Tensor:
        """V (out, in) for W = ``matrix``, in its dtype, drawn to W by ``damping`` times the mean diagonal of X̂ᵀX̂."""
        # V (X̂ᵀX̂ + λ) = W (XᵀX̂ + λ)
        ridge = damping * self.own.diagonal().mean().clamp_min(_TINY)
        if damping not in self._solvers:
            self._solvers[damping] = torch.linalg.lu_factor(_plus(self.own, ridge))
        wanted = matrix.double() @ _plus(self.cross, ridge)
        solved: Tensor = torch.linalg.lu_solve(*self._solvers[damping], wanted, left=False)
        return solved.to(matrix.dtype)

    def lost(self, matrix: Tensor, quantized: Tensor) -> tuple[float, float]:
        """‖X Wᵀ − X̂ Ŵᵀ‖² and ‖X Wᵀ‖² for W = ``matrix`` and Ŵ = ``quantized``, both (out, in)."""
        if self.cross is self.own:  # X = X̂: nothing cancels, and float32 will do
            own, wide, left = self.own.float(), matrix.float(), (matrix - quantized).float()
            power = ((wide @ own) * wide).sum().double()
            return float(((left @ own) * left).sum().double().clamp_min(0)), float(power)
        w, q = matrix.double(), quantized.double()
        power = ((w @ self.original) * w).sum()
        off = power - 2 * ((w @ self.cross) * q).sum() + ((q @ self.own) * q).sum()
        return float(off.clamp_min(0)), float(power)


@dataclass(frozen=True)
class ExpertMoments:
    """Sums over the tokens that are sent to one expert, float64 (in, in).

    Args:
        own: of these tokens, and, as if it had as many more as inputs, of the average token of the layer: an expert
            with few tokens of its own is not fitted to them alone.
        seen: of these tokens.
        tokens: how many there are.
    """

    own: Tensor
    seen: Tensor
    tokens: int

    def lost(self, matrix: Tensor, quantized: Tensor) -> tuple[float, float]:
        """‖X Wᵀ − X Ŵᵀ‖² and ‖X Wᵀ‖² on the expert's tokens, for W = ``matrix`` and Ŵ = ``quantized``."""
        seen, wide, left = self.seen.float(), matrix.float(), (matrix - quantized).float()
        return tuple(float(((m @ seen) * m).sum().double().clamp_min(0)) for m in (left, wide))  # type: ignore[return-value]


def experts_moments(
    values: Sequence[Tensor], ends: Sequence[Tensor], team: Team | None = None
) -> Iterator[ExpertMoments]:
    """Yield the moments of every expert in turn.

    Args:
        values: of each input the rows (tokens, in), sorted by expert.
        ends: of each input up to which row every expert goes, integers (experts,).
        team: each rank gives the inputs that it has, and goes through all experts.
    """
    team = team or Team()
    bounds = [[0, *each.tolist()] for each in ends]
    # rows behind the last expert are of none
    everything = [rows[: bound[-1]] for rows, bound in zip(values, bounds, strict=True)]
    tokens: list[int] = team.sum(torch.tensor(bounds, device=values[0].device).diff(dim=1).sum(0)).tolist()
    width, count = values[0].shape[-1], max(1, sum(tokens))
    average = team.sum(_product(everything, everything)) * (width / count)
    for i, number in enumerate(tokens):
        own = [rows[bound[i] : bound[i + 1]] for rows, bound in zip(values, bounds, strict=True)]
        seen = team.sum(_product(own, own))
        yield ExpertMoments(average + seen, seen, number)


def _plus(matrix: Tensor, ridge: Tensor) -> Tensor:
    """The matrix with a number added to its diagonal."""
    made = matrix.clone()
    made.diagonal().add_(ridge)
    return made


def _product(left: Sequence[Tensor], right: Sequence[Tensor], counts: Sequence[Tensor] | None = None) -> Tensor:
    """Σ leftᵀ right over tokens, each as often as it counts."""
    width = left[0].shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64, device=left[0].device)
    for k, (a, b) in enumerate(zip(left, right)):
        rows = b.reshape(-1, width).float()
        if counts is not None:
            rows = rows * counts[k].unsqueeze(1)
        total += a.reshape(-1, width).float().T @ rows  # widened as it is added
    return total
