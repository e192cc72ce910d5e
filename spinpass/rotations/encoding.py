"""Rotations as JSON can hold them:  tensors  <->  base64 of their rows in float64, little-endian."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError

from . import blocks, kronecker

Described = tuple[str, int, int, int, str, Tensor | None, tuple[Tensor, ...]]
"""The fields of a rotation in their order."""


def encoded(matrix: Tensor | None, factors: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return the tensors of a rotation as :func:`fields_of` reads them, nothing of one that is drawn."""
    if factors:
        return {"factors": [_text(factor) for factor in factors]}
    return {} if matrix is None else {"matrix": _text(matrix)}


def fields_of(data: Mapping[str, Any]) -> Described:
    """Return the fields of the rotation that data describe.

    Raises ConfigError: they describe none.
    """
    try:
        kind, size, order = str(data["kind"]), int(data["size"]), int(data["order"])
        seed, identity = int(data["seed"]), str(data["identity"])
        raw = base64.b64decode(data["matrix"], validate=True) if "matrix" in data else None
        parts = [base64.b64decode(part, validate=True) for part in data.get("factors", ())]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"this is no description of a rotation: {error!r}") from error
    sides = [math.isqrt(len(part) // 8) for part in parts]
    if any(8 * side * side != len(part) for side, part in zip(sides, parts, strict=True)):
        raise ConfigError("a factor of a rotation is no square matrix of float64")
    factors = tuple(_from_bytes(part).view(side, side) for part, side in zip(parts, sides, strict=True))
    matrix = None if raw is None else _matrix(raw, kind, size, order)
    return kind, size, order, seed, identity, matrix, kronecker.checked_factors(factors) if factors else ()


def _matrix(raw: bytes, kind: str, size: int, order: int) -> Tensor:
    """Return the one tensor of a rotation of a kind that has one. Raises ConfigError: it does not fit, or is wrong."""
    row = {"blocks": order, "permutation": 1, "scaled-hadamard": 1}.get(kind, size)
    if len(raw) != 8 * size * row or size < 1 or order < 1 or size % order:
        raise ConfigError(f"the matrix of a rotation of size {size} takes {8 * size * row} bytes, got {len(raw)}")
    values = _from_bytes(raw)
    if kind == "blocks":
        return blocks.checked_blocks(values.view(-1, order, order))
    if kind == "scaled-hadamard":
        return blocks.checked_scales(values)
    if kind == "permutation":
        return blocks.checked_order(values.nan_to_num(-1).to(torch.int64))
    matrix = values.view(size, size)
    if not kronecker.non_orthogonality(matrix) <= kronecker.ORTHOGONAL_WITHIN[torch.float64]:
        raise ConfigError("the matrix of a learned rotation is not orthogonal")
    return matrix


def to_bytes(matrix: Tensor) -> bytes:
    """Return the elements in float64, little-endian, which holds integers of a size that a tensor has."""
    raw = bytearray(matrix.numel() * 8)
    torch.frombuffer(raw, dtype=torch.float64).copy_(matrix.flatten())
    return bytes(raw)


def _text(matrix: Tensor) -> str:
    return base64.b64encode(to_bytes(matrix)).decode("ascii")


def _from_bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float64)
