"""One program -> one record: what the pass does to it in each configuration, and whether the function is the same."""

from __future__ import annotations

import copy
import hashlib
import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import certificate, record
from spinpass.config import ROLES, RotationConfig
from spinpass.errors import ConfigError, InvariantError, ProgramError, SpinpassError, VerificationError
from spinpass.execution import flat_inputs, run
from spinpass.planning import RotationPlan

from . import decoding
from .states import BROKEN, CHANGED, NOISIER, REFUSED, SAME, UNCHECKED, UNTYPED
from .structure import Structure, structure_of

CONFIGS: dict[str, RotationConfig] = {
    "default": RotationConfig(verify=False),
    "untie": RotationConfig(tied="untie", verify=False),
    "online": RotationConfig(form="online", verify=False),
}
_SEVERITY = (SAME, REFUSED, UNCHECKED, NOISIER, BROKEN, UNTYPED, CHANGED)
_LONGEST = 2000


def measure(program: ExportedProgram, *, configs: dict[str, RotationConfig] | None = None) -> dict[str, Any]:
    """Plan, transform and certify ``program`` in every configuration.

    ``status`` is that of the default configuration unless another one fails. Never raises for what the pass does.
    """
    chosen = CONFIGS if configs is None else configs
    found: dict[str, Any] = {"nodes": len(program.graph.nodes)}
    try:
        structure = structure_of(program)
    except SpinpassError as error:
        return found | {"status": REFUSED, "why": _message(error), "runs": {}}
    except Exception as error:  # the very thing that is measured
        return found | {"status": UNTYPED, "why": _traceback(error), "runs": {}}
    runs: dict[str, dict[str, Any]] = {}
    for name, config in chosen.items():
        runs[name] = measure_config(program, config, structure, runs)
    found |= {"places": structure.counts(), "barriers": structure.barriers()}
    return found | {"status": status_of(runs), "runs": runs}


def status_of(runs: dict[str, dict[str, Any]]) -> str:
    """The first run's status, or the worst failure of any run."""
    worst: str = max((r["status"] for r in runs.values()), key=_SEVERITY.index)
    default: str = next(iter(runs.values()))["status"]
    return default if worst in (SAME, REFUSED) else worst


def measure_config(
    program: ExportedProgram, config: RotationConfig, structure: Structure, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What one configuration does; one that decides as an ``earlier`` one did is not carried out again.

    ``seconds`` are those of an uncertified transform, of CPU time: the machine may be busy with other workers.
    """
    found: dict[str, Any] = {}
    try:
        started = time.process_time()
        plan = spinpass.plan(program, config)
        found |= {"plan_seconds": time.process_time() - started, **_decisions(plan, structure)}
        twin = next((n for n, run in (earlier or {}).items() if run.get("decided") == found["decided"]), None)
        if earlier and twin is not None:
            return {**earlier[twin], **found, "as": twin}
        started = time.process_time()
        after = spinpass.transform(program, config)
        found["seconds"] = time.process_time() - started
        return found | _check(program, after, config)
    except InvariantError as error:
        return found | {"status": BROKEN, "why": _traceback(error)}
    except SpinpassError as error:
        return found | {"status": REFUSED, "why": _message(error)}
    except Exception as error:  # the very thing that is measured
        return found | {"status": UNTYPED, "why": _traceback(error)}


def _decisions(plan: RotationPlan, structure: Structure) -> dict[str, Any]:
    return {
        "spaces": {
            role: {
                "offline": sum(s.role == role and not s.online for s in plan.spaces),
                "online": sum(s.role == role and bool(s.online) for s in plan.spaces),
                "parts": sum(len(s.online) for s in plan.spaces if s.role == role),
            }
            for role in ROLES
        },
        "decided": _fingerprint(plan),
        "streams": [{"form": s.form, "parts": len(s.online)} for s in plan.spaces if s.role == "R1"],
        "kept": sorted({note for s in plan.spaces for note in s.notes}),
        "covered": structure.covered(plan),
        "refusals": [{"what": r.what, "why": r.why} for r in plan.refusals],
    }


def _fingerprint(plan: RotationPlan) -> str:
    """A hash that is equal for plans that make the same program of one."""
    spaces = json.dumps(plan.to_dict()["spaces"], sort_keys=True)
    return hashlib.sha256(spaces.encode()).hexdigest()[:12]


# -- the same function? ----------------------------------------------------------------------------------------------


def _check(before: ExportedProgram, after: ExportedProgram, config: RotationConfig) -> dict[str, Any]:
    """The certificate with exact constants; where the program cannot be lifted, the comparison in its own dtype."""
    try:
        certified = spinpass.transform(before, replace(config, verify=True))
    except VerificationError as error:
        # The message is about the worst output, and about float64 if any output fails there.
        status = NOISIER if "in the model's dtype" in str(error) else CHANGED
        found = {**_rounded(before, after), "status": status, "why": _message(error)}
    except (ProgramError, ConfigError) as error:
        found = {"lifting": _message(error), **_unlifted(before, after)}
    else:
        made = record.read(certified)
        assert made is not None and made.certificate is not None
        found = {"status": SAME, **_from_certificate(made.certificate)}
        if not found["outputs"] or not float(made.certificate["outputs"][0]["float64"]["scale"]):
            return found | {"status": UNCHECKED, "why": "the original returns nothing, or nothing finite above zero"}
    return found | _again_unaided(before, after, found)


def _from_certificate(made: dict[str, Any]) -> dict[str, Any]:
    return {
        "dtype": "float64",
        "error": max((_relative(o["float64"]) for o in made["outputs"]), default=0.0),
        "own_dtype": made["dtype"],
        "own_error": max((_relative(o["native"]) for o in made["outputs"]), default=0.0),
        "own_bound": max((float(o["bound_native"]) for o in made["outputs"]), default=0.0),
        "outputs": len(made["outputs"]),
        "closed_loop": made["closed_loop"],
        "closed_loop_steps": made["closed_loop_steps"],
    }


def _rounded(before: ExportedProgram, after: ExportedProgram) -> dict[str, Any]:
    """Compare with the constants as they are stored, rounded."""
    try:
        return _from_certificate(spinpass.verify(before, after).to_dict())
    except SpinpassError:
        return {}


def _unlifted(before: ExportedProgram, after: ExportedProgram) -> dict[str, Any]:
    """Compare in the program's own dtype: the outputs for the example inputs or, with a cache, greedy logits."""
    try:
        if decoding.takes_cache(before):
            ours, theirs = (decoding.greedy(p, float64=False, like=before) for p in (before, after))
        else:
            inputs = flat_inputs(before, before.example_inputs)
            ours, theirs = run(before, inputs), run(after, inputs)
    except (ProgramError, ConfigError) as error:
        return {"status": UNCHECKED, "why": _message(error)}
    off, dtype = _worst(ours, theirs), _float_dtype(ours)
    name, bound = str(dtype).removeprefix("torch."), certificate.BOUNDS[dtype]
    found = {"status": SAME, "dtype": name, "error": off, "own_dtype": name, "own_error": off, "own_bound": bound}
    return found if off <= bound else found | {"status": CHANGED, "why": f"relative error {off:.1e} in {name}"}


def _again_unaided(before: ExportedProgram, after: ExportedProgram, found: dict[str, Any]) -> dict[str, Any]:
    """Ask again without the certificate's machinery: a program that takes a cache decodes greedily; any other is run as
    a module of torch on its example inputs, and the result likewise."""
    if decoding.takes_cache(before):
        return _again_decoding(before, after, found)
    try:
        ours = _as_module(before)
    except Exception as error:  # the original's own guards and unflattening
        return {"module_error": None, "module_why": _message(error)}
    theirs = _as_module(after, before)
    off = _worst(_tensors(ours), _tensors(theirs))
    allowed = max(found.get("own_bound", 0.0), certificate.BOUNDS.get(_float_dtype(ours), 0.0))
    worse = {} if off <= allowed else {"status": CHANGED, "why": f"as modules of torch they differ by {off:.1e}"}
    return {"module_error": off, **worse}


def _again_decoding(before: ExportedProgram, after: ExportedProgram, found: dict[str, Any]) -> dict[str, Any]:
    lifted = found.get("dtype") == "float64"
    try:
        original = decoding.greedy(before, float64=lifted)
    except (ProgramError, ConfigError) as error:
        return {"greedy": None, "greedy_why": _message(error)}
    loop = decoding.compare(original, decoding.greedy(after, float64=lifted, like=before)) | {"lifted": lifted}
    # the constants of ``after`` are rounded to their dtype here
    allowed = max(found.get("own_bound", 0.0), certificate.BOUNDS[torch.float32])
    worse = not loop["tokens_equal"] or not loop["error"] <= allowed
    return {"greedy": loop, **({"status": CHANGED, "why": f"greedy decoding differs: {loop}"} if worse else {})}


def _as_module(program: ExportedProgram, example: ExportedProgram | None = None) -> Any:
    # A program may write into its inputs and its weights, which a module shares with it.
    own, (args, kwargs) = copy.deepcopy(program), copy.deepcopy((example or program).example_inputs)
    with torch.no_grad():
        return own.module()(*args, **kwargs)


def _worst(ours: list[Any], theirs: list[Any]) -> float:
    """The largest relative error of any output."""
    pairs = zip(ours, theirs, strict=True)
    return max((certificate.difference_of(a, b, argmax=False).relative for a, b in pairs), default=0.0)


def _tensors(output: Any) -> list[Any]:
    from torch.utils import _pytree as pytree  # noqa: TID251  # a benchmark takes outputs apart as torch does

    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]


def _float_dtype(output: Any) -> torch.dtype:
    return next((x.dtype for x in _tensors(output) if x.is_floating_point()), torch.float32)


def _relative(difference: dict[str, Any]) -> float:
    error, scale = float(difference["error"]), float(difference["scale"])
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST]


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-_LONGEST:]
