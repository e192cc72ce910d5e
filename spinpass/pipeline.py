"""The pipeline: copy, find, fuse, centre, insert, fold, certify."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import record
from spinpass.analysis import Refusal
from spinpass.certificate import Certificate, verify
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, RefusedError, SpinpassError, VerificationError
from spinpass.graph import ProgramEditor, shape
from spinpass.passes import CENTER, FOLD_ROTATIONS, FUSE_NORM_SCALE, INSERT_ROTATIONS, MATERIALIZE, PassRunner, SitePass
from spinpass.planning import Planner, RotationPlan, UntieRequest
from spinpass.progress import Progress
from spinpass.values import notebook_parts
from spinpass.version import __version__

PASSES: list[SitePass] = [
    MATERIALIZE,  # first, with the values that the expressions have before anything is queued
    FUSE_NORM_SCALE,  # before anything is rotated: a scale can only be moved in the basis it was written in
    CENTER,  # after the scales: what a writer writes is scaled before it is centred
    INSERT_ROTATIONS,
    FOLD_ROTATIONS,  # last: whatever the passes before have queued on a constant happens in the original basis
]
"""What is run for every decided space, in this order."""


@dataclass(frozen=True, repr=False)
class Rotated:
    """What :func:`rotate` returns. A notebook shows the plan and the certificate.

    Attributes:
        program: the rotated program.
        plan: every decision behind it.
        certificate: the proof that both programs are one function. It is None where it was switched off.
        exact: where that was asked for, by placeholder name what computes each changed constant in float64, as it was
            before it was rounded. It holds the original's constants.
    """

    program: ExportedProgram
    plan: RotationPlan
    certificate: Certificate | None
    exact: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        verdict = "not certified" if self.certificate is None else self.certificate.verdict
        return f"<Rotated: {self.plan.total}; {verdict}>"

    def __str__(self) -> str:
        return "\n".join(map(str, filter(None, [self.plan, self.certificate])))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the plan and the certificate."""
        return notebook_parts(self.plan, self.certificate)


def rotate(
    program: ExportedProgram,
    config: RotationConfig | RotationPlan | None = None,
    *,
    plan: RotationPlan | None = None,
    progress: Progress | None = None,
    allow_partial: bool = False,
    exact: bool = False,
) -> Rotated:
    """Rotate a program without changing the function it computes, and say how.

    Args:
        program: a language model, from ``torch.export.export`` or any exporter built on it. It is not changed.
        config: what to rotate and how. The default inserts R1–R4 and the rotations of latents. A plan may stand here.
        plan: decisions made earlier by :func:`plan`, perhaps with spaces left out, or read from a file by
            :func:`spinpass.load_plan`. Its configuration and its matrices are used.
        progress: called with (constants done, all constants) while weights are computed; planning is done by then.
        allow_partial: where the certificate fails, leave out the spaces that are to blame and return what is certified
            without them. The plan's refusals say what was left out and why.
        exact: return what constants were before they were rounded.

    Returns:
        The rotated program, its plan and its certificate. The program has the same inputs, outputs, dtypes and dynamic
        shapes; a KV cache travels in the rotated basis (see :mod:`spinpass.record`).

    Raises:
        ProgramError, QuantizedWeightError: the input is not a floating-point inference program.
        ConfigError: a setting does not fit the program; the plan is of another one, and what differs is named; or both
            a config and a plan are given.
        RefusedError: no requested rotation can be applied exactly; the reasons are listed.
        InvariantError: a pass broke the program, which is a bug in spinpass.
        VerificationError: the result is not equivalent, which is one as well; the message names the space to blame.
            With ``verify=False`` nothing is compared, and ``certificate`` is None.

    Source: R1–R4 of SpinQuant, arXiv 2405.16406, section 3; online Hadamards of QuaRot, arXiv 2404.00456.
    """
    config, plan = _asked(config, plan)
    made = _rotated(program, config, plan, progress, exact=exact)
    left_out: list[Refusal] = []
    while made.certificate is not None and not made.certificate.ok:
        guilty = _guilty(program, made)
        if guilty is None or not allow_partial:
            raise _failure(made, guilty)
        left_out.append(
            Refusal(guilty, f"left out, because with it {made.certificate.worst.name} is not the original's")
        )
        remaining = made.plan.without(guilty)
        if not remaining.spaces:
            raise _failure(made, guilty)
        made = _rotated(program, config, remaining, progress, exact=exact)
    if left_out:
        others = (r for r in made.plan.refusals if r.what not in {each.what for each in left_out})
        made = replace(made, plan=replace(made.plan, refusals=(*others, *left_out)))
    return made


def _rotated(
    program: ExportedProgram,
    config: RotationConfig,
    plan: RotationPlan | None,
    progress: Progress | None,
    *,
    exact: bool = False,
) -> Rotated:
    """Rotate, and compare unless the configuration says no; a failed certificate is part of the result."""
    editor, planner = _edited(program, config, plan)
    decided = planner.plan()
    if not decided.spaces:
        raise RefusedError("nothing was rotated:\n" + "\n".join(f"  {r}" for r in decided.refusals))
    made = _record(planner)
    record.write(editor.graph, made)
    result = editor.finish(progress)
    unrounded = editor.exact_constants()
    kept = unrounded if exact else {}
    if config.verify is False:
        return Rotated(result, decided, None, kept)
    certificate = verify(program, result, exact=unrounded)
    if certificate.ok:
        record.write(result.graph, replace(made, certificate=certificate.to_dict()))
    return Rotated(result, decided, certificate, kept)


def _guilty(program: ExportedProgram, made: Rotated) -> str | None:
    """Return the first space with which the program becomes another one, found by bisection; None where none is.

    The spaces before it are sound together.
    """
    names = [space.name for space in made.plan.spaces]
    sound, broken = 0, len(names)  # the first ``sound`` spaces are, the first ``broken`` are not
    while broken - sound > 1:
        middle = (sound + broken) // 2
        try:
            found = _rotated(program, made.plan.config, made.plan.without(*names[middle:]), None).certificate
            fails = found is not None and not found.ok
        except SpinpassError:
            return None  # the spaces do not stand without each other: none of them alone is to blame
        sound, broken = (sound, middle) if fails else (middle, broken)
    return names[sound]


def _failure(made: Rotated, guilty: str | None) -> VerificationError:
    """Return the error of a certificate that has failed."""
    assert made.certificate is not None
    try:
        made.certificate.raise_if_failed()
    except VerificationError as error:
        where = f"; the space to blame is {guilty}: leave it out with `exclude` or allow_partial" if guilty else ""
        return VerificationError(f"{error}{where}")
    raise AssertionError("the certificate has not failed")


def transform(
    program: ExportedProgram,
    config: RotationConfig | RotationPlan | None = None,
    *,
    plan: RotationPlan | None = None,
    progress: Progress | None = None,
    allow_partial: bool = False,
) -> ExportedProgram:
    """Return the rotated program alone. Arguments and errors are those of :func:`rotate`, of whose result it is a part.

    The program has the same inputs, outputs, dtypes and dynamic shapes as the one given.
    """
    return rotate(program, config, plan=plan, progress=progress, allow_partial=allow_partial).program


def plan(program: ExportedProgram, config: RotationConfig | RotationPlan | None = None) -> RotationPlan:
    """Return the decisions that :func:`rotate` would make. No weight is read, and the program is not changed.

    Of a plan made earlier it returns what it does to this program.

    Raises:
        ProgramError, QuantizedWeightError, ConfigError: as :func:`rotate`.
    """
    return _edited(program, *_asked(config, None))[1].plan()


def _edited(
    program: ExportedProgram, config: RotationConfig, plan: RotationPlan | None
) -> tuple[ProgramEditor, Planner]:
    """Return the program after all passes, its constants not yet computed, and the planner that has decided."""
    with _uncollected():
        return _planned(program, config, plan)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let Python's collector wait: what planning makes stays, and looking for garbage among it takes a fifth of the
    time at 256 layers."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _planned(
    program: ExportedProgram, config: RotationConfig, plan: RotationPlan | None
) -> tuple[ProgramEditor, Planner]:
    """Decide and edit, space by space."""
    runner = PassRunner(program)
    planner = Planner(runner.editor, config, plan, record.read(program), _parameters(program))
    for edit in planner.edits():
        if isinstance(edit, UntieRequest):
            runner.untie(edit.constants)
            continue
        space = edit.space
        for each in PASSES:
            space = runner.run(each, space, edit.planned.rotation, edit.name)
        planner.applied(edit)
    if plan is not None and (missing := {s.name for s in plan.spaces} - {s.name for s in planner.planned}):
        raise ConfigError(
            f"the plan has a space {sorted(missing)[0]!r} that this program has not: "
            "plan and program do not belong together"
        )
    return runner.editor, planner


def _parameters(program: ExportedProgram) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the program's parameters by name."""
    return {name: tuple(program.state_dict[name].shape) for name in program.graph_signature.parameters}


def _asked(
    config: RotationConfig | RotationPlan | None, plan: RotationPlan | None
) -> tuple[RotationConfig, RotationPlan | None]:
    """Return the configuration that counts, the plan's or the one given or the default, and the plan."""
    if isinstance(config, RotationPlan):
        if plan is not None:
            raise ConfigError("two plans are given: give one of them")
        return config.config, config
    if plan is not None:
        if not isinstance(plan, RotationPlan):
            raise ConfigError(f"plan is a {type(plan).__name__}, not a spinpass.RotationPlan (spinpass.load_plan)")
        if config is not None and config is not plan.config:
            raise ConfigError("give either a config or a plan: the plan brings its own configuration")
        return plan.config, plan
    if config is not None and not isinstance(config, RotationConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not a spinpass.RotationConfig")
    return config or RotationConfig(), None


def _record(planner: Planner) -> record.Record:
    """Return what the program will say of itself, the caches of earlier rotations included."""
    earlier = planner.earlier or record.Record(__version__)
    inputs, outputs = dict(earlier.inputs), dict(earlier.outputs)
    for planned, carried in planner.carried:
        *heads, dim = (axis - len(shape(carried.node)) for axis in carried.layout.dims)
        entry = record.Carried(planned.rotation, dim, planned.name, heads[0] if heads else None)
        if carried.output is None:
            inputs[carried.node.name] = entry
        else:
            outputs[planner.editor.user_output_index(carried.output)] = entry
    rotations = earlier.rotations | {s.name: s.rotation.fingerprint() for s in planner.planned}
    return record.Record(__version__, inputs, outputs, planner.config.to_dict(), rotations)
