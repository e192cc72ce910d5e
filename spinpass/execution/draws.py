"""Several draws of a program's inputs, each made to reach what the others leave out.

The first is :func:`.synthetic.synthetic_inputs`. The second pads on the left, looks up the last row of every table and
one row twice, starts late, and mixes scales, signs and zeros. The third has other sizes where the program allows it,
holes in its masks, and positions of its own in each row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.graph import arguments, is_op, op_name, value

from .interpreter import origin
from .roles import InputRole
from .synthetic import UserInput, fresh, other_sizes, specialised, synthetic_inputs, user_inputs

Values = dict[str, Any]
_LATE = 100  # where positions start that are in no table
_SCALES = (1.0, 1e-2, 4.0)
_PASSED = frozenset({"aten::add", "aten::where", "aten::masked_fill", "aten::maximum", "aten::sub", "aten::div",
                     "aten::mul"})  # fmt: skip
_HOPS = 8


def draws(ep: ExportedProgram, equal: Collection[Collection[Any]] = ()) -> list[list[Values]]:
    """Return draws of the inputs of ``ep`` by placeholder name, at least three where anything can be drawn.

    Each draw is a list of alternatives, the boldest first: a program may have conditions that its signature does not
    tell, and then takes a later one. ``equal`` are groups of size symbols that get one size.
    """
    first = synthetic_inputs(ep)
    inputs = [i for i in user_inputs(ep) if isinstance(first[i.name], Tensor) and i.name not in specialised(ep)]
    if not any(first[i.name].numel() for i in inputs):
        return [[first]]
    masks = {i.name for i in inputs if i.role is InputRole.MASK or i.dtype is torch.bool or _is_additive(i.node)}
    kinds = (
        {i.name for i in inputs},
        {i.name for i in inputs if i.role is InputRole.LOOKUP} | masks,
        {i.name for i in inputs if i.role is InputRole.LOOKUP},
        masks,
    )
    second = [_drawn(first, inputs, names, masks, 1) for names in kinds if names]
    third = [_drawn(first, inputs, names, masks, 2) for names in kinds if names]
    return [[first], second, [*_resized(ep, masks, equal), *third]]


def _resized(ep: ExportedProgram, masks: set[str], equal: Collection[Collection[Any]]) -> Iterator[Values]:
    """Yield a draw of other sizes, where there are any."""
    try:
        found = other_sizes(ep, equal)
        if found is None:
            return
        values = synthetic_inputs(ep, seed=2, sizes=found)
        inputs = [i for i in user_inputs(ep) if isinstance(values[i.name], Tensor) and i.name not in specialised(ep)]
        yield _drawn(values, inputs, {i.name for i in inputs}, masks, 2)
        yield values
    except ConfigError:  # the same sizes again
        return


def _drawn(base: Mapping[str, Any], inputs: list[UserInput], names: set[str], masks: set[str], kind: int) -> Values:
    """Return ``base`` with the inputs of these names drawn anew."""
    generator = torch.Generator("cpu").manual_seed(kind)
    values = dict(base)
    for spec in inputs:
        if spec.name in names:
            old = base[spec.name]
            values[spec.name] = _value(spec, old, spec.name in masks, kind, generator).to(old.device)
    return values


def _value(spec: UserInput, old: Tensor, is_mask: bool, kind: int, generator: torch.Generator) -> Tensor:
    size, dtype = tuple(old.shape), old.dtype
    if not old.numel():
        return old
    if is_mask:
        seen = _seen(size, kind)
        if not dtype.is_floating_point:
            return seen.to(dtype)
        return torch.zeros(size, dtype=dtype, device="cpu").masked_fill(~seen, torch.finfo(dtype).min)
    if dtype.is_floating_point or dtype.is_complex:
        return _floats(spec, size, kind, generator)
    if spec.role is InputRole.LOOKUP:
        return _ids(spec, size, kind, generator)
    if spec.role is InputRole.POSITION:
        return _positions(spec, old, kind)
    return old if kind == 1 else torch.randint(0, 4, size, generator=generator, dtype=dtype, device="cpu")


def _seen(size: tuple[int, ...], kind: int) -> Tensor:
    """Return a mask over the keys, which are the last axis: padded on the left, or with holes and padded on the right.

    In the first kind the first row sees all. Where queries have an axis of their own, each sees its own key.
    """
    if not size:
        return torch.tensor(kind == 1, device="cpu")
    keys = size[-1]
    seen = torch.ones(size, dtype=torch.bool, device="cpu")
    rows = seen.view(size[0], -1, keys) if len(size) > 1 else seen.view(1, 1, keys)
    for b, row in enumerate(rows):
        if kind == 1:
            row[:, : (b % max(1, keys - 1)) + (len(rows) == 1 and keys > 1)] = False
        elif b % 2 == 0:
            row[:, keys // 2 : keys // 2 + (keys > 1)] = False
        else:
            row[:, keys - (keys > 1) :] = False
        if len(size) > 2 and size[-2] <= keys:
            queries = torch.arange(row.shape[0], device="cpu")
            row[queries, queries % size[-2] + keys - size[-2]] = True
    return seen


def _floats(spec: UserInput, size: tuple[int, ...], kind: int, generator: torch.Generator) -> Tensor:
    drawn = fresh(spec, size, generator)
    if kind != 1 or not size:
        return drawn
    vectors = drawn.reshape(-1, size[-1])
    scales = torch.tensor([_SCALES[i % 3] for i in range(len(vectors))], dtype=torch.float64, device="cpu")
    zeros = torch.rand(vectors.shape, generator=generator, device="cpu") < 0.1
    return (vectors * scales.to(drawn.dtype).unsqueeze(-1)).masked_fill(zeros, 0).reshape(size)


def _ids(spec: UserInput, size: tuple[int, ...], kind: int, generator: torch.Generator) -> Tensor:
    ids = fresh(spec, size, generator).contiguous()
    flat, last = ids.view(-1), (spec.bound or 1) - 1
    if kind == 1:
        if size and size[-1] > 2:
            ids[..., 1] = ids[..., 0]  # what asks whether two tokens are equal
        flat[-1] = last
    else:
        flat[0] = last
        flat[-1] = 0
    return ids


def _positions(spec: UserInput, old: Tensor, kind: int) -> Tensor:
    """Return positions as in ``old``, but late, as near to the end of their table as they go, or later in each row."""
    highest = int(old.max())
    room = _LATE if spec.bound is None else spec.bound - 1 - highest
    if room <= 0:
        return old
    if kind == 1:
        return old + room
    if old.ndim < 2:
        return old
    shifts = (torch.arange(old.shape[0], device="cpu") % (room + 1)).view(-1, *[1] * (old.ndim - 1))
    return old + shifts.to(old)


def _is_additive(node: Node) -> bool:
    """Return whether a float input is a mask that is added to scores: what it is added to goes on to a softmax."""
    val = value(node)
    if not isinstance(val, Tensor) or not val.is_floating_point():
        return False
    stack, seen = [(node, 0)], {node}
    while stack:
        at, hops = stack.pop()
        for user in at.users:
            if not is_op(user):
                continue
            name = op_name(user).removesuffix("_")
            if name.startswith("aten::scaled_dot_product") and at in (arguments(user).get("attn_mask"),):
                return True
            if hops and name in ("aten::softmax", "aten::_softmax"):
                return True
            follows = name in _PASSED or origin(user) is origin(at)
            if follows and user not in seen and hops < _HOPS:
                seen.add(user)
                stack.append((user, hops + (name in ("aten::add", "aten::where", "aten::masked_fill"))))
    return False
