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
"""The name of an axis within one rule. Axes of the same name run together, as in an einsum."""


@dataclass(frozen=True)
class Operand:
    """One tensor operand of a product.

    ``labels[d]`` names axis ``d``. It is None where the operator acts on that axis itself.
    """

    node: Node
    labels: tuple[Label | None, ...]


@dataclass(frozen=True)
class Multilinear:
    """result[out] = Σ_terms Π_operands.

    Operands that are ``opaque`` enter in another way, and pass no rotation.
    """

    terms: tuple[tuple[Operand, ...], ...]
    out: tuple[Label | None, ...]
    opaque: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Movement:
    """An operator whose result holds elements of ``source``, moved.

    Attributes:
        source: the operand.
        forward: takes a layout of the source to that of the result, or to None where no block of it is left. It raises
            LayoutError where a block cannot be followed.
        backward: takes a layout of the result to that of the source, and raises LayoutError likewise.
        is_identity: the result is the source, perhaps in another dtype.
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
    """The 2-norm over ``dims``, which no rotation of those axes changes."""

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
    """A value whose elements are all zero, so that it is the same in every basis."""


@dataclass(frozen=True)
class Several:
    """An operator with several results; the ``getitem`` nodes that take them have rules of their own."""


@dataclass(frozen=True)
class Ignored:
    """An operator to which only the shape or dtype of its operand matters."""


@dataclass(frozen=True)
class Opaque:
    """An operator that no rotation passes. ``why`` is the reason, as a phrase."""

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
