"""learned:  a quantized program, the original, inputs  ->  the same kernels with better numbers in them.

    min over moves  Σ KL( softmax f(x) ‖ softmax f̂(x; moves) )

over the tokens of the inputs: every number learns what the rounding of all other layers has done. No graph is rewritten
for it: a part computes a constant of the quantized program from moves (:mod:`spinpass.learning`), and what it has come
to goes back into the codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.graph import (
    Handle,
    ProgramEditor,
    arguments,
    device_of,
    moved,
    op_name,
    storage_key,
    with_other_values,
)
from spinpass.learning import Learning, LearningPart, Lesson, parted, places_of, taught
from spinpass.progress import Progress
from spinpass.workers import Team

from ..kinds import CLIP, GAIN, LATENT, LEARNABLE, OFFSET, check_kinds, kinds_of_bases
from ..layers import ORIGIN
from ..packed import (
    source_of,
    training,  # noqa: F401  (registers the gradients of roundings)
)
from ..report import Quantized, QuantizedWeight
from ..rounding import Coded
from ..scheme import FINE
from .clips import LearnedClip
from .gains import LearnedVector
from .weights import LearnedWeight, rests_of

_ROUNDING = "spinpass::round_tokens"


def learned(
    program: ExportedProgram,
    quantized: Quantized,
    inputs: Sequence[object],
    settings: Learning | None = None,
    *,
    held_out: Sequence[object] | None = None,
    checkpoint: Path | None = None,
    team: Team | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Learn what a quantized program computes with. Neither program is changed.

    The errors in the report are those before learning. It takes the memory of a backward pass, and of each kind of
    moves what there is of it, with two numbers of Adam for each.

    Args:
        program: the original, which was quantized; its first output are logits (…, vocabulary).
        quantized: what was made of it.
        inputs: as for :func:`spinpass.quantization.quantize`.
        settings: what is learned, and for how long; by default the scales, in one round.
        held_out: inputs of another text, which decide what is kept. None holds out one of sixteen, spread over them.
        checkpoint: a file to go on from where a run was stopped, to the same result.
        team: the ranks that share each step's windows.
        progress: called with (windows run, all windows that will be).

    Returns:
        The program and report with what was learned, or ``quantized`` where it does not lower the divergence on the
        inputs held out; the report says which, and by how much.

    Raises:
        ConfigError: there is nothing of these kinds, there are too few inputs or they do not fit, the first output is
            no logits, or the program was not made of this original.
        LearningError: the loss became no number.
    """
    settings = settings or Learning()
    check_kinds(settings.kinds)
    early = kinds_of_bases(settings.kinds)
    if early:
        raise ConfigError(
            f"{' and '.join(early)} are learned before anything is rounded: use spinpass.learn, or leave them out"
        )
    if not inputs:
        raise ConfigError("learning needs calibration inputs; give some")
    report = quantized.report
    if not (report.weights or report.activations or report.caches):
        raise ConfigError("nothing of the program is rounded, so there is nothing to learn: quantize it first")
    made = _Learner(program, quantized, settings.kinds)
    run = _described(quantized, settings.kinds)
    shown, judged = parted(inputs) if held_out is None else (list(inputs), list(held_out))
    del quantized  # its weights are made again of the codes, which are kept
    rates = {name: kind.rate for name, kind in LEARNABLE.items()}
    lesson = Lesson(made.program, program, shown, judged)
    options: dict[str, Any] = {"checkpoint": checkpoint, "run": run, "team": team, "progress": progress}
    return made.result(taught(lesson, made.parts, settings, rates, **options))


class _Learner:
    """A quantized program whose constants are parts.

    Attributes:
        program: the program that learns; the weights that do take no memory in it.
        parts: what learns.
    """

    def __init__(self, original: ExportedProgram, quantized: Quantized, kinds: Sequence[str]) -> None:
        program, self.report = quantized.program, quantized.report
        self.names = _names(program, self.report.weights)
        self.weights = {
            name: _weight(original, program, self.report.weights[name], names, kinds)
            for name, names in self.names.items()
        }
        self.device = device_of(program)
        self.weights = {name: part for name, part in self.weights.items() if part.moves}
        lazy = {name for name, tensor in program.state_dict.items() if isinstance(tensor, Handle)}
        self.lazy = {name for name in self.weights if self.names[name][0] in lazy}
        self.emptied = _emptied(program, [n for name in self.weights for n in self.names[name]])
        self.vectors = _vectors(program, self.names) if GAIN.name in kinds else {}
        self.program, self.clips = self.emptied, dict[str, LearnedClip]()
        if CLIP.name in kinds:
            self.program, self.clips = _with_clips(self.emptied)
        self.parts: list[LearningPart] = [*self.weights.values(), *self.vectors.values(), *self.clips.values()]

    def result(self, course: Any) -> Quantized:
        """Return the program and report with what was learned."""
        weights: dict[str, QuantizedWeight] = dict(self.report.weights)
        if course.kept:
            for name, part in self.weights.items():
                made, host = part.learned(), weights[name].codes.q.device
                weights[name] = replace(made, codes=made.codes.on(host))
        changed: dict[str, Tensor] = {}
        for name, part in self.weights.items():
            source = moved(Coded(weights[name].codes, part.weight.dim, part.shape, part.dtype), self.device)
            value = Handle(source) if name in self.lazy else source.read(slice(None))
            changed |= dict.fromkeys(self.names[name], value)
        if course.kept:
            changed |= {name: part.value().detach() for name, part in self.vectors.items()}
        program = with_other_values(self.emptied, changed)
        if course.kept and self.clips:
            program = _clipped(program, {name: float(part.value().detach()) for name, part in self.clips.items()})
        return Quantized(program, replace(self.report, weights=weights, learning=course))


def _weight(
    original: ExportedProgram,
    program: ExportedProgram,
    weight: QuantizedWeight,
    names: Sequence[str],
    kinds: Sequence[str],
) -> LearnedWeight:
    stored, places = program.state_dict[names[0]], places_of(program)
    there = replace(weight, codes=weight.codes.on(stored.device))
    rests = _rests(original, program, there, names) if {OFFSET.name, LATENT.name} & set(kinds) else None
    return LearnedWeight(there, tuple(places[name] for name in names), stored.shape, stored.dtype, kinds, rests)


def _rests(
    original: ExportedProgram, program: ExportedProgram, weight: QuantizedWeight, names: Sequence[str]
) -> Tensor | None:
    """Return how far the weight of the original lies from its codes; None where it does not have it."""
    for name in names:
        source, columns = source_of(name, program.state_dict)
        exact = original.state_dict.get(source)
        if exact is None:
            continue
        whole = (exact.read() if isinstance(exact, Handle) else exact.detach()).movedim(weight.dim, -1)
        matrix = whole.reshape(-1, whole.shape[-1])
        matrix = matrix if columns is None else matrix[:, columns]
        if matrix.shape == weight.codes.q.shape:
            return rests_of(matrix, weight.codes)
    return None


def _names(program: ExportedProgram, weights: Iterable[str]) -> dict[str, list[str]]:
    """By name of a rounded weight all names under which the program has it."""
    at: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in program.state_dict.items():
        at.setdefault(storage_key(tensor), []).append(name)
    return {name: at[storage_key(program.state_dict[name])] for name in weights if name in program.state_dict}


def _vectors(program: ExportedProgram, rounded: Mapping[str, Sequence[str]]) -> dict[str, LearnedVector]:
    """The parameters of floats with one axis that are read, by name."""
    taken = {name for names in rounded.values() for name in names}
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    places = places_of(program)
    found: dict[str, LearnedVector] = {}
    for name, tensor in program.state_dict.items():
        is_vector = tensor.ndim == 1 and tensor.is_floating_point() and name in program.graph_signature.parameters
        if is_vector and name not in taken and places[name] in read:
            stored = tensor.read() if isinstance(tensor, Handle) else tensor.detach()
            found[name] = LearnedVector(stored, (places[name],))
    return found


def _emptied(program: ExportedProgram, names: Iterable[str]) -> ExportedProgram:
    """The program with constants that take no memory: zeros of their shape and dtype."""
    empty: dict[str, Tensor] = {}
    for name in names:
        tensor = program.state_dict[name]
        empty[name] = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return with_other_values(program, empty)


def _with_clips(program: ExportedProgram) -> tuple[ExportedProgram, dict[str, LearnedClip]]:
    """round_tokens(x, …, c) -> round_tokens_within(x, …, c'), c' a constant that learns, by name of the node."""
    editor = ProgramEditor(program)
    found: dict[str, LearnedClip] = {}
    for node in [n for n in editor.nodes if op_name(n) == _ROUNDING and arguments(n)["bits"] < FINE]:
        given = arguments(node)
        device = device_of(program)
        share = editor.add_constant(
            f"spinpass.{node.name}.clip", torch.tensor(given["clip"], dtype=torch.float32, device=device)
        )
        within = torch.ops.spinpass.round_tokens_within.default
        args = (given["x"], given["bits"], given["symmetric"], share)
        editor.replace(node, editor.call(within, *args, after=node, origin=ORIGIN))
        found[node.name] = LearnedClip(given["clip"], (share.name,), device)
    return editor.finish(), found


def _clipped(program: ExportedProgram, shares: Mapping[str, float]) -> ExportedProgram:
    """The program whose roundings of these names cover these shares of a token's range."""
    editor = ProgramEditor(program)
    for node in editor.nodes:
        if node.name in shares:
            given = arguments(node) | {"clip": shares[node.name]}
            node.args = (given["x"], given["bits"], given["symmetric"], given["clip"])
    return editor.finish()


def _described(quantized: Quantized, kinds: Sequence[str]) -> str:
    """Return what a run begins with: the hash of all codes."""
    digest = hashlib.sha256(repr(kinds).encode())
    for name, weight in sorted(quantized.report.weights.items()):
        codes = weight.codes
        digest.update(name.encode())
        for part in (codes.q, codes.scales, codes.zeros):
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
