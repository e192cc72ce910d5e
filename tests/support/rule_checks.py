"""What a rule claims of an operator, held against the operator itself: rotate the operands so and compare, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.analysis.ops.rules import (
    Centring,
    Concatenate,
    Ignored,
    Mean,
    Movement,
    Multilinear,
    Normalization,
    Opaque,
    Several,
    Square,
    VectorNorm,
    Zeros,
)
from spinpass.analysis.ops.table import rule_of
from spinpass.graph import op_name, shape, value
from spinpass.graph.layout import Layout, LayoutError


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]


def rotated(layout: Layout, x: Tensor) -> Tensor:
    matrix = orthogonal(layout.width)
    result = layout.apply(x.double(), lambda v, dim: (v.movedim(dim, -1) @ matrix).movedim(-1, dim))
    return torch.empty_like(x, dtype=torch.float64).copy_(result)  # in x's strides, for views


def evaluate(node: Node, values: dict[Node, Any]) -> Any:
    """The node's operator on values of its operands."""

    def look(n: Node) -> Any:
        found = values.get(n, value(n))
        return found.clone() if isinstance(found, Tensor) and name.endswith("_") else found

    name = op_name(node)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), look)
    if op_name(node) == "getitem":
        source = node.args[0]
        assert isinstance(source, Node)
        return evaluate(source, values)[node.args[1]]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    if not b.numel():
        return
    torch.testing.assert_close(
        a.double(),
        b.double(),
        rtol=0,
        atol=1e-9 * float(b.double().abs().nan_to_num(posinf=0).max()) + 1e-12,
        equal_nan=True,
    )


def check(node: Node) -> int:
    """Verify all that the rule of ``node`` claims; returns how many claims there were."""
    rule = rule_of(node)
    match rule:
        case Multilinear():
            return sum(check_label(node, rule, label) for label in labels(rule))
        case Movement():
            return check_movement(node, rule)
        case Concatenate():
            return check_concatenate(node, rule)
        case Square(source=source):
            close(value(source) ** 2, value(node))
            return 1
        case VectorNorm(source=source, dims=dims):
            for d in dims if len(dims) == 1 else ():
                close(
                    evaluate(node, {source: rotated(Layout.full(d, int(shape(source)[d])), value(source))}), value(node)
                )  # type: ignore[call-overload]
            return 1
        case Mean(source=source, dims=dims):
            close(value(source).mean(dims).flatten(), value(node).flatten())
            return 1
        case Centring(source=source, dims=dims):
            close(value(source) - value(source).mean(dims, keepdim=True), value(node))
            return 1
        case Normalization():
            return check_norm(node, rule)
        case Zeros():
            assert not value(node).any()
            return 1
        case Ignored() | Several() | Opaque():
            return 0
    raise AssertionError(rule)


def labels(rule: Multilinear) -> set[Any]:
    return {label for term in rule.terms for o in term for label in o.labels if label is not None} | {
        label for label in rule.out if label is not None
    }


def check_label(node: Node, rule: Multilinear, label: Any) -> int:
    """One axis: passes where each term holds it once and the result holds it; contracted where one term holds it twice."""
    holders = [[o for o in term if label in o.labels] for term in rule.terms]
    passes = label in rule.out and all(len(h) == 1 for h in holders)
    contracts = label not in rule.out and [len(h) for h in holders if h] == [2]
    involved = [o for h in holders for o in h]
    if not (passes or contracts) or any(o.node in rule.opaque for o in involved):
        return 0
    ports = [o.node for term in rule.terms for o in term]
    if any(ports.count(o.node) > 1 for o in involved):
        return 0  # one value at two ports: the analysis treats both at once
    sizes = {int(shape(o.node)[o.labels.index(label)]) for o in involved}  # type: ignore[call-overload]
    assert len(sizes) == 1, f"{node}: axis {label!r} has sizes {sizes}"
    size = sizes.pop()
    if size == 1:
        return 0
    given = {o.node: rotated(Layout.full(o.labels.index(label), size), value(o.node)) for o in involved}
    expected = value(node)
    if passes:
        at = rule.out.index(label)
        assert expected.shape[at] == size
        expected = rotated(Layout.full(at, size), expected)
    close(evaluate(node, given), expected)
    return 1


def check_movement(node: Node, rule: Movement) -> int:
    source, done = rule.source, 0
    for d, size in enumerate(shape(source)):
        if size in (0, 1):
            continue
        start = Layout.full(d, int(size))  # type: ignore[call-overload]
        try:
            there = rule.forward(start)
        except LayoutError:
            continue
        moved = evaluate(node, {source: rotated(start, value(source))})
        close(moved, value(node) if there is None else rotated(there, value(node)))
        done += 1
    for d, size in enumerate(shape(node)):
        if size in (0, 1):
            continue
        end = Layout.full(d, int(size))  # type: ignore[call-overload]
        try:
            back = rule.backward(end)
        except LayoutError:
            continue
        assert all(shape(source)[x] == s for x, s in zip(back.dims, back.sizes, strict=True)), (
            f"{node}: {back} on {shape(source)}"
        )
        close(evaluate(node, {source: rotated(back, value(source))}), rotated(end, value(node)))
        done += 1
    if rule.is_identity:
        close(evaluate(node, {}), value(source))
    return done


def check_concatenate(node: Node, rule: Concatenate) -> int:
    done = 0
    for d, size in enumerate(shape(node)):
        if d == rule.dim:
            continue
        layout = Layout.full(d, int(size))  # type: ignore[call-overload]
        close(evaluate(node, {s: rotated(layout, value(s)) for s in rule.sources}), rotated(layout, value(node)))
        done += 1
    close(torch.cat([value(s) for s in rule.sources], rule.dim), value(node))
    return done


def check_norm(node: Node, rule: Normalization) -> int:
    x, plain = value(rule.source).double(), value(node).double()
    if rule.bias is not None:
        plain = plain - value(rule.bias)
    if rule.weight is not None:
        plain = plain / value(rule.weight)
    centred = x - x.mean(-1, keepdim=True) if rule.centres else x
    eps = torch.finfo(value(rule.source).dtype).eps if rule.eps is None else rule.eps
    close(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps), plain)
    return 1
