"""What a configuration asks to quantize in a program: sites are chosen, and roundings are put into its graph.

    y = x Wᵀ   ->   y = round(x) Wᵀ,   softmax(q Kᵀ) V   ->   softmax(q round(K)ᵀ) round(V)

Ranges that calibration inputs decide on are left open: a static range begins as scale 1, zero point 0 and no limit,
and the share of a token's range that is covered as all of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from spinpass import operators  # noqa: F401  (registers torch.ops.spinpass)
from spinpass.graph import ProgramEditor, value

from ..report import EXCLUDED, NOT_ASKED
from ..scheme import FINE, Activations, Cache, QuantizationConfig, Weights
from .products import ORIGIN
from .sites import WeightSite, cache_sites, table_sites, weight_sites


class ChosenSites:
    """The sites that ``config`` asks for, with roundings put into the editor's graph.

    Args:
        editor: of the program that is quantized. Its graph is changed.
        config: what is asked for.

    Attributes:
        weights: the layers whose weights are rounded, each with the scheme for it.
        tables: the tables that are rounded, likewise.
        activations: the names of the nodes that round inputs of layers.
        caches: the names of the nodes that round keys and values.
        static: of the nodes that round in a range fixed beforehand, by name, the name of the operand.
        clipped: likewise of those whose share of a token's range is to be chosen.
        massive: of the nodes that begin to tell ordinary tokens from massive ones, by name, the name of the operand,
            that of the node whose limit is to be chosen, and how many times the median a token has to reach.
        roundings: the names of all nodes that round.
        beside: of nodes in ``clipped`` that round ordinary tokens alone, by name, the node that tells them apart.
        inputs: by name of a layer, the name of the node that it reads, which is the rounding if there is one.
        fqns: by name of the node of a weight or table, the name of the parameter.
        kept: by name of a layer, why its weight is not rounded.
    """

    def __init__(self, editor: ProgramEditor, config: QuantizationConfig) -> None:
        self.editor, self.config = editor, config
        sites, self.kept = weight_sites(editor)
        self.weights: list[tuple[WeightSite, Weights]] = []
        self.static: dict[str, str] = {}
        self.clipped: dict[str, str] = {}
        self.massive: dict[str, tuple[str, str, float]] = {}
        self.roundings: list[str] = []
        self.beside: dict[str, str] = {}
        self.activations: list[str] = []
        self.fqns = {site.weight.name: editor.fqn(site.weight) for site in sites}
        self.caches = [self._round_cache(node) for node in cache_sites(editor)] if config.cache else []
        rounded_already: dict[Node, Node] = {}
        roundable: set[str] = set()
        for site in sites:
            fqn = self.fqns[site.weight.name]
            if site.router and not config.names(fqn):
                self.kept[site.linear.name] = "it picks what comes next, and rounding would change which"
                continue
            if not config.stacks and value(site.weight).ndim > 2 and site.ends is None:
                self.kept[site.linear.name] = "the runtime has no product of integers in its place"
                continue
            roundable.add(fqn)
            scheme = config.weights_of(fqn, head=site.head)
            if scheme is not None:
                self.weights.append((site, scheme))
            else:
                self.kept[site.linear.name] = EXCLUDED if config.excludes(fqn) else NOT_ASKED
            if config.activations is None or config.excludes(fqn) or (site.head and config.head is None):
                continue
            if site.operand not in rounded_already:
                rounded_already[site.operand] = self._round_activation(site.operand)
            site.linear.replace_input_with(site.operand, rounded_already[site.operand])
        self.inputs = {s.linear.name: rounded_already.get(s.operand, s.operand).name for s in sites}
        tables = {table: editor.fqn(table) for table in table_sites(editor)}
        config.check_used(roundable | set(tables.values()))
        schemes = {table: config.table_of(fqn) for table, fqn in tables.items()}
        self.tables = [(table, scheme) for table, scheme in schemes.items() if scheme is not None]
        self.fqns |= {table.name: tables[table] for table, _ in self.tables}

    def _round_activation(self, node: Node) -> Node:
        scheme = self.config.activations
        assert scheme is not None
        if not scheme.static:
            made = self._round_tokens(node, scheme.bits, scheme.is_symmetric, scheme)
        else:
            each = value(node).shape[-1:] if scheme.per_channel else ()
            scale, zero = (
                self.editor.add_constant(
                    f"spinpass.{node.name}.{what}", torch.full(each, start, device=value(node).device)
                )
                for what, start in (("scale", 1.0), ("zero_point", 0.0))
            )
            made = self._call("round_rows", node, scale, zero, math.inf, scheme.bits)
            self.static[made.name] = node.name
        self.activations.append(made.name)
        return made

    def _round_cache(self, node: Node) -> str:
        scheme = self.config.cache
        assert scheme is not None
        users = list(node.users)
        made = self._round_tokens(node, scheme.bits, scheme.symmetric, scheme)
        self.editor.replace(node, made, users)
        return made.name

    def _round_tokens(self, node: Node, bits: int, symmetric: bool, scheme: Activations | Cache) -> Node:
        clip, near = scheme.clip, None
        if scheme.massive is not None:
            near = self._ordinary(node, scheme.massive)
        made = self._call("round_tokens", node, bits, symmetric, 1.0 if clip is None else clip, after=near)
        if clip is None and bits < FINE:
            self.clipped[made.name] = node.name
        if near is None:
            return made
        if made.name in self.clipped:
            self.beside[made.name] = near.name
        exact = self._call("round_tokens", node, FINE, symmetric, 1.0, after=made)
        where = torch.ops.aten.where.self
        return self.editor.call(where, near, made, exact, after=exact, origin=ORIGIN)

    def _ordinary(self, node: Node, massive: float) -> Node:
        """Return a node that says which tokens have no massive value, (..., 1); the limit is left open."""
        magnitude = self.editor.call(torch.ops.aten.abs.default, node, after=node, origin=ORIGIN)
        peak = self.editor.call(torch.ops.aten.amax.default, magnitude, [-1], True, after=magnitude, origin=ORIGIN)
        near = self.editor.call(torch.ops.aten.le.Scalar, peak, math.inf, after=peak, origin=ORIGIN)
        self.massive[magnitude.name] = (node.name, near.name, massive)
        return near

    def _call(self, name: str, node: Node, *args: Any, after: Node | None = None) -> Node:
        target = getattr(torch.ops.spinpass, name).default
        made = self.editor.call(target, node, *args, after=after or node, origin=ORIGIN)
        self.roundings.append(made.name)
        return made
