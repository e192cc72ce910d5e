"""learned_bases:  a rotated program, where it was folded, inputs  ->  the changes of basis that round best.

    min over M  Σ KL( softmax f(x) ‖ softmax f̂(x; M) ),  f̂ with every activation and cache rounded, and some weights

No kernel gets slower by it: a learned Kronecker product takes the place of the Hadamard's of the same factors, and what
is folded into weights costs nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.graph import Handle, Layout, ProgramEditor, device_of, storage_key
from spinpass.learning import Learning, LearningPart, LearningRecord, Lesson, parted, taught
from spinpass.passes import stored_factors
from spinpass.progress import Progress
from spinpass.rotations import Rotation
from spinpass.workers import Team

from ..kinds import LEARNABLE, TRANSFORM
from ..layers import ChosenSites
from ..packed import training  # noqa: F401  (registers the gradients of roundings)
from ..scheme import QuantizationConfig, Weights
from .transforms import FoldedConstant, LearnedFactor, LearnedTransform

_Folds = list[tuple[LearnedTransform, Layout, bool]]


@dataclass(frozen=True)
class Basis:
    """One change of basis of a rotated program.

    Args:
        space: its name.
        rotation: with factors.
        orthogonal: only rotations are admitted.
        folds: of every constant that has taken it up, its name, where the vectors lie, and whether it reads them.
    """

    space: str
    rotation: Rotation
    orthogonal: bool
    folds: Sequence[tuple[str, Layout, bool]]


def learned_bases(
    original: ExportedProgram,
    rotated: ExportedProgram,
    bases: Sequence[Basis],
    config: QuantizationConfig,
    inputs: Sequence[object],
    settings: Learning,
    *,
    held_out: Sequence[object] | None = None,
    checkpoint: Path | None = None,
    team: Team | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Rotation], LearningRecord]:
    """Learn changes of basis for a scheme. Neither program is changed.

    Args:
        original: whose predictions are aimed at.
        rotated: what was made of it with the ``bases``, in floats.
        bases: what is learned. Those whose constants the program does not have under their names stay as they are.
        config: what will be rounded. Weights that GPTQ will round stay in floats while bases are learned: what it
            makes up for is another error than that of rounding to nearest, and learning from the latter does harm
            (measured). Others are rounded to nearest in the range of all their values.
        inputs, settings, held_out, checkpoint, team, progress: as for :func:`.learn.learned`; of the kinds, only
            ``transforms`` counts.

    Returns:
        By name of a space the changes of basis that help on the inputs held out, none where none does; and the course.

    Raises:
        ConfigError: nothing of these can be learned, or there are no inputs, or they do not fit.
        LearningError: the loss became no number.
    """
    if not inputs:
        raise ConfigError("learning needs calibration inputs; give some")
    made = _Student(rotated, bases, config)
    shown, judged = parted(inputs) if held_out is None else (list(inputs), list(held_out))
    teacher = original if settings.phases == ("full",) else rotated
    rates = {TRANSFORM.name: LEARNABLE[TRANSFORM.name].rate}
    options: dict[str, Any] = {"checkpoint": checkpoint, "team": team, "progress": progress}
    run = " ".join([repr(replace(config, learn=None)), *(basis.rotation.fingerprint() for basis in bases)])
    asked = replace(settings, kinds=(TRANSFORM.name,))
    course = taught(Lesson(made.program, teacher, shown, judged), made.parts, asked, rates, run=run, **options)
    learned = {space: transform.learned() for space, transform in made.transforms.items()} if course.kept else {}
    return learned, course


class _Student:
    """A rotated program with roundings in its graph, whose weights and factors are parts."""

    def __init__(self, rotated: ExportedProgram, bases: Sequence[Basis], config: QuantizationConfig) -> None:
        editor = ProgramEditor(rotated)
        sites = ChosenSites(editor, replace(config, learn=None, average_bits=None, mixed_rows=False))
        schemes = {editor.fqn(site.weight): (site.dim, scheme) for site, scheme in sites.weights}
        schemes |= {editor.fqn(table): (1, scheme) for table, scheme in sites.tables}
        nearest = [name for name, (_, scheme) in schemes.items() if scheme.method == "rtn"]
        if not (sites.activations or sites.caches or nearest):
            raise ConfigError(
                "no basis is better than another here: neither activations nor caches are rounded, and GPTQ's weights "
                "stay in floats while bases are learned; leave transforms out"
            )
        if sites.static:
            raise ConfigError("static ranges are not known before the weights are: learn bases with ranges per token")
        self.program = editor.finish()
        state, device = rotated.state_dict, device_of(rotated)
        self.transforms = {
            basis.space: LearnedTransform(basis.rotation, basis.orthogonal, device)
            for basis in bases
            if basis.rotation.factors and all(name in state for name, _, _ in basis.folds)
        }
        if not self.transforms:
            raise ConfigError("no change of basis of this program can be learned: rotate it, and give it factors")
        places = {spec.target: spec.arg.name for spec in self.program.graph_signature.input_specs}
        folds: dict[str, _Folds] = {}
        for basis in bases:
            if basis.space in self.transforms:
                for name, layout, reads in basis.folds:
                    folds.setdefault(name, []).append((self.transforms[basis.space], layout, reads))
        folded = _folded(state, folds, schemes, places)
        factors = [
            LearnedFactor(self.transforms[basis.space], *how, state[name].dtype, (places[name],))
            for basis in bases
            if basis.space in self.transforms
            for name, how in stored_factors(editor, basis.rotation, basis.space).items()
        ]
        self.parts: list[LearningPart] = [*self.transforms.values(), *factors, *folded]


def _folded(
    state: Mapping[str, Tensor],
    folds: Mapping[str, _Folds],
    schemes: Mapping[str, tuple[int, Weights]],
    places: Mapping[str | None, str],
) -> list[FoldedConstant]:
    """The constants that are folded or rounded, each once for all of its names."""
    names: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(storage_key(tensor), []).append(name)
    found: list[FoldedConstant] = []
    for each in names.values():
        own = next((folds[name] for name in each if name in folds), [])
        dim, scheme = next((schemes[name] for name in each if name in schemes), (-1, None))
        used = tuple(places[name] for name in each if name in places)
        if used and (own or (scheme is not None and scheme.method == "rtn")):
            tensor = state[each[0]]
            stored = tensor.read() if isinstance(tensor, Handle) else tensor.detach()
            nearest = scheme is not None and scheme.method == "rtn"
            plain = replace(scheme, clip=False, group_bits=None) if scheme is not None and nearest else None
            found.append(FoldedConstant(stored, own, used, dim, plain))
    return found
