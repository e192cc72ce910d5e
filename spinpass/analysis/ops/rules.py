"""Rules: what an operator does to the axes of its operands, as a value.

Nearly every operator is one of three kinds:

- :class:`Multilinear`: a sum of products of operands, written like an einsum. A label that stands in one operand of a
  term and in the result passes a rotation through. One that stands in two operands of a term and not in the result is
  contracted, and a rotation of both cancels. One that stands in two operands and in the result is a product channel by
  channel, where no rotation passes.
- :class:`Movement`: the result holds elements of one operand, moved (view, transpose, slice, cast).
- :class:`Opaque`: anything else, unknown operators included. No rotation passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch.fx import Node

from spinpass.graph import Layout

Label = Hashable


@dataclass(frozen=True)
class Operand:
    """One tensor operand of a product. ``labels[d]`` names axis ``d``; None: the operator acts on that axis itself."""

    node: Node
    labels: tuple[Label | None, ...]


@dataclass(frozen=True)
class Multilinear:
    """result[out] = Σ_terms Π_operands. ``opaque`` operands enter in another way and pass no rotation."""

    terms: tuple[tuple[Operand, ...], ...]
    out: tuple[Label | None, ...]
    opaque: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Movement:
    """The result's elements are elements of ``source``.

    ``forward`` takes a layout of the source to that of the result, or to None where no block of it is left;
    ``backward`` takes one of the result to that of the source.
    """

    source: Node
    forward: Callable[[Layout], Layout | None] = field(compare=False)
    backward: Callable[[Layout], Layout] = field(compare=False)
    is_identity: bool = False


@dataclass(frozen=True)
class Concatenate:
    """The results of ``sources`` side by side along ``dim``."""

    sources: tuple[Node, ...]
    dim: int


@dataclass(frozen=True)
class Square:
    """x², whose sum over a whole vector no rotation changes."""

    source: Node


@dataclass(frozen=True)
class VectorNorm:
    """The 2-norm over ``dims``: no rotation of those axes changes it."""

    source: Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Mean:
    """mean(x) over ``dims``."""

    source: Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Centring:
    """x − mean(x) over ``dims``."""

    source: Node
    mean: Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Normalization:
    """``layer_norm`` (``centres``) or ``rms_norm`` as one operator over the last axis, then ·weight + bias."""

    source: Node
    weight: Node | None
    bias: Node | None
    eps: float | None
    centres: bool


@dataclass(frozen=True)
class Zeros:
    """All elements are zero, so they are in every basis."""


@dataclass(frozen=True)
class Several:
    """Several results; the ``getitem`` nodes that take them have rules of their own."""


@dataclass(frozen=True)
class Ignored:
    """Only shape or dtype of the operand matter."""


@dataclass(frozen=True)
class Opaque:
    """No rotation passes."""

    why: str


Rule = (
    Multilinear
    | Movement
    | Concatenate
    | Square
    | VectorNorm
    | Mean
    | Centring
    | Normalization
    | Zeros
    | Several
    | Ignored
    | Opaque
)
