"""The certificate: do two exported programs compute the same function?

Both are run on the same inputs, lifted to float64 throughout (the proof) and in their own dtypes (what rounding does to
it). Inputs and outputs that a program carries in a rotated basis, such as a KV cache, are rotated on the way in and
back on the way out. Then each program is fed the state it returned itself, step after step, so that a cache written in
one basis and read in another shows even where a single step hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from spinpass.errors import ConfigError, ProgramError, VerificationError
from spinpass.execution import (
    Deferred,
    Session,
    constants,
    draws,
    flat_inputs,
    next_inputs,
    output_names,
    returned_state,
    run,
    step_together,
    synthetic_inputs,
    user_input_names,
)
from spinpass.graph import value
from spinpass.progress import Progress

from .certificate import BOUNDS, NOISE_FACTOR, STORED_UNITS, Certificate, OutputCheck, difference_of, has_finite
from .coverage import Coverage
from .vectors import Noise, Rounding, judged, vector_error

__all__ = ["Certificate", "OutputCheck", "run", "synthetic_inputs", "verify"]

Bound = float | Mapping[torch.dtype, float]


def verify(
    before: ExportedProgram,
    after: ExportedProgram,
    inputs: object = None,
    *,
    bound: Bound | None = None,
    exact: Mapping[str, Callable[[], Tensor]] | None = None,
    steps: int = 2,
    progress: Progress | None = None,
) -> Certificate:
    """Compare ``after`` with ``before``; neither is modified.

    Args:
        before: the original.
        after: the program made of it.
        inputs: positional arguments, keyword arguments, the pair of both, or values by placeholder name. None makes
            synthetic ones from the specs of ``before``.
        bound: the largest relative error allowed in float64, or bounds by dtype. Those that are not given are the ones
            of :data:`spinpass.certificate.BOUNDS`.
        exact: by placeholder name, what computes the float64 values that constants of ``after`` had before they were
            rounded to their dtype; each is computed where it is used. Without this mapping the float64 comparison sees
            that rounding, and its bound is raised to it.
        steps: how many closed-loop steps follow the first, where the program returns state that it also takes.
        progress: called with (nodes done, all nodes) after every executed node.

    Returns:
        The certificate, failed or not.

    Raises:
        ProgramError: one of the two is not an exported program or cannot be run.
        ConfigError: inputs, bounds or exact values do not fit.
        VerificationError: the programs do not even take and return the same things.
    """
    bounds = _bounds(bound)
    _check_programs(before, after)
    deferred = _deferred(after, exact or {})
    drawn = draws(before) if inputs is None else [[flat_inputs(before, inputs)]]
    ticker = _Ticker(progress, 2 * (len(drawn) + steps) * (len(before.graph.nodes) + len(after.graph.nodes)))
    returned = returned_state(before)
    dtype = _working_dtype(before)
    stored = _stored_again(before, after) if exact is None else None
    roundoff = STORED_UNITS * torch.finfo(stored).eps / 2 if stored and not _gives(bound, torch.float64) else None
    unit = torch.finfo(stored or torch.float64).eps
    units = unit, torch.finfo(dtype).eps
    tally = _Tally(output_names(before), bounds[torch.float64], bounds[dtype], roundoff, units)
    coverage = Coverage(before)
    rounds = [
        _Round(
            Session(before, True, ticker), Session(after, True, ticker, deferred),
            Session(before, False, ticker), Session(after, False, ticker), returned=returned,
        )
        for _ in drawn
    ]  # fmt: skip
    notes, done = _first_step(rounds, drawn, tally, coverage)
    values = drawn[0][0]
    loop_steps, loop = _closed_loop(values, rounds[0], tally, coverage, steps)
    ticker.finish()
    described = tuple(_describe(name, given) for name, given in values.items())
    return Certificate(
        outputs=tally.checks(),
        dtype=dtype,
        exact=exact is not None,
        constants=_about_constants(stored, deferred),
        inputs=described,
        closed_loop_steps=loop_steps,
        closed_loop=loop,
        draws=done,
        coverage=(*notes, *coverage.lines()),
    )


def _bounds(bound: Bound | None) -> dict[torch.dtype, float]:
    """Return the bounds by dtype, those that were given in place of the defaults."""
    given = {} if bound is None else dict(bound) if isinstance(bound, Mapping) else {torch.float64: bound}
    for dtype, limit in given.items():
        if dtype not in BOUNDS or not limit >= 0:
            raise ConfigError(f"bound {limit!r} for {dtype}: bounds are numbers >= 0 for {', '.join(map(str, BOUNDS))}")
    return BOUNDS | given


def _gives(bound: Bound | None, dtype: torch.dtype) -> bool:
    return dtype in bound if isinstance(bound, Mapping) else bound is not None


def _check_programs(before: ExportedProgram, after: ExportedProgram) -> None:
    """Make sure that both are programs which take and return the same things."""
    for ep in (before, after):
        if not isinstance(ep, ExportedProgram):
            raise ProgramError(f"verify compares two torch.export.ExportedProgram, got {type(ep).__name__}")
    ours, theirs = user_input_names(before), user_input_names(after)
    if ours != theirs:
        raise VerificationError(f"the programs take different inputs: {', '.join(ours)} and {', '.join(theirs)}")
    count, other = len(output_names(before)), len(output_names(after))
    if count != other:
        raise VerificationError(f"the programs return different numbers of outputs: {count} and {other}")


def _deferred(after: ExportedProgram, exact: Mapping[str, Callable[[], Tensor]]) -> dict[str, Deferred]:
    unknown = sorted(exact.keys() - constants(after).keys())
    if unknown:
        raise ConfigError(f"exact values for {', '.join(unknown)}: the program has no such constants")
    return {name: Deferred(compute) for name, compute in exact.items()}


def _stored_again(before: ExportedProgram, after: ExportedProgram) -> torch.dtype | None:
    """Return the narrowest type below float64 of those constants of ``after`` that are not constants of ``before``.

    Return None where there are no such constants.
    """
    old = constants(before)
    changed = (value for name, value in constants(after).items() if _differs(old, name, value))
    return max(_float_dtypes(changed) - {torch.float64}, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _differs(old: Mapping[str, Any], name: str, new: Any) -> bool:
    then = old.get(name)
    if not isinstance(new, Tensor) or new is then:
        return False
    return not isinstance(then, Tensor) or then.dtype != new.dtype or not torch.equal(then, new)


def _about_constants(stored: torch.dtype | None, deferred: Mapping[str, Any]) -> str:
    if stored is not None:
        return f"the changed constants as stored, rounded to {str(stored).removeprefix('torch.')}"
    return "the changed constants before their final rounding" if deferred else "no constant was rounded again"


def _working_dtype(ep: ExportedProgram) -> torch.dtype:
    """Return the float type whose rounding decides the accuracy.

    It is the narrowest among the constants, or, in a float64 model, the narrowest that it casts to on the way.
    """
    modules = [m for m in ep.graph_module.modules() if isinstance(m, GraphModule)]
    stored = _float_dtypes(constants(ep).values()) - {torch.float64}
    computed = _float_dtypes(value(node) for module in modules for node in module.graph.nodes)
    return max(stored or computed or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def _float_dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    return {v.dtype for v in values if isinstance(v, Tensor)} & BOUNDS.keys()


def _describe(name: str, given: Any) -> str:
    if not isinstance(given, Tensor):
        return f"{name} = {given!r}"
    return f"{name} {str(given.dtype).removeprefix('torch.')}{list(given.shape)}"


class _Ticker:
    """A counter of executed nodes, which tells the caller's ``progress``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def finish(self) -> None:
        """Report that all is done, because the loop may have stopped early."""
        if self.progress is not None and self.done < self.total:
            self.progress(self.total, self.total)


# -- running ---------------------------------------------------------------------------------------------------------


class _Exhausted(Exception):
    """The original itself cannot take a further step, for example because its cache is full."""


class _Round:
    """The four sessions: both programs lifted, and both native."""

    def __init__(self, *sessions: Session, returned: Mapping[int, str]) -> None:
        self.exact_before, self.exact_after, self.before, self.after = self.sessions = sessions
        self.returned = returned

    def run(self, values: Mapping[str, Any], tally: _Tally, coverage: Coverage) -> None:
        """Run one further step of all four sessions and give what they return to ``tally``.

        Raises:
            _Exhausted: the original cannot be run on the state that it returned itself.
        """
        first = step_together([self.exact_before], [values], coverage.watch)[0]
        if isinstance(first, ProgramError):
            raise _Exhausted from first
        coverage.given(values)
        self.compare([first, *(session.step(values) for session in self.sessions[1:])], tally)

    def compare(self, returned: Sequence[tuple[Any, ...]], tally: _Tally) -> None:
        """Give ``tally`` what the four sessions have returned and hold by now."""
        original = self.exact_before
        plain = original.plain_outputs(), {name: original.current(name) for name in original.changed}
        shaken = Rounding(lambda watches: (plain, list(original.again(watches))), tally.unit)
        for i, results in enumerate(zip(*returned, strict=True)):
            noise = partial(shaken.of_output, i)
            tally.add(tally.names[i], _Results(*results), noise, argmax=i not in self.returned)
        for name in sorted(self.exact_before.changed | self.exact_after.changed):
            held = _Results(*(s.current(name) for s in self.sessions))
            tally.add(f"state {name}", held, partial(shaken.of_state, name), argmax=False)

    def next_values(self, values: Mapping[str, Any], seed: int) -> dict[str, Any] | str:
        """Hand every program its own state; return the inputs of the next step, or why there is none."""
        for session in self.sessions:
            session.feed_back(self.returned)
        original = self.exact_before
        return next_inputs(original.ep, values, {n: original.current(n) for n in original.state}, seed=seed)


def _first_step(
    rounds: list[_Round], drawn: list[list[dict[str, Any]]], tally: _Tally, coverage: Coverage
) -> tuple[list[str], int]:
    """Run the first step of every draw at once; return what was left out and how many draws there are.

    A draw falls back on its next alternative where the original cannot be run on one.

    Raises:
        ProgramError: the original cannot be run on the first draw, or the other program on one that the original takes.
    """
    notes: list[str] = []
    taken: dict[int, tuple[dict[str, Any], tuple[Any, ...]]] = {}
    tried = dict.fromkeys(range(len(rounds)), 0)
    while tried:
        ids = list(tried)
        given = [drawn[i][tried[i]] for i in ids]
        results = step_together([rounds[i].exact_before for i in ids], given, coverage.watch)
        for i, values, result in zip(ids, given, results, strict=True):
            if not isinstance(result, ProgramError):
                taken[i] = values, result
                del tried[i]
                continue
            if i == 0:
                raise result
            tried[i] += 1
            if tried[i] == len(drawn[i]):
                notes.append(f"draw {i + 1} not run: the original does not take it: {result}")
                del tried[i]
    order = sorted(taken)
    given = [taken[i][0] for i in order]
    returned = [[taken[i][1] for i in order]]
    for k in range(1, 4):
        others = step_together([rounds[i].sessions[k] for i in order], given)
        returned.append([_or_raise(result) for result in others])
    for at, i in enumerate(order):
        coverage.given(given[at])
        rounds[i].compare([results[at] for results in returned], tally)
    return notes, len(order)


def _or_raise(result: tuple[Any, ...] | ProgramError) -> tuple[Any, ...]:
    if isinstance(result, ProgramError):
        raise result
    return result


class _Results(NamedTuple):
    """What the four sessions return for one output."""

    exact_before: Any
    exact_after: Any
    before: Any
    after: Any


def _closed_loop(
    values: Mapping[str, Any], round_: _Round, tally: _Tally, coverage: Coverage, steps: int
) -> tuple[int, str]:
    """Run up to ``steps`` further steps on returned state; return how many were run, and a line about it."""
    if not round_.returned and not round_.exact_before.changed:
        return 0, "none: the program returns no state that it also takes"
    for done in range(steps):
        following = round_.next_values(values, seed=done + 1)
        if isinstance(following, str):
            return done, f"{done} further steps, then stopped: {following}"
        values = following
        try:
            round_.run(values, tally, coverage)
        except _Exhausted as error:
            return done, f"{done} further steps, then stopped: the original cannot go on: {error.__cause__}"
    return (
        steps,
        f"{steps} further steps, each program fed the {len(round_.exact_before.state)} tensors it returned itself",
    )


# -- comparing -------------------------------------------------------------------------------------------------------


class _Tally:
    """The worst comparison of every output over all steps."""

    def __init__(
        self, names: list[str], bound64: float, bound_native: float, roundoff: float | None, units: tuple[float, float]
    ) -> None:
        self.names = names
        self.unit, self._native_unit = units  # one rounding of what may differ, lifted and in the model's dtype
        self._bounds = (bound64, bound_native)
        self._roundoff = roundoff  # of constants that were stored again
        self._checks: dict[str, OutputCheck] = {}

    def add(self, name: str, results: _Results, moved: Noise, *, argmax: bool) -> None:
        """Compare one output of one step, and keep what is worse than before.

        ``moved`` measures its rounding where that is asked for.
        """
        exact = difference_of(results.exact_before, results.exact_after, argmax=argmax)
        native = difference_of(results.before, results.after, argmax=argmax)
        noise = difference_of(results.exact_before, results.before, argmax=False).relative
        mismatch = _mismatch(results.before, results.after)
        old = self._checks.get(name)
        noise = noise if old is None else max(noise, old.noise)
        floating = _is_floating(results.before)
        limits = self._limits(noise) if floating else (0.0, 0.0)
        if floating:
            exact, native = judged(exact, limits[0], moved), judged(native, limits[1], self._in_native(moved))
        if old is not None:
            exact, native = exact.worst(old.float64), native.worst(old.native)
            mismatch = old.mismatch or mismatch
        shape = tuple(getattr(results.before, "shape", ()))
        vectors = vector_error(results.exact_before, results.exact_after, limits[0], moved) if floating else 0.0
        compared = not floating or has_finite(results.exact_before)
        if old is not None:
            shape, vectors, compared = old.shape, max(vectors, old.vectors), compared or old.compared
        self._checks[name] = OutputCheck(
            name, shape, exact, native, noise, *limits, mismatch, vectors=vectors, compared=compared
        )

    def _in_native(self, moved: Noise) -> Noise:
        """Return how far the rounding of the model's own dtype moves an output."""

        def scaled() -> Tensor | None:
            found = moved()
            return None if found is None else found * (self._native_unit / self.unit)

        return scaled

    def _limits(self, noise: float) -> tuple[float, float]:
        """Return the bounds, in float64 and in the model's dtype, of an output whose original has this noise."""
        bound64, bound_native = self._bounds
        noise = noise if noise < float("inf") else 0.0
        if self._roundoff is not None:
            bound64 = max(bound64, self._roundoff, NOISE_FACTOR * noise)
        return bound64, max(bound_native, NOISE_FACTOR * noise)

    def checks(self) -> tuple[OutputCheck, ...]:
        """Return what was found about every output."""
        return tuple(self._checks.values())


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _mismatch(before: Any, after: Any) -> str:
    """Say what is wrong with the type, shape or dtype of an output, or return ''."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return "" if type(before) is type(after) else f"{type(after).__name__} instead of {type(before).__name__}"
    if before.shape != after.shape:
        return f"shape {list(after.shape)} instead of {list(before.shape)}"
    return "" if before.dtype == after.dtype else f"dtype {after.dtype} instead of {before.dtype}"
