"""Weights are rounded in pieces, which the ranks of a team take in turn; each then has all of them.

    weight  ->  blocks of rows, or the matrices of a stack  ->  piece k by rank k mod size  ->  codes of the weight

What a piece is does not depend on how many ranks there are, so that neither do the codes; what GPTQ rounds by is summed
over the ranks, in another order than by one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import WorkerError
from spinpass.graph import HOST, Handle, row_blocks, trim, values_of
from spinpass.workers import Team

from ..report import CodesStore, QuantizedWeight
from ..rounding import Codes, ExpertMoments, Moments, rounded, rounded_by_gptq, stacked
from ..scheme import Weights

KnownInputs = Moments | Iterable[ExpertMoments] | None
"""What is known of the inputs of a weight, or of those of each matrix of a stack."""

_ROWS = 1024  # of a piece for GPTQ, at most: of fewer the columns cost as much, and of more no rank can take a share
_TENSORS = ("q", "scales", "zeros", "index")
_SEEN_WITHIN = 60.0  # seconds until a file that another node has written is to be seen
_TINY = 1e-30


@dataclass(frozen=True)
class Job:
    """One weight to round.

    Args:
        name: of the parameter.
        stored: the constant.
        dim: the axis along which its columns lie.
        scheme: how.
        stack: of how many matrices it is a stack.
    """

    name: str
    stored: Tensor
    dim: int
    scheme: Weights
    stack: int = 1


@dataclass(frozen=True)
class _Part:
    """A piece that is rounded: its codes, its squared error and what that is relative to, the tokens of an expert."""

    codes: Codes
    error: tuple[float, float]
    tokens: tuple[int, ...] = ()

    def told(self) -> dict[str, Any]:
        """All but the values of the tensors."""
        codes = self.codes
        tensors = {name: getattr(codes, name) for name in _TENSORS}
        return {
            "tensors": {n: [list(t.shape), str(t.dtype)] for n, t in tensors.items() if t is not None},
            "about": [codes.bits, codes.symmetric, codes.group_bits], "error": self.error, "tokens": self.tokens,
        }  # fmt: skip


_Piece = Callable[[], _Part]


@dataclass
class Dealer:
    """It deals pieces out to the ranks of a team, and collects what they make of them."""

    team: Team
    _turn: int = field(default=0, init=False)

    def rounded(self, jobs: Sequence[Job], known: KnownInputs) -> list[QuantizedWeight]:
        """Round weights that read the same inputs; every rank calls it, with the same jobs."""
        own: dict[int, _Part] = {}
        owners: list[int] = []
        counts: list[int] = []
        for job in jobs:
            before = len(owners)
            for piece in _pieces(job, known):
                owners.append(self._turn % self.team.size)
                self._turn += 1
                if owners[-1] == self.team.rank:
                    own[len(owners) - 1] = piece()
            counts.append(len(owners) - before)
        parts = self._collected(own, owners, jobs[0].stored.device)
        return [_joined(job, itertools.islice(parts, count)) for job, count in zip(jobs, counts, strict=True)]

    def _collected(self, own: dict[int, _Part], owners: Sequence[int], device: torch.device) -> Iterator[_Part]:
        """Yield all pieces, each from the rank that has it, which lets go of it."""
        said = [iter(each) for each in self.team.gathered([part.told() for part in own.values()])]
        for k, rank in enumerate(owners):
            about = next(said[rank])
            tensors = dict[str, Tensor | None](dict.fromkeys(_TENSORS))
            for name, (shape, dtype) in about["tensors"].items():
                mine = getattr(own[k].codes, name) if k in own else _empty(shape, dtype, device)
                tensors[name] = self.team.broadcast(mine, rank)
            bits, symmetric, widths = about["about"]
            q, scales, zeros, index = (tensors[name] for name in _TENSORS)
            assert q is not None and scales is not None and zeros is not None
            codes = Codes(q, scales, zeros, bits, symmetric, index, None if widths is None else tuple(widths))
            own.pop(k, None)
            yield _Part(codes, tuple(about["error"]), tuple(about["tokens"]))


def _empty(shape: Sequence[int], dtype: str, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)


def kept_by_all(team: Team, store: CodesStore | None, jobs: Sequence[Job]) -> list[QuantizedWeight | None]:
    """Return what each weight was rounded to by a run before, None where some rank does not find it."""
    if store is None:
        return [None] * len(jobs)
    found = [store.get(job.name, job.scheme) for job in jobs]
    seen = team.gathered([weight is not None for weight in found])
    return [weight if all(each) else None for weight, *each in zip(found, *seen, strict=True)]


def keep(
    team: Team, store: CodesStore | None, jobs: Sequence[Job], made: Sequence[QuantizedWeight]
) -> list[QuantizedWeight]:
    """Keep weights, and return them as they are read from the store.

    Raises WorkerError: this rank does not see what rank 0 has kept.
    """
    if store is None:
        return list(made)
    found: list[QuantizedWeight] = []
    if team.leads:
        found = [store.put(job.name, weight) for job, weight in zip(jobs, made, strict=True)]
    team.gathered(None)
    if not team.leads:
        found = [_seen(team, store, job) for job in jobs]
    trim()
    return found


def _seen(team: Team, store: CodesStore, job: Job) -> QuantizedWeight:
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        found = store.get(job.name, job.scheme)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise WorkerError(
                f"rank {team.rank} of {team.size} does not see what rank 0 has kept of {job.name}: OUT has to lie in a "
                "folder that all nodes share"
            )
        time.sleep(0.1)


def _joined(job: Job, parts: Iterator[_Part]) -> QuantizedWeight:
    errors: list[tuple[float, float]] = []
    tokens: list[int] = []

    def codes() -> Iterator[Codes]:
        for part in parts:
            errors.append(part.error)
            tokens.extend(part.tokens)
            yield part.codes
            trim()  # of the part before, whose room nothing else fits into

    rows = job.stored.numel() // max(1, job.stored.shape[job.dim])
    made = stacked(codes(), rows).on(HOST)
    lost, size = (math.fsum(each) for each in zip(*errors, strict=True))
    return QuantizedWeight(made, job.dim, job.scheme, lost / max(size, _TINY), job.stack, tuple(tokens))


# -- pieces -----------------------------------------------------------------------------------------------------------


def _pieces(job: Job, known: KnownInputs) -> Iterator[_Piece]:
    """Yield what rounds each piece of a weight, in the order of its rows."""
    matrices: Iterable[tuple[Callable[[], Tensor], Moments | ExpertMoments | None]]
    if isinstance(known, Moments):
        matrices = ((matrix, known) for matrix in _row_pieces(job))
    elif known is None or job.scheme.method != "gptq":
        matrices = ((matrix, None) for matrix in _blocks(job))
    else:
        matrices = zip(_stack(job), known, strict=True)
    for matrix, moments in matrices:
        yield lambda matrix=matrix, moments=moments: _rounded(job, matrix(), moments)  # type: ignore[misc]


def _rounded(job: Job, matrix: Tensor, known: Moments | ExpertMoments | None) -> _Part:
    """Round one piece, a float matrix (out, in)."""
    codes = _codes(matrix, job.scheme, known).in_steps_of(job.stored.dtype, job.scheme.scales)
    found = codes.dequantized()
    if known is None:
        return _Part(codes, (float((found - matrix).square().sum()), float(matrix.square().sum())))
    return _Part(codes, known.lost(matrix, found), (known.tokens,) if isinstance(known, ExpertMoments) else ())


def _codes(matrix: Tensor, scheme: Weights, known: Moments | ExpertMoments | None) -> Codes:
    if scheme.method != "gptq" or known is None:
        return rounded(matrix, scheme)
    if isinstance(known, ExpertMoments):
        return rounded_by_gptq(matrix, known.own, scheme)
    target = known.target(matrix, scheme.damping) if scheme.follow else matrix
    return rounded_by_gptq(target, known.own, scheme, known.factors)


def _matrix(stored: Tensor, dim: int) -> Tensor:
    """Return a constant as one float matrix (out, in) whose columns lie along ``dim``."""
    moved = values_of(stored).movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1]).float()


def _row_pieces(job: Job) -> Iterator[Callable[[], Tensor]]:
    """Yield the blocks of rows of a weight of two axes, of nearly one size."""
    stored, dim = job.stored, job.dim
    rows = stored.shape[1 - dim % 2]
    count = -(-rows // _ROWS)
    bounds = [rows * k // count for k in range(count + 1)]
    whole: list[Tensor] = []  # read once, where it is not read by rows

    def read(part: slice) -> Tensor:
        if isinstance(stored, Handle) and stored.in_parts and dim % 2 == 1:
            return stored.read(part).float()
        if not whole:
            whole.append(_matrix(stored, dim))
        return whole[0][part]

    for first, last in itertools.pairwise(bounds):
        yield lambda part=slice(first, last): read(part)  # type: ignore[misc]


def _blocks(job: Job) -> Iterator[Callable[[], Tensor]]:
    """Yield a weight as one matrix, or a block of rows at a time where it is large and read when it is used."""
    stored, dim = job.stored, job.dim
    if isinstance(stored, Handle) and dim % stored.ndim == stored.ndim - 1 and not stored.turned:
        for rows in row_blocks(stored.source):
            yield lambda rows=rows: stored.read(rows).reshape(-1, stored.shape[-1]).float()  # type: ignore[misc]
        return
    yield lambda: _matrix(stored, dim)


def _stack(job: Job) -> Iterator[Callable[[], Tensor]]:
    """Yield the float matrices (out, in) of a stack, one at a time where it is read when it is used."""
    stored = job.stored
    lazy = isinstance(stored, Handle) and not stored.turned

    def read(rows: slice) -> Tensor:
        return _matrix(stored.read(rows) if lazy else values_of(stored)[rows], job.dim)  # type: ignore[attr-defined]

    for i in range(stored.shape[0]):
        yield lambda rows=slice(i, i + 1): read(rows)  # type: ignore[misc]
