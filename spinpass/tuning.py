"""tune:  measure on text what each way to rotate is worth under a scheme, and keep what helps.

Whole configurations are quantized and scored on held-out text, paired over its windows. Before that every space of a
configuration is judged by itself (:func:`spinpass.quantization.site_errors`): where nothing is rounded it is left
alone, and the configuration is tried once more with only the spaces whose layers lose less in the rotated basis. Among
what is about as good as the best, what costs least is taken; no rotation, which costs nothing, also where nothing is
significantly better. What may be learned is tried last, on what was chosen, and kept where the same text confirms it
beyond the noise: it costs the user nothing when the model runs.
"""

from __future__ import annotations

import glob
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.export import ExportedProgram

from spinpass.config import ROLES, RotationConfig
from spinpass.errors import ConfigError, RefusedError
from spinpass.evaluation import Comparison, ProgramScorer, Windows, compare, paired
from spinpass.learned import learn
from spinpass.learning import Learning
from spinpass.pipeline import rotate
from spinpass.planning import PlannedSpace, RotationPlan
from spinpass.progress import Silent, Steps
from spinpass.quantization import (
    QuantizationConfig,
    Quantized,
    check_kinds,
    kinds_of_bases,
    learned,
    quantize,
    site_errors,
)

_JUDGED_ON = 2  # calibration windows that spaces are judged on
_NOTHING = "none"
_WHERE_IT_HELPS = ", where it helps"
_ABOUT = 1.02  # times the divergence of the best


@dataclass(frozen=True)
class SpaceVerdict:
    """What one space is worth: the mean relative error of the layers that read it, rounded in the original and in the
    rotated basis. None where nothing that is rounded reads it.
    """

    space: str
    original: float | None
    rotated: float | None

    @property
    def helps(self) -> bool:
        """Whether the rotated basis is the better one."""
        return self.rotated is not None and self.original is not None and self.rotated < self.original


@dataclass(frozen=True)
class Trial:
    """One configuration, quantized and scored on held-out text.

    Attributes:
        name: of the configuration, and of what was learned.
        plan: what is rotated; None for no rotation.
        comparison: with the original.
        spaces: what each space of the configuration is worth by itself.
        learned: the kinds of moves that were learned.
    """

    name: str
    plan: RotationPlan | None
    comparison: Comparison
    spaces: tuple[SpaceVerdict, ...]
    learned: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """The floating-point operations that it adds per token."""
        return 0 if self.plan is None else self.plan.flops

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "name": self.name,
            "flops_per_token": self.flops,
            "spaces": 0 if self.plan is None else len(self.plan.spaces),
            "learned": list(self.learned),
            "comparison": self.comparison.to_dict(),
            "judged": [{"space": s.space, "original": s.original, "rotated": s.rotated} for s in self.spaces],
        }


@dataclass(frozen=True)
class Tuned:
    """What was chosen: the rotated program (the original where no rotation is worth it), quantized, and all trials."""

    program: ExportedProgram
    quantized: Quantized
    chosen: Trial
    trials: tuple[Trial, ...]

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        found = {t.name: t.comparison for t in self.trials}
        if self.chosen.name == _NOTHING:
            return f"rotation is not worth it here: perplexity × {found[_NOTHING].ratio:.4f} without any"
        return (
            f"{self.chosen.name}: perplexity × {self.chosen.comparison.ratio:.4f} after quantization, "
            f"× {found[_NOTHING].ratio:.4f} without rotation"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "chosen": self.chosen.name,
            "verdict": self.verdict,
            "trials": [t.to_dict() for t in self.trials],
            "plan": self.chosen.plan and self.chosen.plan.to_dict(matrices=False),
        }


def candidates(block_sizes: Sequence[int] = ()) -> dict[str, RotationConfig]:
    """The configurations that :func:`tune` tries, by name: both forms of R1, heads as well, blocks of given sizes."""
    forms = {
        "offline": RotationConfig(form="offline", verify=False),
        "online": RotationConfig(form="online", verify=False),
        "online, across heads": RotationConfig(form="online", rotations=ROLES, verify=False),
    }
    blocks = {
        f"online, blocks of {size}": RotationConfig(form="online", block_size=size, verify=False)
        for size in block_sizes
    }
    return forms | blocks


def tune(
    program: ExportedProgram,
    scheme: QuantizationConfig | str,
    calibration: Windows,
    held_out: Windows,
    *,
    configs: Mapping[str, RotationConfig] | None = None,
    learning: Sequence[Learning] = (),
    steps: Steps | None = None,
) -> Tuned:
    """Choose what to rotate for a scheme, and what to learn. The program is not changed.

    Args:
        program: a language model, which takes token ids.
        scheme: what is rounded, as for :func:`spinpass.quantization.quantize`.
        calibration: windows of token ids, on which GPTQ and static ranges are made; spaces are judged on the first two.
        held_out: other windows, at least two, on which the choice is made.
        configs: what is tried besides no rotation, by name; :func:`candidates` by default. A configuration that the
            program refuses is left out.
        learning: what may be learned, each tried on the rotation that was chosen; what the scheme asks for comes first.
            Changes of basis are learned only where something is rotated.
        steps: told what begins.

    Raises:
        ConfigError: there is too little text, or the scheme cannot be read or does not fit, or nothing of the kinds
            to learn is in it.
        LearningError: a loss became no number.
    """
    config = QuantizationConfig.parse(scheme) if isinstance(scheme, str) else scheme
    if not calibration or len(held_out) < 2:
        raise ConfigError("tuning needs a window to calibrate on and at least two others to choose by")
    work = _Tuning(program, config, calibration, held_out, steps or Silent())
    work.try_plan(_NOTHING, None)
    for name, tried in (candidates() if configs is None else configs).items():
        work.try_config(name, tried)
    chosen = choose(work.trials)
    asked = [*([] if config.learn is None else [config.learn]), *learning]
    for settings in dict.fromkeys(asked):
        work.try_learning(chosen, settings)
    best = confirmed(chosen, work.trials)
    rotated, quantized = work.made[best.name]
    return Tuned(rotated, quantized, best, tuple(work.trials))


def choose(trials: Sequence[Trial]) -> Trial:
    """Choose the cheapest of those that diverge at most 2 % more than the best. No rotation is chosen also where it
    diverges more by no more than one standard error of the difference.
    """
    best = min(trials, key=lambda t: t.comparison.divergence)
    as_good = [t for t in trials if _is_about(t, best) or (t.plan is None and _is_within_noise(t, best))]
    return min(as_good, key=lambda t: (t.flops, t is not best))


def confirmed(chosen: Trial, trials: Sequence[Trial]) -> Trial:
    """Return the best of what was learned on the ``chosen`` trial, where it diverges less by more than one standard
    error of the difference; else the chosen one itself."""
    learned_ones = [t for t in trials if t.learned]
    best = min([chosen, *learned_ones], key=lambda t: t.comparison.divergence)
    change = paired(chosen.comparison.divergences, best.comparison.divergences)
    return best if best is not chosen and change.mean < -change.error else chosen


def _is_about(tried: Trial, best: Trial) -> bool:
    return tried.comparison.divergence <= _ABOUT * best.comparison.divergence


def _is_within_noise(tried: Trial, best: Trial) -> bool:
    change = paired(best.comparison.divergences, tried.comparison.divergences)
    return change.mean <= change.error


class _Tuning:
    """Makes and scores trials. ``made`` has the rotated and quantized programs of those that may still be chosen."""

    def __init__(
        self,
        program: ExportedProgram,
        config: QuantizationConfig,
        calibration: Windows,
        held_out: Windows,
        steps: Steps,
    ) -> None:
        self.program, self.config, self.steps = program, replace(config, learn=None), steps
        self.held_out, self.scorer = held_out, ProgramScorer(program)
        self.calibration = [self.scorer.inputs(ids) for ids in calibration]
        self.trials: list[Trial] = []
        self.made: dict[str, tuple[ExportedProgram, Quantized]] = {}
        self._original = self._site_errors(program, "original")

    def try_config(self, name: str, config: RotationConfig) -> None:
        """Try all of its spaces, and those that help; not where it is refused or nothing that reads them is rounded."""
        try:
            found = rotate(self.program, config)
        except RefusedError:
            return
        plan = found.plan
        judged = self._judge(plan, self._site_errors(found.program, name))
        rounded = [v.space for v in judged if v.rotated is not None]
        helping = [v.space for v in judged if v.helps]
        for trial, kept in ((name, rounded), (name + _WHERE_IT_HELPS, helping)):
            if kept and (kept is rounded or kept != rounded):
                self.try_plan(trial, plan.without(*(v.space for v in judged if v.space not in kept)), judged)

    def try_plan(self, name: str, plan: RotationPlan | None, judged: tuple[SpaceVerdict, ...] = ()) -> None:
        """Rotate by the plan, quantize and score."""
        rotated = self.program if plan is None else rotate(self.program, plan=plan).program
        made = quantize(rotated, self.config, self.calibration, progress=self.steps.start(f"quantize, {name}"))
        tick = self.steps.start(f"score, {name}")
        compared = compare(self.scorer, ProgramScorer(made.program), self.held_out, tick)
        self.trials.append(Trial(name, plan, compared, judged))
        self.made[name] = (rotated, made)
        best = min(self.trials, key=lambda t: t.comparison.divergence)
        for trial in self.trials:
            if trial.plan is not None and not _is_about(trial, best):
                self.made.pop(trial.name, None)

    def try_learning(self, chosen: Trial, settings: Learning) -> None:
        """Learn on what was chosen, and score, unless windows held out of the calibration are against it already."""
        (rotated, made), plan = self.made[chosen.name], chosen.plan
        name = f"{chosen.name}, learning {' and '.join(settings.kinds)}"
        check_kinds(settings.kinds)
        if kinds_of_bases(settings.kinds):
            if chosen.plan is None:
                return
            found = learn(
                self.program, self.config, self.calibration, config=_config_of(chosen), settings=settings,
                steps=self.steps,
            )  # fmt: skip
            rotated, made, plan = found.program, found.quantized, found.plan
            records = [found.bases, found.numbers]
        else:
            tick = self.steps.start(f"learn, {name}")
            made = learned(rotated, made, self.calibration, settings, progress=tick)
            records = [made.report.learning]
        kept = tuple(kind for record in records if record is not None for kind in record.kinds)
        if not kept:
            return
        tick = self.steps.start(f"score, {name}")
        compared = compare(self.scorer, ProgramScorer(made.program), self.held_out, tick)
        self.trials.append(Trial(name, plan, compared, chosen.spaces, kept))
        self.made[name] = (rotated, made)

    def _site_errors(self, program: ExportedProgram, name: str) -> dict[str, float]:
        tick = self.steps.start(f"judge spaces, {name}")
        return site_errors(program, self.config, self.calibration[:_JUDGED_ON], tick)

    def _judge(self, plan: RotationPlan, rotated: dict[str, float]) -> tuple[SpaceVerdict, ...]:
        return tuple(self._verdict(space, rotated) for space in plan.spaces)

    def _verdict(self, space: PlannedSpace, rotated: dict[str, float]) -> SpaceVerdict:
        if space.role == "R3" or (space.role == "R2" and self.config.cache is not None):
            # what is rounded here is the cache, which is read by attention and by no layer: taken as it is
            rounded = self.config.cache is not None
            return SpaceVerdict(space.name, math.inf if rounded else None, 0.0 if rounded else None)
        readers = [fqn for fqn in space.readers if fqn in self._original and fqn in rotated]
        if not readers:
            return SpaceVerdict(space.name, None, None)
        before, after = (statistics.fmean(e[fqn] for fqn in readers) for e in (self._original, rotated))
        return SpaceVerdict(space.name, before, after)


def _config_of(trial: Trial) -> RotationConfig:
    """Return the configuration that plans the spaces of a trial alone."""
    assert trial.plan is not None
    kept = {space.name for space in trial.plan.spaces}
    left_out = tuple(glob.escape(verdict.space) for verdict in trial.spaces if verdict.space not in kept)
    return replace(trial.plan.config, exclude=(*trial.plan.config.exclude, *left_out))
