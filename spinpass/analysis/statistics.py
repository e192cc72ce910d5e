"""Statistics of vectors as polynomials, so that every spelling of a norm has one form.

Norms are made of two statistics of a vector x, its mean m and the mean of its squares. With c = x − m and v = mean(c²)

    x = c + m        mean(c) = 0        mean(c²) = v        mean(x²) = v + m²        var(x) = v

so whatever is made of x by sums, products and means is a polynomial in c, v and m. Where m cancels, as in x·r − m·r or
in mean(x²) − m², the value depends on the centred vector alone, however it is spelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch.fx import Node

from spinpass.graph import ProgramEditor, arguments, is_float, is_op, op_name, shape, value

from .ops.calls import Call
from .ops.rules import Movement, Multilinear
from .ops.table import rule_of
from .ops.zeros import made_of_numbers
from .polynomial import Polynomial, total


class Symbol(Enum):
    """What the statistics of a vector x are made of."""

    CENTRED = "c"
    VARIANCE = "v"
    MEAN = "m"


class Place(Enum):
    """How a value lies beside the vectors, whose coordinates are the last axis."""

    VECTOR = "one for each coordinate"
    KEPT = "one for each vector, the last axis kept"
    FLAT = "one for each vector, the last axis gone"


@dataclass(frozen=True)
class FlatNumber:
    """A value with one number for each vector, the last axis gone, as an unknown."""

    node: Node


@dataclass(frozen=True)
class VectorForm:
    """What a value is, in terms of one vector.

    Attributes:
        base: the value x whose vectors they are; None where the value is made of none.
        value: a polynomial in the symbols of ``base`` and in one number for each vector: nodes that keep the last axis
            or have no axes at all, and :class:`FlatNumber`.
        place: how it lies beside the vectors; None for a number.
    """

    base: Node | None
    value: Polynomial
    place: Place | None

    def has(self, symbol: Symbol) -> bool:
        """Return whether the symbol is in it."""
        return self.value.has(symbol)


class Statistics:
    """The forms of values, to be asked in the order of the graph.

    Args:
        editor: the program.
    """

    def __init__(self, editor: ProgramEditor) -> None:
        self._editor = editor
        self._forms: dict[Node, VectorForm] = {}

    def of(self, argument: Any) -> VectorForm | None:
        """Return the form of an argument; None where it is no number and no floating-point tensor of static width."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return VectorForm(None, Polynomial.number(argument), None)
        if not isinstance(argument, Node) or not is_float(argument):
            return None
        if argument not in self._forms:
            form = self._made(argument)
            if form is not None and len(form.value.terms) > _MOST_TERMS:
                form = None
            self._forms[argument] = form or _itself(argument)
        form = self._forms[argument]
        return form if form.place is not Place.VECTOR or isinstance(shape(argument)[-1], int) else None

    def know(self, node: Node, form: VectorForm) -> None:
        """Note the form of a value that was made on purpose."""
        self._forms[node] = form

    def variance(self, node: Node) -> VectorForm | None:
        """Return the form of the variance that a node takes, or whose root it takes; None for other nodes.

        It has the axes of the node's result.
        """
        operator = node.args[0] if op_name(node) == "getitem" else node
        if not isinstance(operator, Node) or op_name(operator) not in _VARIANCES or self._editor.is_constant(node):
            return None
        if operator is not node and node.args[1] != 0:
            return None
        over = self.vectors(operator)
        if over is None:
            return None
        form, width = over
        correction = _correction(arguments(operator))
        if correction is None or not width > correction:
            return None
        square, mean = _mean(form.value * form.value), _mean(form.value)
        if square is None or mean is None:
            return None
        variance = (square + (mean * mean).scaled(-1)).scaled(width / (width - correction))
        return VectorForm(form.base, variance, _reduced(operator))

    def _made(self, node: Node) -> VectorForm | None:
        if node.op != "call_function" or self._editor.is_constant(node):
            return None
        rule = rule_of(node)
        if isinstance(rule, Movement) and rule.is_identity:
            return self._cast(node, self.of(rule.source))
        if op_name(node) == "getitem" and isinstance(node.args[0], Node):
            return self._item(node, node.args[0])
        if op_name(node) in _PRODUCTS and isinstance(rule, Multilinear) and len(rule.terms) == 1:
            return self._contracted(node, rule)
        builder = _BUILDERS.get(op_name(node)) if is_op(node) else None
        return None if builder is None else builder(self, node, arguments(node))

    def _cast(self, node: Node, form: VectorForm | None) -> VectorForm | None:
        """Return the form of a value that may have been rounded; None where it holds less than the vector it is of."""
        if form is None or form.base is None:
            return form
        narrowest, made = torch.finfo(value(form.base).dtype), torch.finfo(value(node).dtype)
        return form if made.eps <= narrowest.eps and made.max >= narrowest.max else None

    def _item(self, node: Node, operator: Node) -> VectorForm | None:
        """Return the form of the mean among the results of var_mean or std_mean."""
        if op_name(operator) not in _WITH_MEAN or node.args[1] != 1:
            return None
        over = self.vectors(operator)
        mean = None if over is None else _mean(over[0].value)
        return None if over is None or mean is None else VectorForm(over[0].base, mean, _reduced(operator))

    def _contracted(self, node: Node, rule: Multilinear) -> VectorForm | None:
        """Σ x:  return the sum over vectors that a product takes, by itself, with equal numbers or with the vectors."""
        computed = [o for o in rule.terms[0] if not self._is_given(o.node)]
        constants = [o for o in rule.terms[0] if o not in computed]
        forms = [self.of(o.node) for o in computed]
        if rule.opaque or len(constants) > 1 or not 1 <= len(forms) <= 2 or len({o.labels for o in computed}) > 1:
            return None
        if not computed[0].labels:  # a number
            return None
        *kept, summed = computed[0].labels
        form, width = forms[0], shape(computed[0].node)[-1]
        if form is None or form.place is not Place.VECTOR or forms[-1] is None or forms[-1].base is not form.base:
            return None
        if summed in rule.out or None in computed[0].labels or any(summed not in o.labels for o in constants):
            return None
        factor = self._equal(constants[0].node) if constants else 1.0
        if factor is None or not isinstance(width, int):
            return None
        mean = _mean(form.value * forms[1].value if len(forms) == 2 else form.value)  # type: ignore[union-attr]
        flat = rule.out == tuple(kept)
        whole = bool(rule.out) and rule.out[:-1] == tuple(kept) and shape(node)[-1] == 1
        if mean is None or not (flat or whole):
            return None
        return VectorForm(form.base, mean.scaled(width * factor), Place.FLAT if flat else Place.KEPT)

    def _is_given(self, node: Node) -> bool:
        """Return whether a value is known without a run."""
        return self._editor.is_computable(node) or made_of_numbers(node) is not None

    def _equal(self, given: Node) -> float | None:
        """Return the number that a known value repeats along its one long axis; None for others."""
        if sum(size != 1 for size in shape(given)) > 1:
            return None
        held = self._editor.deferred(given)().cpu() if self._editor.is_computable(given) else made_of_numbers(given)
        if held is None or not held.numel() or not bool((held == held.flatten()[0]).all()):
            return None
        return float(held.flatten()[0])

    def vectors(self, operator: Node) -> tuple[VectorForm, int] | None:
        """Return the vectors that an operator reduces to one number each, and their width; None where it does not."""
        call = Call(operator)
        source = call["self"]
        form = self.of(source)
        if form is None or form.place is not Place.VECTOR:
            return None
        rank, width = len(shape(source)), shape(source)[-1]
        if not isinstance(width, int) or set(call.axes("dim", rank)) != {rank - 1}:
            return None
        return form, width

    def beside(
        self, node: Node, a: Any, b: Any, made: Callable[[Polynomial, Polynomial], Polynomial]
    ) -> VectorForm | None:
        """Return the form of an operator that works element by element, where its operands lie beside each other."""
        x, y = (o if isinstance(o, VectorForm) else self.of(o) for o in (a, b))
        if x is None or y is None or (x.base is not None and y.base is not None and x.base is not y.base):
            return None
        places = {form.place for form in (x, y)} - {None}
        if places == {Place.VECTOR, Place.KEPT}:
            places = {Place.VECTOR}
        if len(places) > 1:
            return None
        place = next(iter(places), None)
        whole = [o for o, form in ((a, x), (b, y)) if form.place is place and isinstance(o, Node)]
        if place in (Place.VECTOR, Place.FLAT) and not all(shape(o)[-1:] == shape(node)[-1:] for o in whole):
            return None
        if place is Place.FLAT and not all(len(shape(o)) == len(shape(node)) for o in whole):
            return None
        return VectorForm(x.base or y.base, made(x.value, y.value), place)


def _sum(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    over = statistics.vectors(node)
    mean = None if over is None else _mean(over[0].value)
    if over is None or mean is None:
        return None
    return VectorForm(over[0].base, mean.scaled(over[1] if op_name(node) == "aten::sum" else 1), _reduced(node))


def _add(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    sign = -1 if "sub" in op_name(node) else 1
    alpha = args.get("alpha", 1)
    a, b = (args["other"], args["self"]) if "rsub" in op_name(node) else (args["self"], args["other"])
    if not isinstance(alpha, (int, float)) or (alpha != 1 and "rsub" in op_name(node)):
        return None
    return statistics.beside(node, a, b, lambda p, q: p + q.scaled(sign * alpha))


def _mul(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    return statistics.beside(node, args["self"], args["other"], lambda p, q: p * q)


def _div(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    if args.get("rounding_mode") is not None:
        return None
    divisor = statistics.of(args["other"])
    if divisor is None or divisor.place is Place.VECTOR or not divisor.value.terms:
        return None
    inverse = None if divisor.base is not None else divisor.value.inverse()
    if inverse is None or divisor.place is Place.FLAT:
        other = args["other"]
        inverse = Polynomial.of(FlatNumber(other) if divisor.place is Place.FLAT else other, -1)
    return statistics.beside(node, args["self"], replace(divisor, base=None, value=inverse), lambda p, q: p * q)


def _neg(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    form = statistics.of(args["self"])
    return None if form is None else replace(form, value=form.value.scaled(-1))


def _square(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    if args.get("exponent", 2) != 2:
        return None
    source = args["self"]
    if op_name(source) == "aten::linalg_vector_norm":
        return _squared_norm(statistics, source)
    if op_name(source) == "aten::abs":
        source = source.args[0]
    return statistics.beside(node, source, source, lambda p, q: p * q)


def _squared_norm(statistics: Statistics, norm: Node) -> VectorForm | None:
    over, args = statistics.vectors(norm), arguments(norm)
    if over is None or args["ord"] != 2 or args["dtype"] is not None:
        return None
    square = _mean(over[0].value * over[0].value)
    return None if square is None else VectorForm(over[0].base, square.scaled(over[1]), _reduced(norm))


def _unsqueeze(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    form = statistics.of(args["self"])
    if form is None or form.place is not Place.FLAT or args["dim"] not in (-1, len(shape(node)) - 1):
        return None
    return replace(form, place=Place.KEPT)


def _squeeze(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    form, rank = statistics.of(args["self"]), len(shape(args["self"]))
    dims = args.get("dim")
    if form is None or form.place is not Place.KEPT or dims not in (-1, rank - 1, [-1], [rank - 1]):
        return None
    return replace(form, place=Place.FLAT) if shape(args["self"])[-1] == 1 else None


def _expand(statistics: Statistics, node: Node, args: dict[str, Any]) -> VectorForm | None:
    form = statistics.of(args["self"])
    return form if form is not None and form.place in (Place.KEPT, None) and form.base is not None else None


def _itself(node: Node) -> VectorForm:
    """Return the form of a value that nothing is known of: a vector of its own, or one number for each of others."""
    sizes = shape(node)
    if not sizes:
        return VectorForm(None, Polynomial.of(node), None)
    if sizes[-1] == 1:
        return VectorForm(None, Polynomial.of(node), Place.KEPT)
    return VectorForm(node, Polynomial.of(Symbol.CENTRED) + Polynomial.of(Symbol.MEAN), Place.VECTOR)


def _mean(value: Polynomial) -> Polynomial | None:
    """Return the mean over the coordinates, None where it takes moments above the second."""
    powers = value.by_power(Symbol.CENTRED)
    if not set(powers) <= {0, 1, 2}:
        return None
    moments = {0: Polynomial.number(1), 1: Polynomial({}), 2: Polynomial.of(Symbol.VARIANCE)}
    return total(rest * moments[power] for power, rest in powers.items())


def _reduced(operator: Node) -> Place:
    return Place.KEPT if arguments(operator).get("keepdim") else Place.FLAT


def _correction(args: dict[str, Any]) -> float | None:
    """Return what the variance's divisor is less than the width, None where that is no number."""
    if "unbiased" in args:
        return 1.0 if args["unbiased"] else 0.0
    given = args.get("correction")
    return 1.0 if given is None else float(given) if isinstance(given, (int, float)) else None


_MOST_TERMS = 24
_PRODUCTS = {f"aten::{name}" for name in ("einsum", "matmul", "linear", "mm", "mv", "bmm", "dot")}
_WITH_MEAN = {"aten::var_mean", "aten::std_mean"}
_VARIANCES = _WITH_MEAN | {"aten::var", "aten::std"}
_BUILDERS: dict[str, Callable[[Statistics, Node, dict[str, Any]], VectorForm | None]] = {
    f"aten::{name}": builder
    for builder, names in (
        (_sum, "sum mean"),
        (_add, "add sub rsub"),
        (_mul, "mul multiply"),
        (_div, "div divide true_divide"),
        (_neg, "neg"),
        (_square, "square pow"),
        (_unsqueeze, "unsqueeze"),
        (_squeeze, "squeeze"),
        (_expand, "expand expand_as"),
    )
    for name in names.split()
}
