"""learned_bases:  a rotated program, where it was folded, inputs  ->  the changes of basis that round best.

    min over M  Σ KL( softmax f(x) ‖ softmax f̂(x; M) ),  f̂ with every activation and cache rounded, and some weights

No kernel gets slower by it: a learned Kronecker product takes the place of the Hadamard's of the same factors, and what
is folded into weights costs nothing at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass.config import Role
from spinpass.errors import ConfigError
from spinpass.graph import Handle, Layout, ProgramEditor, device_of, storage_key
from spinpass.learning import Learning, LearningPart, LearningRecord, Lesson, parted, places_of, taught
from spinpass.progress import Progress
from spinpass.rotations import Rotation
from spinpass.workers import Team

from ..kinds import LEARNABLE, kinds_of_bases
from ..layers import ChosenSites
from ..packed import training  # noqa: F401  (registers the gradients of roundings)
from ..scheme import QuantizationConfig, Weights
from .changes import BasisKind, LearnedChange, LearningPlace
from .folded import FoldedConstant, without_upper
from .gates import GATES
from .stacks import STACKS
from .transforms import TRANSFORMS

_KINDS: Mapping[str, BasisKind] = {each.kind.name: each for each in (GATES, STACKS, TRANSFORMS)}
"""By name, the first that goes somewhere first."""

_Begun = list[tuple[Rotation, LearnedChange | None, Layout, bool]]


@dataclass(frozen=True)
class Basis:
    """One change of basis of a rotated program.

    Args:
        space: its name.
        rotation: what it begins with.
        orthogonal: only rotations are admitted.
        folds: of every constant that has taken it up, its name, where the vectors lie, and whether it reads them.
        kind: of what is learned of it; None for one that stays as it is, which others may lie below.
    """

    space: str
    rotation: Rotation
    orthogonal: bool
    folds: Sequence[tuple[str, Layout, bool]]
    kind: str | None


def begun_basis(place: LearningPlace, kinds: Collection[str]) -> tuple[str, Rotation] | None:
    """Return by which of some kinds a space learns, and with what it begins; None where it does not."""
    for name, each in _KINDS.items():
        found = each.begin(place) if name in kinds else None
        if found is not None:
            return name, found
    return None


def needs_of_bases(kinds: Collection[str]) -> str:
    """Return what some kinds go to, as a phrase."""
    return " or ".join(each.needs for name, each in _KINDS.items() if name in kinds)


def roles_of_bases(kinds: Collection[str]) -> tuple[Role, ...]:
    """Return the rotations that a program has to be asked for, so that some kinds have places."""
    return tuple(role for name, each in _KINDS.items() if name in kinds for role in each.roles)


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
        bases: its changes of basis, in the order in which they were folded. Those whose constants the program does not
            have under their names stay as they are.
        config: what will be rounded. Weights that GPTQ will round stay in floats while bases are learned: what it
            makes up for is another error than that of rounding to nearest, and learning from the latter does harm
            (measured). Others are rounded to nearest in the range of all their values.
        inputs, settings, held_out, checkpoint, team, progress: as for :func:`.learn.learned`; of the kinds, only
            those of bases count.

    Returns:
        By name of a space the changes of basis of the kinds that help on the inputs held out, none where none does; and
        the course.

    Raises:
        ConfigError: nothing of these can be learned, or there are no inputs, or they do not fit.
        LearningError: the loss became no number.
    """
    if not inputs:
        raise ConfigError("learning needs calibration inputs; give some")
    made = _Student(rotated, bases, config)
    shown, judged = parted(inputs) if held_out is None else (list(inputs), list(held_out))
    teacher = original if settings.phases == ("full",) else rotated
    kinds = kinds_of_bases(settings.kinds)
    rates = {kind: LEARNABLE[kind].rate for kind in kinds}
    options: dict[str, Any] = {"checkpoint": checkpoint, "team": team, "progress": progress}
    run = " ".join([repr(replace(config, learn=None)), *(basis.rotation.fingerprint() for basis in bases)])
    lesson = Lesson(made.program, teacher, shown, judged)
    course = taught(lesson, made.parts, replace(settings, kinds=kinds), rates, run=run, **options)
    kept = {space: each for space, each in made.changes.items() if course.kept and {*each.moves} <= {*course.kinds}}
    return {space: each.learned() for space, each in kept.items()}, course


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
                "stay in floats while bases are learned; leave changes of basis out"
            )
        if sites.static:
            raise ConfigError("static ranges are not known before the weights are: learn bases with ranges per token")
        self.program = editor.finish()
        state, device = rotated.state_dict, device_of(rotated)
        self.changes = {
            basis.space: _KINDS[basis.kind].part(basis.rotation, basis.orthogonal, device)
            for basis in bases
            if basis.kind is not None and all(name in state for name, _, _ in basis.folds)
        }
        if not self.changes:
            raise ConfigError("no change of basis of this program can be learned: rotate it, and give it factors")
        begun: dict[str, _Begun] = {}
        for basis in bases:
            for name, layout, reads in basis.folds:
                entry = (basis.rotation, self.changes.get(basis.space), layout, reads)
                begun.setdefault(name, []).append(entry)
        inserted = [
            part for space, change in self.changes.items() for part in change.inserted(editor, space, self.program)
        ]
        folded = _folded(state, begun, schemes, places_of(self.program))
        self.parts: list[LearningPart] = [*self.changes.values(), *inserted, *folded]


def _folded(
    state: Mapping[str, Tensor],
    begun: Mapping[str, _Begun],
    schemes: Mapping[str, tuple[int, Weights]],
    places: Mapping[str, str],
) -> list[FoldedConstant]:
    """The constants that are folded or rounded, each once for all of its names."""
    names: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(storage_key(tensor), []).append(name)
    found: list[FoldedConstant] = []
    for each in names.values():
        own = next((begun[name] for name in each if name in begun), [])
        learns = any(change is not None for _, change, _, _ in own)
        dim, scheme = next((schemes[name] for name in each if name in schemes), (-1, None))
        nearest = scheme is not None and scheme.method == "rtn"
        used = tuple(places[name] for name in each if name in places)
        if used and (learns or nearest):
            tensor = state[each[0]]
            whole = tensor.read() if isinstance(tensor, Handle) else tensor.detach()
            stored, folds, rest = without_upper(whole, own)
            plain = replace(scheme, clip=False, group_bits=None) if scheme is not None and nearest else None
            found.append(FoldedConstant(stored, folds, used, tensor.dtype, dim, plain, rest))
    return found
