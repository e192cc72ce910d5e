"""Whether a runtime's answers are those of the program: the tokens that it chose, and the logits if it shows them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.certificate import narrowest_dtype
from spinpass.errors import VerificationError
from spinpass.evaluation import ProgramScorer
from spinpass.loading import LOGIT_BOUNDS
from spinpass.runtime import Answer

KERNEL_BOUND = 0.35
"""How far logits of a file whose operators round as they run may be from those of the program: the norm of the
difference relative to the norm of the logits about their mean. ``MatMulNBits`` rounds by blocks, a program by tokens or
not at all; measured are 0.17 on a model of 135M with 4-bit weights that are not rotated, 0.05 on rotated models."""

TIE_BOUND = 0.05
"""How far they may be, by the same measure, where file and program round alike: a value at a tie goes either way."""

_TIES = 2.0
"""How many times as far as the program's own logits move when each of its values is shaken by one rounding, where that
is more. On a model of 135M with 8-bit activations they move by 0.06 to 0.14, not rotated by 0.33 to 0.44."""

_MASKED = 1e30  # what only closes places is not shaken


@dataclass(frozen=True)
class FolderTrial:
    """What became of one case in one runtime.

    ``tokens`` were chosen and judged; ``error`` is the distance of the logits from the program's, by the measure of
    ``bound``, or that of the chosen tokens where the runtime shows no logits. ``reason`` says why nothing was run or
    compared; it is empty where both were done.
    """

    runtime: str
    case: str
    tokens: int = 0
    error: float | None = None
    bound: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def runtime_names(trials: Iterable[Mapping[str, Any]]) -> str:
    """Return the runtimes of stored trials for people, each once."""
    names = dict.fromkeys(trial["runtime"] for trial in trials)
    return ", ".join(name.replace(", unrounded", " with its roundings left out") for name in names)


class Judge:
    """A program that is asked about every text, once for each.

    Args:
        program: what the file should compute, with the logits of every token.
        bound: :data:`KERNEL_BOUND` or :data:`TIE_BOUND` where the file rounds as it runs; None where it does not.
    """

    def __init__(self, program: ExportedProgram, bound: float | None = None) -> None:
        self._scorer, self._rounded = ProgramScorer(program), bound is not None
        self._bound = LOGIT_BOUNDS[narrowest_dtype(program)] if bound is None else bound
        # how far a chosen token may be behind the likeliest, relative to the largest logit
        self._most = 2 * self._bound if bound is None else bound / 2
        self._known: dict[tuple[int, ...], Tensor] = {}

    @property
    def longest(self) -> int | None:
        """The longest text in tokens; None where the program names no limit."""
        return self._scorer.longest

    def __call__(self, runtime: str, case: str, answer: Answer, ends: Collection[int] = ()) -> FolderTrial:
        """Judge the tokens and the logits of one case; ``ends`` are tokens that the runtime was kept from choosing.

        Raises:
            VerificationError: the program would not have chosen a token, or the logits are too far away.
        """
        errors: list[float] = []
        for row, tokens in enumerate(answer.tokens):
            places = torch.tensor(answer.chosen[row], device="cpu")
            expected, chosen = self._logits(tokens[:-1])[places - 1], torch.tensor(tokens, device="cpu")[places]
            behind = self._behind(expected, chosen, ends)
            error = behind if answer.logits is None else self._distance(expected, answer.logits[row])
            what = f"{runtime}, {case}" + (f", row {row}" if len(answer.tokens) > 1 else "")
            if self._rounded and not (error <= self._bound and behind <= self._most):
                self._widen(tokens[:-1])
            if not error <= self._bound and answer.logits is not None:
                raise VerificationError(
                    f"the written folder does not compute what the program does ({what}): its logits are {error:.1e} "
                    f"away, allowed {self._bound:.0e}"
                )
            if not behind <= self._most:
                raise VerificationError(
                    f"the written folder does not generate what the program does ({what}): it chooses "
                    f"{chosen.tolist()}, which the program's logits put {behind:.1e} behind the likeliest, allowed "
                    f"{self._most:.0e}"
                )
            errors.append(error)
        return FolderTrial(
            runtime, case, answer.count, max(errors), self._most if answer.logits is None else self._bound
        )

    def _widen(self, tokens: list[int]) -> None:
        """Allow what rounding alone does to the program's own logits of this text."""
        expected = self._logits(tokens)
        moved = max(distance(expected, self._scorer.logits(tokens, _Shaken(seed))) for seed in (1, 2))
        self._bound = max(self._bound, _TIES * moved)
        self._most = max(self._most, self._bound / 2)

    def _logits(self, tokens: list[int]) -> Tensor:
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = self._scorer.logits(tokens)
        return self._known[key]

    def _distance(self, expected: Tensor, found: Tensor) -> float:
        if self._rounded:
            return distance(expected, found)
        return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))

    def _behind(self, expected: Tensor, chosen: Tensor, ends: Collection[int]) -> float:
        allowed = expected.clone()
        allowed[:, list(ends)] = -torch.inf
        short = allowed.max(-1).values - expected.gather(1, chosen[:, None])[:, 0]
        scale = (_centred(expected) if self._rounded else expected).abs().max()
        return float(short.max() / scale.clamp(min=1e-30))


class _Shaken:
    """A watch that moves every value that an operator computes by one rounding of its dtype, up or down."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, node: Node, result: Any) -> Any:
        if node.op != "call_function" or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        signs = torch.randint(0, 2, result.shape, generator=self._generator, device="cpu") * 2 - 1
        moved = result * (1 + torch.finfo(result.dtype).eps * signs).to(result.dtype)
        return torch.where(result.abs().double() < _MASKED, moved, result)


def distance(expected: Tensor, found: Tensor) -> float:
    """Return the norm of the difference relative to that of ``expected`` about its mean, the largest of all rows."""
    relative = (expected - found).norm(dim=-1) / _centred(expected).norm(dim=-1).clamp(min=1e-30)
    return float(relative.max())


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)
