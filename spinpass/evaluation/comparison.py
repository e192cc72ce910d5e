"""What a decoder is worth: perplexity over windows of text, and how two decoders differ.

A comparison of two decoders is paired: both read the same windows, and the difference of their losses has a standard
error far smaller than that of either perplexity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from spinpass.errors import ConfigError
from spinpass.progress import Progress
from spinpass.workers import Team

from .texts import Windows

_Read = tuple[float, int, float]  # of a window: the loss, at how many tokens as the first would, the divergence
_AT_ONCE = 1 << 22  # logits that are float64 at a time: a vocabulary is large


class Scorer(Protocol):
    """Anything that gives logits (length, vocabulary) for token ids, from an empty cache."""

    def logits(self, ids: Sequence[int], /) -> Tensor: ...


@dataclass(frozen=True)
class Perplexity:
    """How well a decoder predicts a text.

    ``losses``: the mean negative log-likelihood per predicted token of each window, in nats; ``tokens``: how many were
    predicted in all windows.
    """

    losses: tuple[float, ...]
    tokens: int

    @property
    def loss(self) -> float:
        """The mean over windows, in nats per token."""
        return statistics.fmean(self.losses)

    @property
    def loss_error(self) -> float:
        """The standard error of :attr:`loss` over windows; nan for a single window."""
        return _standard_error(self.losses)

    @property
    def value(self) -> float:
        """exp(loss), infinite where no float is as large."""
        return _exp(self.loss)

    @property
    def error(self) -> float:
        """The standard error of :attr:`value`, to first order."""
        return self.value * self.loss_error

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; the standard error is None for a single window."""
        error = None if math.isnan(self.error) else self.error
        return {"perplexity": self.value, "standard_error": error, "tokens": self.tokens, "losses": list(self.losses)}


@dataclass(frozen=True)
class Change:
    """The difference of two decoders' mean losses over the same windows, and its standard error, in nats per token."""

    mean: float
    error: float

    @property
    def percent(self) -> float:
        """The change of the perplexity, in percent."""
        return 100 * (_exp(self.mean) - 1 if self.mean > 1 else math.expm1(self.mean))


@dataclass(frozen=True)
class Comparison:
    """Two decoders on the same windows.

    ``agreement``: the share of positions at which both find the same token the likeliest; ``divergences``: of each
    window KL(before ‖ after), in nats per token.
    """

    before: Perplexity
    after: Perplexity
    agreement: float
    divergences: tuple[float, ...]

    @property
    def change(self) -> Change:
        """The change of the loss, paired by window."""
        return change(self.before, self.after)

    @property
    def ratio(self) -> float:
        """The perplexity after divided by that before."""
        return _exp(self.change.mean)

    @property
    def divergence(self) -> float:
        """The mean over windows, in nats per token."""
        return statistics.fmean(self.divergences)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; standard errors are None for a single window."""
        errors = {"ratio_error": self.ratio * self.change.error, "kl_error": _standard_error(self.divergences)}
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "ratio": self.ratio,
            "agreement": self.agreement,
            "kl": self.divergence,
        } | {name: None if math.isnan(error) else error for name, error in errors.items()}


def perplexity(decoder: Scorer, windows: Windows, progress: Progress | None = None) -> Perplexity:
    """Predict every token of every window but its first from those before it in the window.

    ``progress(done, total)`` is called after each window. Raises ConfigError where there are no windows.
    """
    if not windows:
        raise ConfigError("there are no windows to evaluate on")
    losses: list[float] = []
    for ids in windows:
        losses.append(_loss(decoder.logits(ids)[:-1], ids[1:]))
        if progress is not None:
            progress(len(losses), len(windows))
    return Perplexity(tuple(losses), sum(len(ids) - 1 for ids in windows))


def compare(
    before: Scorer, after: Scorer, windows: Windows, progress: Progress | None = None, team: Team | None = None
) -> Comparison:
    """Let both decoders read every window. ``progress`` and ConfigError are as in :func:`perplexity`.

    Of a ``team`` each rank reads its share, and all return the same, or raise the same error.
    """
    return compare_each(before, [after], windows, progress, team)[0]


def compare_each(
    before: Scorer,
    others: Sequence[Scorer],
    windows: Windows,
    progress: Progress | None = None,
    team: Team | None = None,
) -> list[Comparison]:
    """Compare each of ``others`` with ``before``, which reads every window once. Else as :func:`compare`."""
    if not windows:
        raise ConfigError("there are no windows to evaluate on")
    team = team or Team()
    every = team.made(lambda: _read(before, others, team.dealt(windows), progress))
    read = [every[k % team.size][k // team.size] for k in range(len(windows))]
    tokens = sum(len(ids) - 1 for ids in windows)
    first, *rest = (Perplexity(tuple(each[k][0] for each in read), tokens) for k in range(1 + len(others)))
    return [
        Comparison(first, after, sum(each[k][1] for each in read) / tokens, tuple(each[k][2] for each in read))
        for k, after in enumerate(rest, 1)
    ]


def _read(before: Scorer, others: Sequence[Scorer], windows: Windows, progress: Progress | None) -> list[list[_Read]]:
    """Let all decoders read windows; of each window return what ``before`` and the others make of it."""
    own: list[list[_Read]] = []
    for done, ids in enumerate(windows):
        own.append(_read_window(before, others, ids))  # whose logits are gone before there are others
        if progress is not None:
            progress(done + 1, len(windows))
    return own


def _read_window(before: Scorer, others: Sequence[Scorer], ids: Sequence[int]) -> list[_Read]:
    following = ids[1:]
    expected = before.logits(ids)[:-1]
    own = [(_loss(expected, following), len(following), 0.0)]
    for other in others:
        found = other.logits(ids)[:-1].to(expected.device)  # a file computes on another
        equal = int((expected.argmax(-1) == found.argmax(-1)).sum())
        own.append((_loss(found, following), equal, _divergence(expected, found)))
        del found
    return own


def _loss(logits: Tensor, following: Sequence[int]) -> float:
    """The mean negative log-likelihood of the tokens that follow, of logits (length, vocabulary)."""
    tokens, rows = torch.tensor(list(following), device=logits.device), _rows(logits)
    parts = zip(torch.split(logits, rows), torch.split(tokens, rows), strict=True)
    return sum(float(functional.cross_entropy(x.double(), y, reduction="sum")) for x, y in parts) / len(following)


def _divergence(expected: Tensor, found: Tensor) -> float:
    """The mean of KL(expected ‖ found) over the rows of logits (length, vocabulary)."""
    total = 0.0
    rows = _rows(expected)
    for p, q in zip(torch.split(expected, rows), torch.split(found, rows), strict=True):
        wanted, made = (x.double().log_softmax(-1) for x in (p, q))
        total += float((wanted.exp() * made.neg_().add_(wanted)).sum())
    return total / len(expected)


def _rows(logits: Tensor) -> int:
    return max(1, _AT_ONCE // max(1, logits.shape[-1]))


def change(before: Perplexity, after: Perplexity) -> Change:
    """How much worse ``after`` is, window by window. Raises ConfigError where the numbers of windows differ."""
    if len(before.losses) != len(after.losses):
        raise ConfigError(f"{len(before.losses)} and {len(after.losses)} windows cannot be compared in pairs")
    return paired(before.losses, after.losses)


def paired(before: Sequence[float], after: Sequence[float]) -> Change:
    """The mean of ``after − before`` over windows, in nats per token, and its standard error."""
    differences = [b - a for a, b in zip(before, after)]
    return Change(statistics.fmean(differences), _standard_error(differences))


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
