"""learn:  a program, a scheme, text  ->  the program in the bases and with the numbers that the scheme does best with.

    rotate  ->  learn changes of basis  ->  rotate by them, certify  ->  round  ->  learn scales and roundings

Everything that is learned folds into constants or stands where a Hadamard of the same cost stood, so what comes out is
what the exporters take: a program, its integers, and a plan with matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import record
from spinpass.config import Role, RotationConfig
from spinpass.errors import ConfigError
from spinpass.learning import Learning, LearningRecord, Lesson, parted
from spinpass.pipeline import plan, rotate
from spinpass.planning import OfferedSpace, PlannedSpace, RotationPlan
from spinpass.progress import Silent, Steps
from spinpass.quantization import (
    Basis,
    QuantizationConfig,
    Quantized,
    balanced_bases,
    balancing_begins,
    begun_basis,
    channel_scales,
    check_kinds,
    kinds_of_bases,
    learned_bases,
    needs_of_bases,
    quantize,
    roles_of_bases,
    takes_scales,
)
from spinpass.rotations import Rotation
from spinpass.values import Fields, check_told, notebook_lines, notebook_parts, titled
from spinpass.workers import Team

_VERSION = 1
_OF_WEIGHTS = ("scales", "zeros", "offsets", "latents")
_DEFAULT = Learning(("transforms", "scales", "offsets"))
BALANCE = "balance"
"""What :func:`balance` is called among the kinds that ``spinpass learn`` takes: a closed form, without steps."""

_DRAWN = 32  # inputs that gradients are taken on, at most: of each channel it is one number that they have to tell
_TURNED = "R3"  # any invertible matrix may be given; learned free from the Hadamard on, it rounded worse (DESIGN)
_BENEATH: Role = "gates"  # what is folded into the same channels lies on top of them


class NothingToBalance(ConfigError):
    """Nothing that is rounded is rotated as the program runs, by a Hadamard that other matrices may stand for."""


@dataclass(frozen=True, repr=False)
class Learned:
    """What :func:`learn` returns. A notebook shows what was learned and the plan.

    Attributes:
        program: the rotated program, in floats.
        quantized: what was made of it, with its integers, as the exporters take it.
        config: the rotations, with the matrices that were learned.
        plan: every decision behind them.
        bases: how learning the changes of basis went; None where none was learned.
    """

    program: ExportedProgram
    quantized: Quantized
    config: RotationConfig
    plan: RotationPlan
    bases: LearningRecord | None

    @property
    def numbers(self) -> LearningRecord | None:
        """How learning scales, roundings and the like went; None where nothing of the kind was."""
        return self.quantized.report.learning

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the plan with its matrices, and how learning went; not the programs."""
        fields = {
            "plan": self.plan.to_dict(),
            "bases": self.bases and self.bases.to_dict(),
            "numbers": self.numbers and self.numbers.to_dict(),
        }
        return titled("learned", _VERSION, fields)

    @staticmethod
    def from_dict(data: Mapping[str, Any], program: ExportedProgram, quantized: Quantized) -> Learned:
        """Return the value that :meth:`to_dict` has written, with the programs that JSON cannot hold.

        Raises ConfigError: it is none, one of another version, incomplete or changed; or the program was rotated by
        another plan, or the quantized one learned in another run.
        """
        fields = Fields.of(data, "learned", _VERSION)
        planned, bases = RotationPlan.from_dict(fields.plain("plan")), fields.perhaps("bases", fields.plain)
        course = None if bases is None else LearningRecord.from_dict(bases)
        _check_rotated(program, planned)
        found = Learned(program, quantized, planned.config, planned, course)
        check_told("learned", data, found.to_dict())
        return found

    @property
    def _summaries(self) -> list[str]:
        return [each.summary for each in (self.bases, self.numbers) if each is not None]

    def __repr__(self) -> str:
        told = "; ".join(self._summaries) or "nothing was learned"
        return f"<Learned: {self.plan.total}; {len(self.quantized.report.weights)} weights rounded; {told}>"

    def __str__(self) -> str:
        return "\n".join([str(self.plan), *self._summaries])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what learning was worth, and the plan."""
        return notebook_lines(self._summaries) + notebook_parts(self.plan)


def _check_rotated(program: ExportedProgram, planned: RotationPlan) -> None:
    """Raise ConfigError, which names a space, where a program is in other bases than a plan's."""
    said = record.read(program)
    told = {} if said is None else said.rotations
    for space in planned.spaces:
        if told.get(space.name) != space.rotation.fingerprint():
            how = "by another matrix" if space.name in told else "not at all"
            raise ConfigError(f"the program is rotated {how} at {space.name}: give the one that was learned with it")


def learn(
    program: ExportedProgram,
    scheme: QuantizationConfig | str,
    calibration: Sequence[object],
    *,
    config: RotationConfig | None = None,
    settings: Learning | None = None,
    bases: Learning | None = None,
    training: Sequence[object] | None = None,
    held_out: Sequence[object] | None = None,
    checkpoint: str | Path | None = None,
    team: Team | None = None,
    steps: Steps | None = None,
) -> Learned:
    """Rotate, round and learn a program for a scheme. The program is not changed.

    Args:
        program: a language model, from ``torch.export.export`` or any exporter built on it.
        scheme: what is rounded, as for :func:`spinpass.quantization.quantize`. What it says of learning is replaced.
        calibration: inputs of the program, by which weights are rounded.
        config: what is rotated; R1 online by default, which admits any invertible matrix.
        settings: what is learned, and for how long; by default changes of basis, then scales and roundings.
        bases: how changes of basis are learned where that is not as ``settings`` have it, for example block by block.
            Which kinds of them are is for ``settings`` to say.
        training: inputs to learn from; those of the calibration by default. Shorter ones need less memory.
        held_out: inputs of another text, which decide what is kept. None holds out one of sixteen.
        checkpoint: a folder in which the run is saved now and then, and from which it goes on, to the same result.
        team: the ranks that share the work, see :mod:`spinpass.workers`.
        steps: told what begins.

    Raises:
        ConfigError: a value out of range or of another type, nothing that can be learned, or too few inputs.
        ExportError: the checkpoint cannot be written.
        LearningError: the loss became no number.
        ProgramError, QuantizedWeightError, RefusedError, VerificationError: as :func:`spinpass.rotate`.
    """
    due = {"settings": (settings, Learning), "bases": (bases, Learning), "config": (config, RotationConfig)}
    for what, (given, kind) in due.items():
        if given is not None and not isinstance(given, kind):
            raise ConfigError(f"{what} is a {type(given).__name__}, not a spinpass.{kind.__name__}")
    asked = settings or _DEFAULT
    check_kinds(asked.kinds)
    calibration = _listed("calibration", calibration)
    if not calibration:
        raise ConfigError("learning needs calibration inputs; give some")
    training = None if training is None else _listed("training", training)
    held_out = None if held_out is None else _listed("held_out", held_out)
    chosen = QuantizationConfig.parse(scheme) if isinstance(scheme, str) else scheme
    if not isinstance(chosen, QuantizationConfig):
        raise ConfigError(f"scheme={scheme!r} is neither a scheme such as 'w4-asym-gptq-a8' nor a QuantizationConfig")
    config, steps = config or RotationConfig(form="online"), steps or Silent()
    shown = calibration if training is None else training
    folder = None if checkpoint is None else Path(checkpoint)
    files = (None, None) if folder is None else (folder / "bases.pt", folder / "numbers.pt")
    course: LearningRecord | None = None
    kinds = kinds_of_bases(asked.kinds)
    if kinds:
        config, course = with_learned_bases(
            program,
            config,
            chosen,
            shown,
            replace(bases or asked, kinds=kinds),
            held_out=held_out,
            checkpoint=files[0],
            team=team,
            steps=steps,
        )
    steps.begin("rotate")
    found = rotate(program, config)
    without = chosen.weights is None and chosen.head is None and chosen.embedding is None
    rest = tuple(k for k in asked.kinds if k not in kinds and not (without and k in _OF_WEIGHTS))
    options: dict[str, Any] = {"training": training, "held_out": held_out, "checkpoint": files[1], "team": team}
    made = quantize(
        found.program,
        replace(chosen, learn=replace(asked, kinds=rest) if rest else None),
        calibration,
        progress=steps.start("quantize"),
        learning=lambda: steps.start("learn"),
        **options,
    )
    return Learned(found.program, made, config, found.plan, course)


def _listed(what: str, given: Sequence[object]) -> list[object]:
    """Return inputs as a list, which may be gone through twice. Raises ConfigError: they are no sequence of inputs."""
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping, Tensor)):
        raise ConfigError(f"{what} is a {type(given).__name__}, not a sequence of inputs of the program")
    return list(given)


def with_learned_bases(
    program: ExportedProgram,
    config: RotationConfig,
    scheme: QuantizationConfig,
    inputs: Sequence[object],
    settings: Learning,
    *,
    held_out: Sequence[object] | None = None,
    checkpoint: Path | None = None,
    team: Team | None = None,
    steps: Steps | None = None,
) -> tuple[RotationConfig, LearningRecord]:
    """Return a configuration with the matrices that were learned for a scheme, and how that went. See :func:`learn`.

    A space is learned by the first kind of ``settings`` that goes there: scales of gates, a matrix for each head, then
    factors. Matrices of the user's that were not learned from are in it by the names of their spaces, as what was
    learned is.
    """
    steps = steps or Silent()
    steps.begin("plan")
    wider = replace(config, verify=False, rotations=(*config.rotations, *roles_of_bases(settings.kinds)))
    plain = plan(program, wider)
    places: tuple[PlannedSpace | OfferedSpace, ...] = (*plain.spaces, *plain.offers)
    found = {place.name: begun_basis(place, settings.kinds) for place in places}
    begun = {name: each for name, each in found.items() if each is not None}
    if found and not begun:
        each = {s.role: f"{s.name} ({s.rotation}) has no {needs_of_bases(settings.kinds)}" for s in plain.spaces}
        raise ConfigError(f"no basis of it can be learned: {'; '.join([*each.values(), *map(str, plain.refusals)])}")
    starts = {name: rotation for name, (_, rotation) in begun.items()}
    rotated = rotate(program, replace(wider, matrices={**config.matrices, **starts}))
    kinds = {name: kind for name, (kind, _) in begun.items()}
    bases = planned_bases(rotated.plan, kinds)
    options: dict[str, Any] = {"held_out": held_out, "checkpoint": checkpoint, "team": team}
    options["progress"] = steps.start("learn bases")
    learned, course = learned_bases(program, rotated.program, bases, scheme, inputs, settings, **options)
    roles: Any = {space.role for space in rotated.plan.spaces if space.name in learned}
    given = {space.name: space.rotation for space in plain.spaces if config.matrix(space.name) is not None}
    matrices = {**config.matrices, **given, **learned}
    return replace(config, rotations=(*config.rotations, *roles), matrices=matrices), course


def balances(scheme: QuantizationConfig) -> bool:
    """Whether a scheme rounds what :func:`balance` is of: a cache, or activations."""
    return any(applies(scheme) for _, applies, _ in _PARTS)


def check_balancing(scheme: QuantizationConfig, told: str) -> None:
    """Raise ConfigError where a scheme, which the message calls as ``told``, rounds nothing that can be balanced."""
    if not balances(scheme):
        raise ConfigError(
            f"{BALANCE} is of the keys of a cache and of activations, and {told} rounds neither: add kv4, or a8 or a4"
        )


def balance(
    program: ExportedProgram,
    config: RotationConfig,
    scheme: QuantizationConfig,
    inputs: Sequence[Any],
    held_out: Sequence[Any] | None,
    steps: Steps | None = None,
) -> tuple[RotationConfig, LearningRecord]:
    """Return a configuration with the matrices in which keys and activations round best, if other inputs confirm it.

    It is two closed forms: of the keys of a cache (:mod:`spinpass.quantization.learned.balance`), and of the channels
    that are rounded in front of linear layers (:mod:`spinpass.quantization.learned.levels`).

    Args:
        program: as exported. It is not changed.
        config: what is rotated.
        scheme: by which caches and activations are rounded. Weights are rounded to nearest meanwhile.
        inputs: of the program, to take second moments on.
        held_out: other inputs, on which the predictions must come nearer to the program's own, in KL divergence. None
            holds out one of sixteen. Keys and channels are kept or dropped each for itself.
        steps: told what begins.

    Raises:
        ConfigError: the scheme rounds neither caches nor activations, or there are less than two inputs.
        NothingToBalance: nothing is rotated as the program runs that could be balanced; a ConfigError as well.
    """
    steps = steps or Silent()
    check_balancing(scheme, "the scheme")
    if not (len(inputs) > 1 if held_out is None else inputs and held_out):
        raise ConfigError(f"{BALANCE} takes some inputs to learn from and others to decide: give two or more")
    nearest = None if scheme.weights is None else replace(scheme.weights, method="rtn", clip=False)
    rounding = replace(scheme, weights=nearest, head=None, embedding=None, overrides={}, average_bits=None, learn=None)
    shown, judged = parted(inputs) if held_out is None else (inputs, held_out)

    def divergence(each: RotationConfig) -> float:
        steps.begin("judge what is balanced")
        rounded = quantize(rotate(program, replace(each, verify=False)).program, rounding, shown).program
        return Lesson(rounded, program, shown, judged).judged({}, lambda: None)

    before, after = math.inf, math.inf
    kept, dropped = list[str](), list[str]()
    for name, applies, balanced in _PARTS:
        found = balanced(program, config, shown, steps) if applies(scheme) else config
        if found is config:
            continue
        if not (kept or dropped):
            before = after = divergence(config)
        tried = divergence(found)
        (kept if tried < after else dropped).append(name)
        config, after = (found, tried) if tried < after else (config, after)
    if not (kept or dropped):
        raise NothingToBalance(
            "nothing of this program can be balanced: what is rounded is not rotated as it runs (keys by R3, "
            "activations by R1 with --form online, or R4), or not by Hadamards, or by matrices of yours"
        )
    return config, LearningRecord(before, after, len(judged), tuple(kept), tuple(dropped))


def with_balanced_keys(
    program: ExportedProgram, config: RotationConfig, inputs: Sequence[Any], steps: Steps | None = None
) -> RotationConfig:
    """Return a configuration with the matrices in which the keys of a cache round best, given what queries look at.

    It is a closed form of second moments (:mod:`spinpass.quantization.learned.balance`), for queries and keys that are
    rotated as the program runs. Where there are none, or the configuration has matrices of theirs, it is as it was.

    Args:
        program: as exported. It is not changed.
        config: what is rotated.
        inputs: of the program, to take the moments on.
        steps: told what begins.
    """
    places = (place for place in _turned(_wider(program, config), config) if place.role == _TURNED)
    begun = {place.name: start for place in places for start in (balancing_begins(place),) if start is not None}
    return _balanced(program, config, begun, inputs, balanced_bases, "balance keys", steps)


def with_balanced_channels(
    program: ExportedProgram, config: RotationConfig, inputs: Sequence[Any], steps: Steps | None = None
) -> RotationConfig:
    """Return a configuration with the scales in front of Hadamards in which activations round best.

    It is a closed form of values and gradients (:mod:`spinpass.quantization.learned.levels`), for what is rotated in
    front of linear layers as the program runs. Where there is none, or the configuration has matrices of theirs, it is
    as it was. Scales of act(g) · u go to the space that folds them into u, by the rotation ``gates``. The arguments are
    those of :func:`with_balanced_keys`.
    """
    planned = _wider(program, config)
    places = (place for place in _turned(planned, config) if place.role != _TURNED and takes_scales(place))
    begun = {place.name: place.rotation for place in places}
    inputs = inputs[:: -(-len(inputs) // _DRAWN)] if inputs else inputs
    found = _balanced(program, config, begun, inputs, channel_scales, "balance channels", steps)
    return config if found is config else _folded_beneath(planned, found, begun)


def _folded_beneath(planned: RotationPlan, config: RotationConfig, scaled: Collection[str]) -> RotationConfig:
    """The configuration with those of the scales folded that a gate takes in front of the same layer."""
    offers = {_place(each.name): each.name for each in planned.offers if each.group == "diagonal"}
    matrices = dict(config.matrices)
    for name in scaled:
        gate, rotation = offers.get(_place(name)), matrices.get(name)
        if gate is not None and isinstance(rotation, Rotation) and name.startswith("R4:"):
            del matrices[name]
            matrices[gate] = Rotation.from_blocks(rotation.given, gate)
    if matrices.keys() == config.matrices.keys():
        return config
    return replace(config, matrices=matrices, rotations=(*config.rotations, _BENEATH))


def _place(space: str) -> str:
    """Where a space lies: its name without that of its rotation."""
    return space.partition(":")[2]


_PARTS: tuple[tuple[str, Callable[[QuantizationConfig], bool], Callable[..., RotationConfig]], ...] = (
    ("balanced keys", lambda scheme: scheme.cache is not None, with_balanced_keys),
    ("balanced channels", lambda scheme: scheme.activations is not None, with_balanced_channels),
)
"""What is balanced: what a record calls it, for which schemes, and how."""


def _wider(program: ExportedProgram, config: RotationConfig) -> RotationPlan:
    """The plan, which also offers the places beneath spaces that take scales."""
    return plan(program, replace(config, verify=False, rotations=(*config.rotations, _BENEATH)))


def _turned(planned: RotationPlan, config: RotationConfig) -> list[PlannedSpace]:
    """The spaces that no matrix of the user's turns as the program runs."""
    return [space for space in planned.spaces if space.online and config.matrix(space.name) is None]


def _balanced(
    program: ExportedProgram,
    config: RotationConfig,
    begun: Mapping[str, Rotation],
    inputs: Sequence[Any],
    find: Callable[..., Mapping[str, Rotation]],
    what: str,
    steps: Steps | None,
) -> RotationConfig:
    """The configuration with what is found in a program that is rotated by what was begun."""
    if not begun:
        return config
    rotated = rotate(program, replace(config, verify=False, matrices={**config.matrices, **begun}))
    found = find(rotated.program, begun, inputs, (steps or Silent()).start(what))
    return replace(config, matrices={**config.matrices, **found}) if found else config


def planned_bases(plan: RotationPlan, kinds: Mapping[str, str]) -> list[Basis]:
    """Return the changes of basis of a plan in the order in which they are folded, each with what is learned of it.

    ``kinds`` has the kinds by the names of spaces; others stay as they are.
    """
    return [
        Basis(
            space.name,
            space.rotation,
            space.group == "orthogonal" or (space.role == _TURNED and space.rotation.is_orthogonal),
            [(fold.constant, fold.layout, fold.dual) for fold in space.folds],
            kinds.get(space.name),
        )
        for space in sorted(plan.spaces, key=lambda space: space.role != _BENEATH)
    ]
