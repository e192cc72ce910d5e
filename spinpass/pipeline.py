"""The pipeline: copy, find, fuse, insert, fold, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from torch.export import ExportedProgram

from spinpass import record
from spinpass.analysis import Space
from spinpass.certificate import verify
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, RefusedError
from spinpass.graph import ProgramEditor, shape
from spinpass.passes import center, fold_rotation, fuse_norm_scale, insert_rotations, materialize, open_program
from spinpass.planning import Planner, RotationPlan, Site

VERIFY_LIMIT = 50_000_000  # parameters up to which `transform` certifies its result unless told otherwise
log = logging.getLogger("spinpass")

PASSES: list[tuple[str, Callable[[ProgramEditor, Site], Space]]] = [
    # first, with the values that the expressions have before anything is queued
    ("Materialize", lambda editor, site: materialize(editor, site.space)),
    # before anything is rotated: a scale can only be moved in the basis it was written in
    ("FuseNormScale", lambda editor, site: fuse_norm_scale(editor, site.space, site.name)),
    # after the scales: what a writer writes is scaled before it is centred
    ("Center", lambda editor, site: center(editor, site.space, site.name)),
    ("InsertRotations", lambda editor, site: insert_rotations(editor, site.space, site.planned.rotation, site.name)),
    # last: whatever the passes before have queued on a constant happens in the original basis
    ("FoldRotations", lambda editor, site: fold_rotation(editor, site.space, site.planned.rotation)),
]


def transform(
    program: ExportedProgram,
    config: RotationConfig | None = None,
    *,
    plan: RotationPlan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportedProgram:
    """Rotate a program without changing the function it computes.

    Args:
        program: of a language model, from ``torch.export.export`` or any exporter built on it. It is not changed.
        config: what to rotate and how; the default inserts R1–R4.
        plan: decisions made earlier by :func:`plan`, perhaps with spaces left out; its configuration is used.
        progress: called with (constants done, all constants) while weights are computed.

    Returns:
        A new program with the same inputs, outputs, dtypes and dynamic shapes; a KV cache travels in the rotated
        basis (see :mod:`spinpass.record`).

    Raises:
        ProgramError, QuantizedWeightError: the input is not a floating-point inference program.
        ConfigError: a setting does not fit the program.
        RefusedError: no requested rotation can be applied exactly; the reasons are listed.
        VerificationError: the result failed its certificate (a bug in spinpass).

    Source: R1–R4 of SpinQuant, arXiv 2405.16406, section 3; online Hadamards of QuaRot, arXiv 2404.00456.
    """
    config = _config(config, plan)
    editor, planner = _rotated(program, config, plan)
    decided = planner.plan()
    if not decided.spaces:
        raise RefusedError("nothing was rotated:\n" + "\n".join(f"  {r}" for r in decided.refusals))
    made = _record(planner)
    record.write(editor.graph, made)
    result = editor.finish(progress)
    if config.verify or (config.verify is None and _parameters(program) <= VERIFY_LIMIT):
        certificate = verify(program, result, exact=editor.exact_constants())
        certificate.raise_if_failed()
        record.write(result.graph, replace(made, certificate=certificate.to_dict()))
    elif config.verify is None:
        log.info("not certified: more than %s parameters; call spinpass.verify(before, after)", f"{VERIFY_LIMIT:,}")
    return result


def plan(program: ExportedProgram, config: RotationConfig | None = None) -> RotationPlan:
    """The decisions that :func:`transform` would make. No weight is read; the program is not changed.

    Raises:
        ProgramError, QuantizedWeightError, ConfigError: as :func:`transform`.
    """
    return _rotated(program, _config(config, None), None)[1].plan()


def _rotated(
    program: ExportedProgram, config: RotationConfig, plan: RotationPlan | None
) -> tuple[ProgramEditor, Planner]:
    editor = open_program(program)
    planner = Planner(editor, config, plan, record.read(program))
    for site in planner.sites():
        for name, run in PASSES:
            started = time.perf_counter()
            site = replace(site, space=run(editor, site))
            log.debug("%-16s %-48s %7.1f ms", name, site.name, 1e3 * (time.perf_counter() - started))
        planner.applied(site)
    if plan is not None and (missing := {s.name for s in plan.spaces} - {s.name for s in planner.planned}):
        raise ConfigError(
            f"the plan has a space {sorted(missing)[0]!r} that this program has not: "
            "plan and program do not belong together"
        )
    return editor, planner


def _config(config: RotationConfig | None, plan: RotationPlan | None) -> RotationConfig:
    if plan is not None:
        if config is not None and config is not plan.config:
            raise ConfigError("give either a config or a plan: the plan brings its own configuration")
        return plan.config
    if config is not None and not isinstance(config, RotationConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not a spinpass.RotationConfig")
    return config or RotationConfig()


def _record(planner: Planner) -> record.Record:
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


def _parameters(program: ExportedProgram) -> int:
    return sum(t.numel() for t in program.state_dict.values())
