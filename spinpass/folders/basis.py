"""Whether a checkpoint's weights are in the basis that it declares: those of the original, rotated so, are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass import record
from spinpass.config import Matrix, RotationConfig
from spinpass.errors import RefusedError, VerificationError
from spinpass.graph import values_of
from spinpass.pipeline import rotate

_ROUNDINGS = 4  # of the largest value, that a weight may be off: folds may have been made by another machine


@dataclass(frozen=True)
class BasisProof:
    """How many constants are those of the original in the declared basis, of how many spaces, and how far off at worst,
    in roundings of the largest value of their constant."""

    constants: int
    spaces: int
    roundings: float

    @property
    def summary(self) -> str:
        """Say it in one line."""
        return (
            f"{self.constants} constants are the original's in the {self.spaces} declared bases, at worst "
            f"{self.roundings:.2g} roundings off"
        )


def check_basis(
    original: ExportedProgram,
    rotated: ExportedProgram,
    declared: record.Record,
    matrices: Mapping[str, Matrix | Sequence[Matrix]] | None = None,
) -> BasisProof:
    """Compare each weight of a checkpoint with that of the original in the basis that the checkpoint declares.

    Args:
        original: the program of the original.
        rotated: that of the checkpoint, exported alike.
        declared: what the checkpoint says of itself.
        matrices: those that it was rotated by, where they were given then.

    Raises:
        ConfigError: what is declared is no configuration; matrices are needed, or others than those given.
        VerificationError: the original has no such space, or another rotation in it; a weight is another.
    """
    config = RotationConfig.from_dict(declared.config, matrices)
    try:
        made = rotate(original, replace(config, verify=False))
    except RefusedError as error:
        raise VerificationError(f"the original cannot be rotated as the checkpoint declares: {error}") from error
    found = {space.name: space.rotation.fingerprint() for space in made.plan.spaces}
    for space in sorted(found.keys() | declared.rotations.keys()):
        if found.get(space) != declared.rotations.get(space):
            raise VerificationError(
                f"the checkpoint declares {_short(declared.rotations.get(space))} for {space}, and its settings make "
                f"{_short(found.get(space))} there of this original"
            )
    expected, given = made.program.state_dict, rotated.state_dict
    for name in sorted(expected.keys() ^ given.keys()):
        raise VerificationError(f"{name} is in one of the original, rotated as declared, and the checkpoint alone")
    worst = max(_distance(name, values_of(value), values_of(given[name])) for name, value in expected.items())
    return BasisProof(len(expected), len(found), worst)


def _short(fingerprint: str | None) -> str:
    return "no rotation" if fingerprint is None else f"the rotation {fingerprint[:12]}"


def _distance(name: str, expected: Tensor, given: Tensor) -> float:
    """Return how many roundings of the largest value two constants are apart. Raises VerificationError where many."""
    if expected.shape != given.shape:
        raise VerificationError(
            f"{name} is {list(given.shape)} in the checkpoint, {list(expected.shape)} by the original"
        )
    if not given.is_floating_point() or not given.numel():
        return 0.0
    step = torch.finfo(given.dtype).eps * float(expected.abs().max())
    off = float((given.double() - expected.double()).abs().max())
    if not off <= _ROUNDINGS * step:
        raise VerificationError(
            f"{name} of the checkpoint is not that of the original in the basis that it declares (off by {off:.1e}): "
            "it was changed since, or is of another model"
        )
    return off / step if step else 0.0
