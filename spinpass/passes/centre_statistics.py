"""CentreStatistics:  f(x, mean(x), mean(x²))  ->  f(c, 0, v),   c = x − mean(x),  v = mean(c²),   where f allows it.

    mean(x²) − mean(x)²  ->  mean(c²)        x·r − mean(x)·r  ->  c·r        var(x)  ->  mean(c²)·n/(n − k)

So a LayerNorm is one, however it is spelled: its centring stands in the graph by itself, where the basis analysis sees
it. The polynomials of :mod:`spinpass.analysis.statistics` say where the mean cancels; elsewhere nothing changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from spinpass.analysis import (
    Centring,
    FlatNumber,
    Monomial,
    Normalization,
    Place,
    Polynomial,
    Statistics,
    Symbol,
    VectorForm,
    cancel,
    rule_of,
)
from spinpass.graph import ProgramEditor, is_float, op_name, shape, value

_aten = torch.ops.aten
_ORIGIN = "CentreStatistics"


def centre_statistics(editor: ProgramEditor) -> None:
    """Let what depends on centred vectors alone be computed of them."""
    centred = _Centred(editor)
    for node in list(editor.nodes):
        if node.op == "call_function" and is_float(node):
            centred.read(node)
            centred.see(node)


class _Centred:
    def __init__(self, editor: ProgramEditor) -> None:
        self.editor = editor
        self._statistics = Statistics(editor)
        self._vectors: dict[tuple[Node, torch.dtype], Node] = {}  # x itself, in each dtype that the program has it in
        self._centred: dict[tuple[Node, torch.dtype], Node] = {}
        self._variances: dict[Node, Node] = {}

    def see(self, node: Node) -> None:
        """Note what the node is, or put in its place what it is made of."""
        variance = self._statistics.variance(node)
        form = variance or self._statistics.of(node)
        if form is None or form.base is None:
            return
        key = (form.base, value(node).dtype)
        whole = form.place is Place.VECTOR and shape(node) == shape(form.base)
        if whole and form == self._statistics.of(form.base):
            self._vectors.setdefault(key, node)
        elif isinstance(rule_of(node), Centring):
            if whole and form.value == Polynomial.of(Symbol.CENTRED):
                self._centred.setdefault(key, node)
        elif form.has(Symbol.MEAN) or not (form.has(Symbol.CENTRED) or form.has(Symbol.VARIANCE)):
            return
        elif variance or self._has_mean(node):
            self._replace(node, form, root=variance is not None and _takes_root(node))

    def read(self, node: Node) -> None:
        """LN(a·x + b)  ->  LN(a·c):  let an operator that takes the mean off read what has none."""
        rule = rule_of(node)
        if not isinstance(rule, Normalization) or not rule.centres:
            return
        form = self._statistics.of(rule.source)
        if form is None or form.base is None or form.place is not Place.VECTOR:
            return
        powers = form.value.by_power(Symbol.CENTRED)
        scale, mean = powers.get(1), powers.get(0)
        if scale is None or mean is None or set(powers) != {0, 1} or scale.has(Symbol.MEAN):
            return
        if mean == scale * Polynomial.of(Symbol.MEAN):
            return  # a multiple of x, which the rules know
        centred = replace(form, value=scale * Polynomial.of(Symbol.CENTRED))
        made = self._made(_Maker(self.editor, node.prev, value(rule.source).dtype), centred)
        if shape(made) == shape(rule.source):
            node.replace_input_with(rule.source, made)

    def _has_mean(self, node: Node) -> bool:
        forms = map(self._statistics.of, node.all_input_nodes)
        return any(form is not None and form.base is not None and form.has(Symbol.MEAN) for form in forms)

    def _replace(self, node: Node, form: VectorForm, root: bool) -> None:
        dtype = value(node).dtype
        make = _Maker(self.editor, node, _wide_enough(dtype) if form.has(Symbol.VARIANCE) else dtype)
        result = self._made(make, form)
        if root:
            result = make(_aten.sqrt.default, result)
        if form.place is Place.FLAT:
            result = make(_aten.squeeze.dim, result, -1)
        elif shape(node)[-1] != shape(result)[-1]:
            result = make(_aten.expand.default, result, [*[-1] * (len(shape(result)) - 1), shape(node)[-1]])
        if value(result).dtype != value(node).dtype:
            result = make(_aten.to.dtype, result, value(node).dtype)
        if shape(result) != shape(node):
            return  # what had given the result its shape has cancelled: it stays as it is
        if not root:
            self._statistics.know(result, form)
        self.editor.replace(node, result)

    def _made(self, make: _Maker, form: VectorForm) -> Node:
        """Return the sum of the form's terms, the last axis kept."""
        made: Node | None = None
        for monomial, coefficient in sorted(form.value.terms.items(), key=lambda term: not term[0]):  # a number last
            if made is not None and not monomial:
                made = make(_aten.add.Tensor, made, coefficient)
                continue
            term = self._product(make, monomial, form)
            if not cancel(coefficient, -1.0):
                term = make(_aten.mul.Tensor, term, coefficient)
            made = term if made is None else make(_aten.add.Tensor, made, term)
        assert made is not None
        return made

    def _product(self, make: _Maker, monomial: Monomial, form: VectorForm) -> Node:
        """Return the product of the powers, those with negative exponents last."""
        made: Node | None = None
        for atom, exponent in sorted(monomial, key=lambda power: (power[1] < 0, str(power[0]))):
            factor = self._factor(make, atom, form)
            for _ in range(abs(exponent)):
                if made is None:
                    made = factor if exponent > 0 else make(_aten.reciprocal.default, factor)
                else:
                    made = make(_aten.mul.Tensor if exponent > 0 else _aten.div.Tensor, made, factor)
        assert made is not None
        return made

    def _factor(self, make: _Maker, atom: Any, form: VectorForm) -> Node:
        assert form.base is not None and atom is not Symbol.MEAN
        if isinstance(atom, FlatNumber):
            return make(_aten.unsqueeze.default, atom.node, -1)
        if isinstance(atom, Node):
            return atom
        centred = self._centring(make, form.base)
        return centred if atom is Symbol.CENTRED else self._variance(make, centred)

    def _centring(self, make: _Maker, base: Node) -> Node:
        dtype = make.dtype
        if (base, dtype) not in self._centred:
            x = self._vectors.get((base, dtype), base)
            if value(x).dtype != dtype:
                x = self._vectors[base, dtype] = make(_aten.to.dtype, x, dtype)
            self._centred[base, dtype] = make(_aten.sub.Tensor, x, make(_aten.mean.dim, x, [-1], True))
        return self._centred[base, dtype]

    def _variance(self, make: _Maker, centred: Node) -> Node:
        if centred not in self._variances:
            square = make(_aten.pow.Tensor_Scalar, centred, 2)
            self._variances[centred] = make(_aten.mean.dim, square, [-1], True)
        return self._variances[centred]


class _Maker:
    """Makes nodes one after the other, right behind a node and in one dtype."""

    def __init__(self, editor: ProgramEditor, node: Node, dtype: torch.dtype) -> None:
        self._editor, self._last, self.dtype = editor, node, dtype

    def __call__(self, target: Any, *args: Any) -> Node:
        self._last = self._editor.call(target, *args, after=self._last, origin=_ORIGIN)
        return self._last


def _wide_enough(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to square in: torch's own variance of half types is summed in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _takes_root(node: Node) -> bool:
    operator = node.args[0] if op_name(node) == "getitem" else node
    assert isinstance(operator, Node)
    return "std" in op_name(operator)
