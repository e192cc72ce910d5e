"""Every rule against the samples that torch ships for its operator, and every fault of an argument put back.

The samples are torch's, not of the one who wrote the rules. Each is traced to ATen nodes, whose rules are then held
against the operators in float64.
"""

from __future__ import annotations

import sys
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from spinpass.analysis.ops import calls, indexing, movements, products
from spinpass.analysis.ops import table as ops
from spinpass.analysis.ops.rules import Mean, Multilinear, Normalization, Operand, Rule, Square, VectorNorm
from spinpass.graph import op_name, shape
from tests.support.rule_checks import check

# whose samples cannot be traced to them: operators that write in place, and what only kernels for some devices make
UNTRACED = {
    *(f"aten::{n}_" for n in ("add", "sub", "mul", "div", "neg", "detach")),
    *(f"aten::_scaled_dot_product_{n}" for n in ("flash_attention_for_cpu", "flash_attention", "efficient_attention")),
    *(f"aten::{n}" for n in ("native_dropout", "_grouped_mm", "_fused_rms_norm", "lift_fresh")),
    "transformers::grouped_mm_fallback",
}
# which read nothing, so that there is nothing to claim
SHAPES = {
    f"aten::{n}"
    for n in (
        *("ones_like", "empty_like", "rand_like", "randn_like", "new_ones", "new_empty", "empty", "ones"),
        *("full_like", "full", "new_full"),
    )
}


@cache
def samples() -> dict[str, list[Any]]:
    """Torch's samples of the operators in the table, by names: functions with their arguments."""
    if "expecttest" not in sys.modules:  # which torch imports for the tests of its own
        stub = ModuleType("expecttest")
        stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db

    named = {n.split("::")[1] for n in {*ops._TABLE, *ops._SEVERAL}}
    found: dict[str, list[Any]] = {}
    for op in op_db:
        names = {op.aten_name, op.name.split(".")[-1], *(alias.name for alias in op.aliases)}
        slow = op.name.startswith(("masked.", "sparse.", "linalg.norm")) or op.variant_test_name == "triton_optimized"
        if (names & named or op.name == "__getitem__") and not slow:
            found.setdefault(op.name, []).append(op)
    return found


def traced(function: Callable[..., Any], *given: Any, **named: Any) -> Iterator[Node]:
    """The nodes that a call is traced to, with real tensors for values."""
    leaves, spec = pytree.tree_flatten((given, named))
    tensors = [x for x in leaves if isinstance(x, Tensor)]

    def call(*instead: Tensor) -> Any:
        left = iter(instead)
        args, kwargs = pytree.tree_unflatten([next(left) if isinstance(x, Tensor) else x for x in leaves], spec)
        return function(*args, **kwargs)

    with torch.no_grad():
        module = make_fx(call, pre_dispatch=True)(*tensors)
        Values(module).run(*tensors)
    yield from module.graph.nodes


class Values(Interpreter):
    """A run that notes what each node returns."""

    def run_node(self, n: Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def claims(function: Callable[..., Any], *given: Any, **named: Any) -> Counter[str]:
    """How much the rules of a call have claimed, all of which was found true, by operators."""
    found: Counter[str] = Counter()
    for node in traced(function, *given, **named):
        if node.op == "call_function":
            name = op_name(node)
            found[name if name != "getitem" else op_name(node.all_input_nodes[0])] += check(node)
    return found


def reached(op: Any) -> tuple[int, Counter[str]]:
    """How many samples of an operator there are, under all its names, and how many reached a claim of each rule."""
    count, found = 0, Counter[str]()
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        for name in (op, *(alias.op for alias in op.aliases)):
            count += 1
            here = claims(name, sample.input, *sample.args, **sample.kwargs)
            found.update(n for n, claimed in here.items() if claimed)
    return count, found


aten = torch.ops.aten
X, W = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
ROWS = torch.tensor([[[2], [0]]])
MASK = torch.tensor([True, False, True, True, False, True])[:, None]


def rows(x: Tensor, index: Tensor) -> Tensor:
    return index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1])


# what torch ships no samples for, or none that a rotation passes: whole rows under masks and indices
OWN: dict[str, Callable[[], Counter[str]]] = {
    "gather": lambda: claims(lambda x, i: x.gather(1, rows(x, i)), X, ROWS),
    "scatter": lambda: claims(lambda x, i, y: x.scatter(1, rows(x, i), y), X, ROWS, X * 2),
    "scatter_add": lambda: claims(lambda x, i, y: x.scatter_add(1, rows(x, i), y), X, ROWS, X * 2),
    "scatter_reduce": lambda: claims(lambda x, i, y: x.scatter_reduce(1, rows(x, i), y, "sum"), X, ROWS, X * 2),
    "masked_fill": lambda: claims(lambda x, m: x.masked_fill(m, 0), X, MASK),
    "masked_scatter": lambda: claims(lambda x, m, y: x.masked_scatter(m, y), X, MASK, X * 2),
    "index": lambda: claims(lambda x, i: x[:, i], X, torch.tensor([2, 0])),
    "_unsafe_index_put": lambda: claims(lambda x, i, y: aten._unsafe_index_put(x, [None, i], y), X, ROWS[0, :, 0], X[:, :2]),
    "pow": lambda: claims(lambda x: x.pow(2), X),
    "norm": lambda: claims(lambda x: aten.norm.ScalarOpt_dim(x, 2, [-1]), X),
    "convolution": lambda: claims(lambda x, w: aten.convolution(x, w, None, [1], [0], [1], False, [0], 1), X, X[:, :, :2]),
    "conv3d": lambda: claims(torch.conv3d, X[:, :, :, None, None], W[:3, :, None, None, None].expand(3, 4, 1, 1, 1).repeat(1, 2, 1, 1, 1)[:, :6]),
    "copy": lambda: claims(aten.copy, X, X * 2),
    "type_as": lambda: claims(lambda x, y: x.type_as(y), X, W),
    "numpy_T": lambda: claims(lambda x: x.T, W),
    "zero": lambda: claims(aten.zero, X),
    "fill": lambda: claims(aten.fill, X, 0),
    "contiguous": lambda: claims(lambda x: x.mT.contiguous(), X),
    "feature_dropout": lambda: claims(lambda x: torch.feature_dropout(x, 0.5, False), X),
    **{
        name: lambda name=name, given=given: claims(getattr(aten, name), X, *given)
        for name, given in {
            "_to_copy": (),
            "alias": (),
            "lift_fresh_copy": (),
            "_unsafe_view": ([12, 4],),
            "_reshape_alias": ([12, 4], [4, 1]),
        }.items()
    },
}


def test_every_claim_holds_for_the_samples_that_torch_ships() -> None:
    torch.manual_seed(0)
    total, found = 0, Counter[str]()
    for variants in samples().values():
        for op in variants:
            count, here = reached(op)
            total, found = total + count, found + here
    for own in OWN.values():
        total, found = total + 1, found + Counter(n for n, claimed in own().items() if claimed)
    print(f"{total} samples; that reached a claim, by rules:")
    print(", ".join(f"{name.removeprefix('aten::')} {count}" for name, count in sorted(found.items())))
    silent = {n for n in {*ops._TABLE, *ops._SEVERAL} if not found[n]} - UNTRACED - SHAPES
    assert not silent, f"nothing was claimed of {sorted(silent)}"


# -- faults put back ---------------------------------------------------------------------------------------------------


def whole_rows(call: calls.Call) -> Rule:
    labels = (*(None,) * (len(shape(call.node)) - 1), "o")
    call.account("dim")
    terms = ((Operand(call["self"], labels),), (Operand(call["src"], labels),))
    return Multilinear(terms, labels, (call["index"],))


def sliced_from_a_negative_start(call: calls.Call) -> Rule:
    start, size = call["start"], call["length"]
    return movements._sliced(call, start, start + size, 1)


def every_index_one_axis(call: calls.Call) -> Rule:
    call.account("accumulate")
    indices = [i for i in call["indices"] if i is not None]
    return indexing._write_along(call, call["values"], {call["indices"].index(indices[0])}, indices)


FAULTS: dict[str, tuple[str, Callable[[calls.Call], Rule], Callable[[], Counter[str]]]] = {
    "a negative start that is not wrapped": (
        "aten::narrow",
        sliced_from_a_negative_start,
        lambda: claims(lambda x: x.narrow(1, -3, 3), X),
    ),
    "an index narrower than the channels": (
        "aten::scatter",
        whole_rows,
        lambda: claims(lambda x, i: x.scatter(1, i, x * 2), X, ROWS.expand(2, 2, 1)),
    ),
    "adding at an index narrower than the channels": (
        "aten::scatter_add",
        whole_rows,
        lambda: claims(lambda x, i: x.scatter_add(1, i, x * 2), X, ROWS.expand(2, 2, 3)),
    ),
    "the other reductions of a scatter": (
        "aten::scatter_reduce",
        whole_rows,
        lambda: claims(lambda x, i: x.scatter_reduce(1, i, x * 2, "amax"), X, ROWS.expand(2, 2, 4)),
    ),
    "uneven repeats of equal total": (
        "aten::repeat_interleave",
        lambda call: movements._repeat(call),
        lambda: claims(
            lambda x, n: aten.repeat_interleave.self_Tensor(x, n, 2, output_size=4), X, torch.tensor([2, 0, 1, 1])
        ),
    ),
    "a mask of more axes than one": (
        "aten::index_put",
        every_index_one_axis,
        lambda: claims(lambda x, m, v: aten.index_put(x, [None, m], v), X, torch.eye(6, 4).bool(), X[0, 0]),
    ),
    "a rounding division": (
        "aten::div",
        lambda call: products.elementwise(call, [call["self"], call["other"]]),
        lambda: claims(lambda x: torch.div(x, 0.3, rounding_mode="floor"), X),
    ),
    "a padding with another value": (
        "aten::constant_pad_nd",
        lambda call: indexing._along(call["self"], {1}),
        lambda: claims(lambda x: aten.constant_pad_nd(x, [0, 0, 1, 0], 2.0), X),
    ),
    "an order of the norm": (
        "aten::linalg_vector_norm",
        lambda call: VectorNorm(call["self"], call.axes("dim", 3)),
        lambda: claims(lambda x: torch.linalg.vector_norm(x, 3, -1), X),
    ),
    "the exponent of a power": (
        "aten::pow",
        lambda call: Square(call["self"]),
        lambda: claims(lambda x: x.pow(3), X),
    ),
    "the size of a norm": (
        "aten::layer_norm",
        lambda call: Normalization(call["input"], call["weight"], call["bias"], 1e-5, True),
        lambda: claims(lambda x: torch.layer_norm(x, [4], eps=0.5), X),
    ),
    "the axes of a mean": (
        "aten::mean",
        lambda call: Mean(call["self"], (2,)),
        lambda: claims(lambda x: x.mean(1), X[:, :4]),
    ),
}


# which no structure can see, because the argument is read
WRONGLY_READ = {
    "a negative start that is not wrapped",
    "an index narrower than the channels",
    "adding at an index narrower than the channels",
    "a mask of more axes than one",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken, call = FAULTS[fault]
    call()  # nothing that is claimed now is wrong
    monkeypatch.setitem(ops._TABLE, name, broken)
    if fault not in WRONGLY_READ:
        assert not call()[name], "a rule that does not account for an argument makes a claim"
    monkeypatch.setattr(calls.Call, "forgotten", lambda self: None)
    monkeypatch.setattr(calls.Call, "undeclared", lambda self, rule: None)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        call()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(1, dtype=torch.int64),
        lambda x: x.cumsum(1, dtype=torch.int64),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to(torch.int64).transpose(0, 1),
        lambda x: (x * 3).to(torch.float8_e5m2).to(torch.float64),
    ],
)
def test_values_that_are_rounded_carry_no_axis(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims(function, X)
    monkeypatch.setattr(calls, "_typed", lambda call, rule: rule)
    with pytest.raises((AssertionError, RuntimeError)):
        claims(function, X * 9)
