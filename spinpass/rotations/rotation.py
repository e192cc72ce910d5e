"""The value :class:`Rotation`: a change of basis of row vectors, ``x' = x R``, as a rule an orthogonal one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError

from . import blocks, drawn, encoding, hadamard, kronecker

HADAMARD_KINDS = ("hadamard", "random-hadamard")
SCALED = "scaled-hadamard"
GIVEN_KINDS = ("learned", "kronecker", SCALED, "blocks", "permutation")
"""They stand for the matrices that the user brings."""

KINDS = (*HADAMARD_KINDS, "random-matrix", *GIVEN_KINDS)
_STRUCTURED = (*HADAMARD_KINDS, SCALED)


@dataclass(frozen=True, eq=False)
class Rotation:
    """A matrix R of shape (size, size) that is block-diagonal with blocks of ``order`` rows.

    It is orthogonal, but for ``kronecker`` and ``blocks``, which take any invertible matrices, and ``scaled-hadamard``.

    =================  ========================================================================================
    kind               R
    =================  ========================================================================================
    hadamard           I ⊗ H/√order
    random-hadamard    diag(signs) · (I ⊗ H/√order), signs drawn from (seed, identity) (QuaRot, arXiv 2404.00456)
    random-matrix      I ⊗ Q, Q of shape (order, order) uniformly distributed (Haar), drawn from (seed, identity)
    learned            the user's orthogonal matrix, whose ``order`` equals its ``size``
    kronecker          I ⊗ (F1 ⊗ F2 ⊗ …), the user's invertible factors, whose sizes multiply to ``order``
    scaled-hadamard    diag(d) · (I ⊗ H/√order), the user's scales d, none of them 0
    blocks             diag(A1, A2, …), the user's invertible matrices, one for each head; or a scale for each channel
    permutation        the user's order of channels: channel j of x R is channel ``order[j]`` of x
    =================  ========================================================================================

    Make one with :meth:`create`, :meth:`from_matrix`, :meth:`from_factors`, :meth:`from_scales`, :meth:`from_blocks` or
    :meth:`from_permutation`. Two rotations are equal when they are the same matrix by construction, which is when their
    :meth:`fingerprint` is equal.

    Args:
        kind: of the table.
        size: of the vectors that are rotated.
        order: of the blocks, which divides the size.
        seed: of the random kinds.
        identity: the name of what is rotated, so that the same space of two programs gets the same rotation.
        matrix_: of a learned rotation float64 (size, size), of blocks float64 (size / order, order, order), of scales
            float64 (size,), of a permutation int64 (size,), else None.
        factors: of a Kronecker product, float64 (f, f) each, else empty.

    Raises:
        ConfigError: an unknown kind, or fields that do not fit together.
    """

    kind: str
    size: int
    order: int
    seed: int = 0
    identity: str = ""
    matrix_: Tensor | None = field(default=None, repr=False)
    factors: tuple[Tensor, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown rotation {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.size < 1:
            raise ConfigError(f"a rotation needs a positive size, got {self.size}")
        if self.order < 1 or self.size % self.order:
            raise ConfigError(f"block size {self.order} does not divide the size {self.size}")
        if self.kind in _STRUCTURED and not hadamard.is_order(self.order):
            raise ConfigError(f"no Hadamard matrix of order {self.order} can be built")
        _check_tensors(self)

    @classmethod
    def create(
        cls, kind: str, size: int, *, block_size: int | None = None, seed: int = 0, identity: str = ""
    ) -> Rotation:
        """A rotation of any kind but ``learned``.

        Args:
            kind: of the table of :class:`Rotation`.
            size: of the vectors that are rotated.
            block_size: of the diagonal blocks, which must divide the size. None takes the whole size. A Hadamard kind
                takes the largest order that divides the block and can be built.
            seed: of the random kinds.
            identity: the name of what is rotated.

        Raises:
            ConfigError: an unknown kind, or a block size that does not divide the size.
        """
        block = size if block_size is None else block_size
        if kind in HADAMARD_KINDS and block >= 1 and size % block == 0:
            block = hadamard.largest_order(block)
        return cls(kind, size, block, seed, identity)

    @classmethod
    def from_matrix(cls, matrix: Tensor, identity: str = "") -> Rotation:
        """The rotation ``x' = x @ matrix`` by the user's own orthogonal matrix, float32 or float64 (size, size).

        What rounding left of non-orthogonality is removed in float64, so that the transpose is the inverse to 1e-15.

        Raises:
            ConfigError: the matrix is not square, has another dtype or no plain values, or is not orthogonal, which is
                to say that max |M Mᵀ - I| is above 1e-4 for float32 or 1e-8 for float64.
        """
        if not kronecker.is_square(matrix):
            raise ConfigError(f"a rotation matrix must be square and not empty, got shape {tuple(matrix.shape)}")
        exact = kronecker.in_float64(matrix, "a rotation matrix")
        error, bound = kronecker.non_orthogonality(exact), kronecker.ORTHOGONAL_WITHIN[matrix.dtype]
        if not error <= bound:
            raise ConfigError(f"the matrix is not orthogonal: max |M Mᵀ - I| is {error:.1e}, above {bound:.0e}")
        return cls("learned", len(exact), len(exact), identity=identity, matrix_=kronecker.nearest_orthogonal(exact))

    @classmethod
    def from_factors(cls, factors: Sequence[Tensor], identity: str = "", *, size: int | None = None) -> Rotation:
        """The change of basis ``x' = x (F1 ⊗ F2 ⊗ …)`` by the user's own invertible factors, float32 or float64 (f, f).

        Args:
            factors: F1, F2, …; one of them is a dense matrix.
            identity: the name of what is changed.
            size: of the vectors, a multiple of the product of the factors' sizes, whose blocks are each changed alike.
                None for that product.

        Raises ConfigError: a factor is not square, has another dtype or no inverse, or the sizes do not fit.
        """
        exact = kronecker.checked_factors(factors)
        order = math.prod(map(len, exact))
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise ConfigError(f"size={size!r} is not an integer")
        return cls("kronecker", order if size is None else size, order, identity=identity, factors=exact)

    @classmethod
    def from_scales(cls, scales: Tensor, identity: str = "", *, block_size: int | None = None) -> Rotation:
        """The change of basis ``x' = x diag(scales) (I ⊗ H/√order)``: channels are scaled, then a Hadamard mixes them.

        Args:
            scales: float32 or float64 (n,), one for each channel, none of them 0.
            identity: the name of what is changed.
            block_size: of the Hadamard's blocks, as for :meth:`create`.

        Raises ConfigError: they have another shape or dtype, one is 0 or no number, or the block size does not fit.
        """
        exact = blocks.checked_scales(scales)
        like = cls.create("hadamard", len(exact), block_size=block_size)
        return cls(SCALED, len(exact), like.order, identity=identity, matrix_=exact)

    @classmethod
    def from_blocks(cls, matrices: Tensor, identity: str = "") -> Rotation:
        """The change of basis of each part of a vector by a matrix of its own: of each head, or of each channel.

        Args:
            matrices: float32 or float64 (heads, n, n), invertible; or (n,), a scale for each channel.
            identity: the name of what is changed.

        Raises ConfigError: they have another shape or dtype, or one has no inverse.
        """
        exact = blocks.checked_blocks(matrices)
        order = exact.shape[1]
        return cls("blocks", len(exact) * order, order, identity=identity, matrix_=exact)

    @classmethod
    def from_permutation(cls, order: Tensor, identity: str = "") -> Rotation:
        """The order of channels in which channel j is channel ``order[j]``, int64 (n,).

        Raises ConfigError: it does not have each channel once, or has another shape or dtype.
        """
        exact = blocks.checked_order(order)
        return cls("permutation", len(exact), len(exact), identity=identity, matrix_=exact)

    @property
    def _factor_sizes(self) -> str:
        return " ⊗ ".join(str(len(factor)) for factor in self.factors)

    @cached_property
    def is_orthogonal(self) -> bool:
        """Whether the inverse is the transpose, so that it may pass norms, and products of two of its vectors."""
        return _is_orthogonal(self)

    @cached_property
    def condition(self) -> float:
        """The condition number in the 2-norm: by how much more than itself rounding may be felt."""
        return 1.0 if self.is_orthogonal else _condition(self)

    @cached_property
    def largest(self) -> float:
        """The largest magnitude of an element of R or of its inverse; 1 of a rotation, whose elements are no larger."""
        return 1.0 if self.is_orthogonal else _largest(self)

    @property
    def given(self) -> Tensor:
        """What ``matrix_`` is where there is one: a matrix, blocks (count, n, n), scales, or an order of channels."""
        assert self.matrix_ is not None, self.kind  # checked where it was made
        return self.matrix_

    @property
    def is_by_heads(self) -> bool:
        """Whether each head has a matrix of its own."""
        return self.kind == "blocks" and self.order > 1

    @property
    def is_offline(self) -> bool:
        """Whether it has no form for graphs, so that it takes a place where everything folds into constants."""
        return self.kind in ("blocks", "permutation")

    def operands(self, *, inverse: bool = False, dual: bool = False) -> list[Tensor]:
        """The factors of what row vectors are multiplied by from the right: those of R, R⁻¹ or R⁻ᵀ; float64.

        Of kinds without structure it is one dense block; Hadamards have operators of their own.

        Raises ConfigError: it is offline.
        """
        if self.is_offline:
            raise ConfigError(f"{self} has no factors that a graph could multiply by")
        if self.factors:
            return kronecker.right_operands(self.factors, inverse=inverse, dual=dual)
        block = self.matrix()[: self.order, : self.order].contiguous()
        return [block.t() if inverse else block]

    @property
    def is_structured(self) -> bool:
        """Whether it is applied through the factors of a Hadamard matrix, never as a dense block."""
        return self.kind in _STRUCTURED

    @property
    def flops(self) -> int:
        """The multiplications and additions that rotate one vector. Sign flips are not counted."""
        if self.is_structured:
            return self.size // self.order * hadamard.flops(self.order) + self.size * (self.kind == SCALED)
        if self.factors:
            return 2 * self.size * sum(map(len, self.factors))
        return 2 * self.size * self.order

    def diagonal(self, *, dual: bool = False) -> Tensor | None:
        """What a Hadamard of R⁻ᵀ, if ``dual``, or of R has before it: signs int8 (size,), or scales float64 (size,).

        None where all are 1.
        """
        if self.kind == SCALED:
            return 1 / self.given if dual else self.given
        if self.kind != "random-hadamard":
            return None
        return torch.tensor(drawn.signs(self.size, self.seed, self.identity), dtype=torch.int8, device="cpu")

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """R as a dense matrix (size, size). Prefer :meth:`apply`, which does not form it, where that will do."""
        return self.apply(torch.eye(self.size, dtype=torch.float64, device="cpu")).to(dtype)

    def apply(
        self,
        x: Tensor,
        dim: int = -1,
        *,
        inverse: bool = False,
        dual: bool = False,
        compute: torch.dtype | None = None,
    ) -> Tensor:
        """``x R`` along axis ``dim`` of ``x``, or ``x R⁻¹``.

        Args:
            x: floating point. The size of the axis is a multiple of ``self.size``: several vectors may lie back to
                back, and each is rotated.
            dim: the axis.
            inverse: multiply by R⁻¹, which is Rᵀ unless the factors are not orthogonal.
            dual: multiply by R⁻ᵀ (with ``inverse`` by Rᵀ): what is contracted with x R, so that the product stays.
            compute: float32 or float64, the precision of the arithmetic. None takes that of ``x``, and float32 for
                float16 and bfloat16.

        Returns:
            A new contiguous tensor of the shape, dtype and device of ``x``, rounded once.

        Raises:
            ConfigError: the axis has another size, or the dtype is not floating point.
        """
        if not x.dtype.is_floating_point:
            raise ConfigError(f"only floating point tensors can be rotated, got {x.dtype}")
        if x.dim() == 0 or x.shape[dim] % self.size:
            raise ConfigError(f"axis {dim} of a tensor of shape {tuple(x.shape)} holds no vectors of size {self.size}")
        if self.is_structured:
            diagonal = self.diagonal(dual=dual != inverse)
            diagonal = None if diagonal is None else diagonal.repeat(x.shape[dim] // self.size)
            return hadamard.hadamard_transform(
                x, self.order, transpose=inverse, dim=dim, diagonal=diagonal, compute=compute
            )
        if self.factors:
            precision = hadamard.precision_of(x, compute)
            right = kronecker.right_operands(self.factors, inverse=inverse, dual=dual)
            return hadamard.multiply(
                x, [factor.t().to(x.device, precision).contiguous() for factor in right], dim=dim, compute=compute
            )
        if self.kind == "blocks":
            return blocks.multiply_blocks(x, self.given, dim, inverse=inverse, dual=dual, compute=compute)
        if self.kind == "permutation":
            return blocks.take_order(x, self.given, dim, inverse=inverse)
        block = self.matrix_ if self.matrix_ is not None else drawn.haar_matrix(self.order, self.seed, self.identity)
        block = block.to(x.device, hadamard.precision_of(x, compute))
        return hadamard.multiply(x, [block if inverse else block.t()], dim=dim, compute=compute)

    def to_dict(self) -> dict[str, Any]:
        """The rotation as JSON can hold it, without loss. A learned matrix is base64 of float64 rows, little-endian."""
        fields = {name: getattr(self, name) for name in ("kind", "size", "order", "seed", "identity")}
        return fields | encoding.encoded(self.matrix_, self.factors)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rotation:
        """The rotation that :meth:`to_dict` described.

        Raises:
            ConfigError: the data describe no rotation.
        """
        return cls(*encoding.fields_of(data))

    def fingerprint(self) -> str:
        """The SHA-256, in hexadecimal, of everything that determines R and of nothing else."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        drawn = self.kind.startswith("random")
        parts = [self.kind, self.size, self.order, self.seed if drawn else 0, self.identity if drawn else ""]
        tensors = self.factors if self.matrix_ is None else (self.matrix_,)
        matrix = b"".join(map(encoding.to_bytes, tensors))
        parts += [list(map(len, self.factors))] if self.factors else []
        return hashlib.sha256(json.dumps(parts).encode() + matrix).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rotation) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __str__(self) -> str:
        if self.factors:
            count = self.size // self.order
            return f"kronecker({self._factor_sizes}{f', {count} blocks' if count > 1 else ''})"
        if self.kind == "blocks":
            return f"diagonal({self.size})" if self.order == 1 else f"{self.size // self.order} matrices({self.order})"
        shape = f"{self.size}" if self.order == self.size else f"{self.size // self.order} blocks of {self.order}"
        return f"{self.kind}({shape}, seed {self.seed})" if self.kind.startswith("random") else f"{self.kind}({shape})"


def _is_orthogonal(rotation: Rotation) -> bool:
    if rotation.kind == "blocks":
        return blocks.blocks_are_orthogonal(rotation.given)
    if rotation.kind == SCALED:
        return bool((rotation.given.abs() == 1).all())
    return rotation.kind != "kronecker" or kronecker.are_orthogonal(rotation.factors)


def _condition(rotation: Rotation) -> float:
    if rotation.kind == SCALED:
        return float(rotation.given.abs().max() / rotation.given.abs().min())
    return kronecker.condition_of(rotation.factors) if rotation.factors else blocks.block_condition(rotation.given)


def _largest(rotation: Rotation) -> float:
    if rotation.kind == SCALED:  # before they are spread, that is
        return float(torch.cat([rotation.given, 1 / rotation.given]).abs().max())
    parts = rotation.factors or [rotation.given]
    sizes = ([float(each.abs().max()) for each in (part, torch.linalg.inv(part))] for part in parts)
    return max(map(math.prod, zip(*sizes, strict=True)))


def rotation_by(matrix: Tensor | Rotation, identity: str = "") -> Rotation:
    """Return the orthogonal rotation by a matrix (n, n), or the change of basis by one that is none and has an inverse.

    A stack (heads, n, n) has a matrix for each head, a vector (n,) a scale for each channel, and one of integers an
    order of channels.

    Raises ConfigError: it is none of these.
    """
    if isinstance(matrix, Rotation):
        return matrix
    if matrix.dim() == 1 and not matrix.is_floating_point():
        return Rotation.from_permutation(matrix, identity)
    if matrix.dim() in (1, 3):
        return Rotation.from_blocks(matrix, identity)
    try:
        return Rotation.from_matrix(matrix, identity)
    except ConfigError as error:
        if not kronecker.is_square(matrix):
            raise
        if not kronecker.has_inverse(kronecker.in_float64(matrix, "a rotation matrix")):
            raise ConfigError(
                "the matrix has no inverse, or values that are no numbers: give an invertible one"
            ) from error
        return Rotation.from_factors([matrix], identity)


def _check_tensors(rotation: Rotation) -> None:
    """Raise ConfigError where a rotation's tensors are not those of its kind and size."""
    if bool(rotation.factors) != (rotation.kind == "kronecker"):
        raise ConfigError(
            f"factors are those of a 'kronecker', and this is {rotation.kind!r}: use Rotation.from_factors"
        )
    if rotation.factors and math.prod(map(len, rotation.factors)) != rotation.order:
        sizes = " ⊗ ".join(str(len(factor)) for factor in rotation.factors)
        raise ConfigError(f"factors of {sizes} make no matrix of order {rotation.order}")
    due = {
        "learned": (torch.float64, (rotation.size, rotation.size)),
        "blocks": (torch.float64, (rotation.size // rotation.order, rotation.order, rotation.order)),
        "permutation": (torch.int64, (rotation.size,)),
        SCALED: (torch.float64, (rotation.size,)),
    }.get(rotation.kind)
    if due is None:
        if rotation.matrix_ is not None:
            raise ConfigError(f"a {rotation.kind!r} rotation takes no matrix: use Rotation.from_matrix")
        return
    if rotation.matrix_ is None:
        raise ConfigError(f"a {rotation.kind!r} rotation needs its matrix: use Rotation.from_matrix")
    found = (rotation.matrix_.dtype, tuple(rotation.matrix_.shape))
    if found != due or (rotation.kind not in ("blocks", SCALED) and rotation.order != rotation.size):
        raise ConfigError(
            f"a {rotation.kind!r} rotation needs a {due[0]} matrix of size {list(due[1])}, got {found[0]} "
            f"{list(found[1])}"
        )
