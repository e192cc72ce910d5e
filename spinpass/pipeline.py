"""The pipeline: copy, find, fuse, centre, insert, fold, certify."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from torch.export import ExportedProgram

from spinpass import record
from spinpass.certificate import Certificate, verify
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, RefusedError
from spinpass.graph import ProgramEditor, shape
from spinpass.passes import CENTER, FOLD_ROTATIONS, FUSE_NORM_SCALE, INSERT_ROTATIONS, MATERIALIZE, PassRunner, SitePass
from spinpass.planning import Planner, RotationPlan, UntieRequest
from spinpass.progress import Progress

VERIFY_LIMIT = 50_000_000
"""The number of parameters up to which a result is certified unless the configuration says otherwise."""

_log = logging.getLogger("spinpass")

PASSES: list[SitePass] = [
    MATERIALIZE,  # first, with the values that the expressions have before anything is queued
    FUSE_NORM_SCALE,  # before anything is rotated: a scale can only be moved in the basis it was written in
    CENTER,  # after the scales: what a writer writes is scaled before it is centred
    INSERT_ROTATIONS,
    FOLD_ROTATIONS,  # last: whatever the passes before have queued on a constant happens in the original basis
]
"""What is run for every decided space, in this order."""


@dataclass(frozen=True)
class Rotated:
    """What :func:`rotate` returns.

    Attributes:
        program: the rotated program.
        plan: every decision behind it.
        certificate: the proof that both programs are one function. It is None where none was made, because it was
            switched off or the program is larger than :data:`VERIFY_LIMIT`.
    """

    program: ExportedProgram
    plan: RotationPlan
    certificate: Certificate | None


def rotate(
    program: ExportedProgram,
    config: RotationConfig | None = None,
    *,
    plan: RotationPlan | None = None,
    progress: Progress | None = None,
) -> Rotated:
    """Rotate a program without changing the function it computes, and say how.

    Args:
        program: a language model, from ``torch.export.export`` or any exporter built on it. It is not changed.
        config: what to rotate and how. The default inserts R1–R4 and the rotations of latents.
        plan: decisions made earlier by :func:`plan`, perhaps with spaces left out. Its configuration is used.
        progress: called with (constants done, all constants) while weights are computed; planning is done by then.

    Returns:
        The rotated program, its plan and its certificate. The program has the same inputs, outputs, dtypes and dynamic
        shapes; a KV cache travels in the rotated basis (see :mod:`spinpass.record`).

    Raises:
        ProgramError, QuantizedWeightError: the input is not a floating-point inference program.
        ConfigError: a setting or the plan does not fit the program, or both a config and a plan are given.
        RefusedError: no requested rotation can be applied exactly; the reasons are listed.
        InvariantError: a pass broke the program, which is a bug in spinpass.
        VerificationError: the result is not equivalent, which is one as well. ``certificate`` is None, and nothing is
            compared, with ``verify=False`` and, unless it is asked for, above 50 million parameters.

    Source: R1–R4 of SpinQuant, arXiv 2405.16406, section 3; online Hadamards of QuaRot, arXiv 2404.00456.
    """
    config = _config(config, plan)
    editor, planner = _edited(program, config, plan)
    decided = planner.plan()
    if not decided.spaces:
        raise RefusedError("nothing was rotated:\n" + "\n".join(f"  {r}" for r in decided.refusals))
    made = _record(planner)
    record.write(editor.graph, made)
    result = editor.finish(progress)
    if not _is_certified(program, config):
        return Rotated(result, decided, None)
    certificate = verify(program, result, exact=editor.exact_constants())
    certificate.raise_if_failed()
    record.write(result.graph, replace(made, certificate=certificate.to_dict()))
    return Rotated(result, decided, certificate)


def transform(
    program: ExportedProgram,
    config: RotationConfig | None = None,
    *,
    plan: RotationPlan | None = None,
    progress: Progress | None = None,
) -> ExportedProgram:
    """Return the rotated program alone. Arguments and errors are those of :func:`rotate`, of whose result it is a part.

    The program has the same inputs, outputs, dtypes and dynamic shapes as the one given.
    """
    return rotate(program, config, plan=plan, progress=progress).program


def plan(program: ExportedProgram, config: RotationConfig | None = None) -> RotationPlan:
    """Return the decisions that :func:`rotate` would make. No weight is read, and the program is not changed.

    Raises:
        ProgramError, QuantizedWeightError, ConfigError: as :func:`rotate`.
    """
    return _edited(program, _config(config, None), None)[1].plan()


def _edited(
    program: ExportedProgram, config: RotationConfig, plan: RotationPlan | None
) -> tuple[ProgramEditor, Planner]:
    """Return the program after all passes, its constants not yet computed, and the planner that has decided."""
    runner = PassRunner(program)
    planner = Planner(runner.editor, config, plan, record.read(program))
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


def _is_certified(program: ExportedProgram, config: RotationConfig) -> bool:
    """Return whether the result is to be certified."""
    if config.verify is not None:
        return config.verify
    small: bool = sum(t.numel() for t in program.state_dict.values()) <= VERIFY_LIMIT
    if not small:
        _log.info("not certified: more than %s parameters; call spinpass.verify(before, after)", f"{VERIFY_LIMIT:,}")
    return small


def _config(config: RotationConfig | None, plan: RotationPlan | None) -> RotationConfig:
    """Return the configuration that counts, the plan's or the one given or the default."""
    if plan is not None:
        if config is not None and config is not plan.config:
            raise ConfigError("give either a config or a plan: the plan brings its own configuration")
        return plan.config
    if config is not None and not isinstance(config, RotationConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not a spinpass.RotationConfig")
    return config or RotationConfig()


def _record(planner: Planner) -> record.Record:
    """Return what the program will say of itself, the caches of earlier rotations included."""
    earlier = planner.earlier or record.Record(_version())
    inputs, outputs = dict(earlier.inputs), dict(earlier.outputs)
    for planned, carried in planner.carried:
        entry = record.Carried(planned.rotation, carried.layout.dims[0] - len(shape(carried.node)), planned.name)
        if carried.output is None:
            inputs[carried.node.name] = entry
        else:
            outputs[planner.editor.user_output_index(carried.output)] = entry
    rotations = earlier.rotations | {s.name: s.rotation.fingerprint() for s in planner.planned}
    return record.Record(_version(), inputs, outputs, planner.config.to_dict(), rotations)


def _version() -> str:
    try:
        return version("spinpass")
    except PackageNotFoundError:  # run from a source tree
        return "0"
