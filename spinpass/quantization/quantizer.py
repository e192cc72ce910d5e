"""quantize:  program, configuration, calibration inputs  ->  a program that computes as the quantized one would.

Roundings of activations and caches become nodes of the graph. Weights become the constants that their codes stand for,
and the codes are returned beside the program. With calibration inputs one run through the graph does all that depends
on them (:mod:`.calibration.lockstep`): every layer is calibrated on what the quantized layers before it return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass import operators  # noqa: F401  (registers torch.ops.spinpass)
from spinpass.errors import ConfigError
from spinpass.execution import constants
from spinpass.graph import Handle, ProgramEditor, arguments, with_other_values
from spinpass.passes import open_program
from spinpass.progress import Progress
from spinpass.workers import Team

from .calibration import Calibrator, allocated, run_in_lockstep, token_counts
from .layers import ORIGIN, ChosenSites
from .learned import learned
from .packed import split_rows
from .report import CodesStore, Quantized
from .scheme import QuantizationConfig

_JUDGED_ON = 8  # windows, for the bits of layers: twice as many where they are shorter


def quantize(
    program: ExportedProgram,
    config: QuantizationConfig | str,
    calibration: Sequence[object] = (),
    *,
    training: Sequence[object] | None = None,
    held_out: Sequence[object] | None = None,
    checkpoint: Path | None = None,
    learning: Callable[[], Progress] | None = None,
    store: CodesStore | None = None,
    team: Team | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a floating-point program, rotated or not. The program is not changed.

    Args:
        program: of a language model, as :func:`spinpass.transform` takes and returns it.
        config: what to quantize. A string is parsed by :meth:`QuantizationConfig.parse`.
        calibration: inputs of the program, each as ``program.example_inputs`` has them or a mapping by name. GPTQ and
            static ranges are made on all of them together.
        training: inputs for what needs gradients, ``learn`` and ``average_bits``; by default those of the
            calibration. Shorter ones need less memory.
        held_out: inputs of another text, which decide whether what was learned is kept; None holds out some of those.
        checkpoint: a file in which what is being learned is saved now and then, and from which it goes on.
        learning: called once where learning begins; it returns what is called with the progress of that.
        store: where codes are kept, and found that a run of the same program, configuration and inputs has left; None
            keeps them in memory, a byte for each.
        team: the ranks that quantize together, see :mod:`spinpass.workers`; all call this alike. Each runs its share of
            the calibration inputs and rounds its share of the weights; ``average_bits`` is found by each rank, and
            learning is shared where a step has a window for each rank, and is rank 0's alone elsewhere, so that the
            others return the program before that.
        progress: called with (steps done, all steps) while weights are rounded.

    Returns:
        The quantized program, whose weights have the dtypes of the original ones, and the report with their codes.

    Raises:
        ConfigError: calibration inputs are needed and there are none, or they do not fit the program, or the program
            has nothing to quantize.
        ProgramError: the program is not one of inference over dense tensors.
        LearningError: the loss became no number.
        QuantizedWeightError: it is packed, or has other weights that are quantized already.
    """
    chosen = QuantizationConfig.parse(config) if isinstance(config, str) else config
    team = team or Team()
    if chosen.needs_calibration and not calibration:
        raise ConfigError(
            "GPTQ, static activations, learning and bits on average need calibration inputs: give some, or round to "
            "nearest, 'rtn' in place of 'gptq'"
        )
    if calibration:
        check_shares(len(calibration), team)
    if chosen.average_bits is not None:
        judged = _spread(calibration, _JUDGED_ON) if training is None else _spread(training, 2 * _JUDGED_ON)
        chosen = allocated(program, chosen, judged, progress)
    settings = chosen.learn
    together = settings is not None and settings.batch >= team.size
    if settings is None or not (together or team.leads):
        return _rounded(program, chosen, calibration, store, team, progress)
    shown = calibration if training is None else training
    # no name here holds on to what was rounded: its weights are let go while it is learned
    return learned(
        program,
        _rounded(program, chosen, calibration, store, team, progress),
        shown,
        settings,
        held_out=held_out,
        checkpoint=checkpoint,
        team=team if together else None,
        progress=progress if learning is None else learning(),
    )


def check_shares(windows: int, team: Team) -> None:
    """Raise ConfigError where there are fewer calibration inputs than ranks, each of which takes some."""
    if windows < team.size:
        raise ConfigError(
            f"{team.size} workers and {windows} calibration windows: start at most {windows} workers, or read more "
            "windows (--samples)"
        )


def _spread(inputs: Sequence[object], count: int) -> list[object]:
    """So many of the inputs, from the whole of the text."""
    return [inputs[k * len(inputs) // count] for k in range(count)] if len(inputs) > count else list(inputs)


def _rounded(
    program: ExportedProgram,
    chosen: QuantizationConfig,
    calibration: Sequence[object],
    store: CodesStore | None,
    team: Team,
    progress: Progress | None,
) -> Quantized:
    """Round what is chosen. What only that needs is let go with the return."""
    editor = open_program(program)
    sites = ChosenSites(editor, chosen)
    if not (sites.weights or sites.tables or sites.activations or sites.caches):
        reasons = dict.fromkeys(sites.kept.values()) or ["no linear layers"]
        raise ConfigError("there is nothing to quantize: " + "; ".join(reasons))
    prepared = editor.finish()
    counts: dict[str, list[Tensor]] = {}
    weighed = {sites.fqns[site.weight.name] for site, how in sites.weights if how.fisher}
    if weighed:
        counts = token_counts(program, weighed, calibration, team, progress)
    calibrator = Calibrator(prepared, sites, store, team, counts)
    if calibration:
        reference = set(sites.roundings) if chosen.follows else None
        run_in_lockstep(prepared, team.dealt(calibration), calibrator.watches(), reference, progress)
    calibrator.rest(progress if not calibration else None)
    result = ProgramEditor(prepared)
    by_name, held = {n.name: n for n in result.nodes}, constants(prepared)
    later: dict[str, Tensor] = {}
    for name, compute in calibrator.changed.items():
        if isinstance(held[name], Handle):
            later |= dict.fromkeys(result.fqns(by_name[name]), compute())
        else:
            result.queue(by_name[name], lambda _, new=compute: new().double())  # type: ignore[misc]
    for name in sites.static:
        _drop_limit(result, by_name[name])
    finished = with_other_values(result.finish(), later) if later else result.finish()
    return split_rows(Quantized(finished, calibrator.report(program)))


def _drop_limit(editor: ProgramEditor, node: Node) -> None:
    """round_rows(x, …, ∞) -> round_tensor(x, …)"""
    args = arguments(node)
    if args.pop("limit") == math.inf:
        plain = editor.call(torch.ops.spinpass.round_tensor.default, *args.values(), after=node, origin=ORIGIN)
        editor.replace(node, plain, list(node.users))
