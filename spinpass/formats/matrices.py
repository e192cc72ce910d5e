"""Matrices that were learned: those of ``spinpass learn``, and SpinQuant's.

``spinpass learn`` writes JSON: by name of a space its change of basis, as :meth:`spinpass.Rotation.to_dict` has it, and
what it was learned for. SpinQuant's is what ``optimize_rotation.py`` of its authors saves, ``R.bin``:

    R1                             (hidden, hidden)   of the residual stream
    model.layers.K.self_attn.R2    (head, head)       of the values of layer K

A vector x of a space becomes x @ R there (``eval_utils/rotation_utils.py``: an embedding or the weight of a linear that
reads the stream is multiplied by R1 from the right, that of one that writes by R1ᵀ from the left), as it does here.
What their code does beside that is no rotation: it takes the mean off the embedding, which changes the function of a
model with RMSNorm, and puts exact Hadamards at the inputs of down projections, which is R4.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.config import ROLES, Matrix
from spinpass.errors import ConfigError, DamageError
from spinpass.rotations import Rotation

from .archives import check_archive
from .documents import read_object
from .staging import staged


def write_matrices(path: str | Path, matrices: Mapping[str, Rotation], about: Mapping[str, Any]) -> None:
    """Write changes of basis by the names of their spaces, and what they were learned for, for :func:`read_matrices`.

    The file is there whole or not at all.
    """
    content = {"spinpass": "matrices", "about": dict(about), "matrices": {k: m.to_dict() for k, m in matrices.items()}}
    path, text = Path(path), json.dumps(content, indent=1)
    with staged(path.parent, len(text)) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def read_matrices(path: str | Path) -> Mapping[str, Matrix | tuple[Matrix, ...]]:
    """Read matrices of ``spinpass learn``, or as SpinQuant saves them, for ``RotationConfig(matrices=...)``.

    SpinQuant's names say which rotation a matrix is of and, by their numbers, in which order those of one rotation
    come; nothing else in them is looked at. Nothing that is in the file is run.

    Args:
        path: the file, a dict of tensors that ``torch.save`` has written.

    Returns:
        By name of a space its change of basis; or the matrices of each rotation in order, float32 or float64 (n, n).

    Raises:
        ConfigError: there is no such file; it holds something else than rotation matrices, or one is not orthogonal.
        DamageError: it is damaged, or holds what could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: name one with rotation matrices, such as SpinQuant's R.bin")
    if path.open("rb").read(1) == b"{":
        return _learned(path)
    found: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for name, matrix in _stored(path).items():
        role = name.rpartition(".")[2]
        if role not in ROLES:
            raise ConfigError(f"{path} holds {name!r}, which is named after no rotation ({', '.join(ROLES)})")
        try:
            Rotation.from_matrix(matrix)
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
        place = tuple(int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name))
        if place in found.setdefault(role, {}):
            raise ConfigError(f"{path} holds {name!r} and another {role} of the same place: one of them is wrong")
        found[role][place] = matrix
    if not found:
        raise ConfigError(f"{path} holds no rotation matrix")
    return {role: tuple(of_role[place] for place in sorted(of_role)) for role, of_role in found.items()}


def _learned(path: Path) -> dict[str, Rotation]:
    """Return what :func:`write_matrices` has written."""
    content = read_object(path)
    held = content.get("matrices")
    if content.get("spinpass") != "matrices" or not isinstance(held, dict) or not held:
        raise ConfigError(f"{path} holds no matrices of spinpass learn")
    try:
        return {str(space): Rotation.from_dict(data) for space, data in held.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _stored(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name."""
    if zipfile.is_zipfile(path):
        check_archive(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle and zip: no common base below Exception
        raise DamageError(  # what torch says of it is to run the code
            f"{path} holds no matrices that can be read without running code: it is damaged, or neither JSON of "
            "spinpass learn nor a dict of tensors that torch.save has written; it is not read"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(m, Tensor) for m in held.values()):
        raise ConfigError(f"{path} holds no matrices by name, as SpinQuant's R.bin does")
    for name, matrix in held.items():
        if matrix.layout != torch.strided or matrix.is_meta or matrix.is_quantized:
            raise ConfigError(f"{path}: {name} is no plain tensor with its values: save matrices of float32 or float64")
        if matrix.numel() * matrix.element_size() > matrix.untyped_storage().nbytes():
            raise DamageError(f"{path}: {name} of shape {list(matrix.shape)} claims more values than are stored")
    return {str(name): matrix.detach() for name, matrix in held.items()}
