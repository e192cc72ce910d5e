"""quantize:  program, configuration, calibration inputs  ->  a program that computes as the quantized one would.

Roundings of activations and caches become nodes of the graph; weights become the constants that their integers stand
for, and the integers are returned beside the program. With calibration inputs one run through the graph does all that
depends on them (:mod:`.calibration.lockstep`): every layer is calibrated on what the quantized layers before it return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass import operators  # noqa: F401  (registers torch.ops.spinpass)
from spinpass.errors import ConfigError
from spinpass.execution import constants
from spinpass.graph import ProgramEditor, arguments, shape, value
from spinpass.passes import open_program
from spinpass.progress import Progress

from .calibration.allocate import allocated
from .calibration.lockstep import OperandWatch, run_in_lockstep
from .layers.sites import WeightSite, cache_sites, table_sites, weight_sites
from .packed.distill import distilled
from .packed.mixed_rows import split_rows
from .report import QuantizationReport, Quantized, QuantizedWeight
from .rounding.gptq import gptq
from .rounding.grid import rounded
from .rounding.moments import Moments
from .rounding.ranges import static_range, token_clip
from .scheme import QuantizationConfig, Weights

_ORIGIN = "quantization"
_LIMIT = 3  # of the arguments of round_rows
_CLIP = 3  # of those of round_tokens


def quantize(
    program: ExportedProgram,
    config: QuantizationConfig | str,
    calibration: Sequence[object] = (),
    *,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a floating-point program, rotated or not. The program is not changed.

    Args:
        program: of a language model, as :func:`spinpass.transform` takes and returns it.
        config: what to quantize; a string is parsed by :meth:`QuantizationConfig.parse`.
        calibration: inputs of the program, each as ``program.example_inputs`` has them or by name; GPTQ and static
            ranges are made on all of them together.
        progress: called with (steps done, all steps) while weights are rounded.

    Raises:
        ConfigError: calibration inputs are needed and there are none, or they do not fit the program; nothing in the
            program to quantize.
    """
    chosen = QuantizationConfig.parse(config) if isinstance(config, str) else config
    if chosen.needs_calibration and not calibration:
        raise ConfigError(
            "GPTQ, static activations, distill and average_bits need calibration inputs; give some, or use method='rtn'"
        )
    if chosen.average_bits is not None:
        chosen = allocated(program, chosen, calibration, progress)
    editor = open_program(program)
    work = _Work(editor, chosen)
    if not (work.weights or work.tables or work.activations or work.caches):
        raise ConfigError("there is nothing to quantize: " + "; ".join(work.kept.values() or ["no linear layers"]))
    prepared = editor.finish()
    calibrator = _Calibrator(prepared, work)
    if calibration:
        reference = {*work.activations, *work.caches} if chosen.follows else None
        run_in_lockstep(prepared, calibration, calibrator.watches(), reference, progress)
    calibrator.rest(progress if not calibration else None)
    result = ProgramEditor(prepared)
    by_name = {n.name: n for n in result.nodes}
    for name, compute in calibrator.changed.items():
        result.queue(by_name[name], lambda _, new=compute: new().double())  # type: ignore[misc]
    for name in work.static:
        _drop_limit(result, by_name[name])
    made = split_rows(Quantized(result.finish(), calibrator.report(program)))
    if chosen.distill:
        made = distilled(program, made, calibration, epochs=chosen.distill, progress=progress)
    return made


def _drop_limit(editor: ProgramEditor, node: Node) -> None:
    """round_rows(x, …, ∞) -> round_tensor(x, …)"""
    args = arguments(node)
    if args.pop("limit") == math.inf:
        plain = editor.call(torch.ops.spinpass.round_tensor.default, *args.values(), after=node, origin=_ORIGIN)
        editor.replace(node, plain, list(node.users))


class _Work:
    """The sites of a configuration; roundings of computed values are put into the graph."""

    def __init__(self, editor: ProgramEditor, config: QuantizationConfig) -> None:
        self.editor, self.config = editor, config
        sites, self.kept = weight_sites(editor)
        self.weights: list[tuple[WeightSite, Weights]] = []
        self.static: dict[str, str] = {}  # rounding node -> operand
        self.clipped: dict[str, str] = {}  # the same, where a share of the range is to be chosen
        self.activations: list[str] = []
        self.fqns = {site.weight.name: editor.fqn(site.weight) for site in sites}
        self.caches = [self._round_cache(node) for node in cache_sites(editor)] if config.cache else []
        rounded_already: dict[Node, Node] = {}
        for site in sites:
            fqn = self.fqns[site.weight.name]
            scheme = config.weights_of(fqn, head=site.head)
            if scheme is not None:
                self.weights.append((site, scheme))
            else:
                self.kept[site.linear.name] = "excluded" if config.excludes(fqn) else "not asked for"
            if config.activations is None or config.excludes(fqn) or (site.head and config.head is None):
                continue
            if site.operand not in rounded_already:
                rounded_already[site.operand] = self._round_activation(site.operand)
            site.linear.replace_input_with(site.operand, rounded_already[site.operand])
        self.inputs = {s.linear.name: rounded_already.get(s.operand, s.operand).name for s in sites}
        self.tables = [] if config.embedding is None else [(t, config.embedding) for t in table_sites(editor)]
        self.fqns |= {table.name: editor.fqn(table) for table, _ in self.tables}

    def _round_activation(self, node: Node) -> Node:
        scheme = self.config.activations
        assert scheme is not None
        if not scheme.static:
            made = self._round_tokens(node, scheme.bits, scheme.is_symmetric, scheme.clip)
        else:
            each = value(node).shape[-1:] if scheme.per_channel else ()
            scale, zero = (
                self.editor.add_constant(f"spinpass.{node.name}.{what}", torch.full(each, start))
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
        made = self._round_tokens(node, scheme.bits, scheme.symmetric, scheme.clip)
        self.editor.replace(node, made, users)
        return made.name

    def _round_tokens(self, node: Node, bits: int, symmetric: bool, clip: float | None) -> Node:
        made = self._call("round_tokens", node, bits, symmetric, 1.0 if clip is None else clip)
        if clip is None and bits < 8:  # at 8 bits there is nothing to win
            self.clipped[made.name] = node.name
        return made

    def _call(self, name: str, node: Node, *args: Any) -> Node:
        target = getattr(torch.ops.spinpass, name).default
        return self.editor.call(target, node, *args, after=node, origin=_ORIGIN)


@dataclass
class _Calibrator:
    """Rounds the weights of a prepared program: those that inputs reach when they come by, the rest at the end."""

    program: ExportedProgram
    work: _Work
    changed: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # by placeholder name, computed when asked
    done: dict[str, QuantizedWeight] = field(default_factory=dict)  # by FQN
    _seen: dict[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._constants = constants(self.program)
        self._nodes = {n.name: n for n in self.program.graph.nodes}

    def watches(self) -> dict[str, tuple[str, OperandWatch]]:
        """What to do at which node, see :func:`run_in_lockstep`."""
        found: dict[str, tuple[str, OperandWatch]] = {}
        for name, operand in self.work.static.items():
            found[name] = (operand, lambda values, _, node=name: self._static(values, node))  # type: ignore[misc]
        for name, operand in self.work.clipped.items():
            found[name] = (operand, lambda values, _, node=name: self._clip(values, node))  # type: ignore[misc]
        for site, scheme in self.work.weights:
            operand = self.work.inputs[site.linear.name]
            found[site.linear.name] = (
                operand,
                lambda values, as_it_was, s=site, how=scheme, x=operand: self._weight(  # type: ignore[misc]
                    s, how, self._moments(x, values, as_it_was, s)
                ),
            )
        return found

    def rest(self, progress: Progress | None) -> None:
        """Round to nearest what no calibration input has reached, and the tables."""
        todo = [(s.weight.name, s.dim, how) for s, how in self.work.weights]
        todo += [(table.name, 1, how) for table, how in self.work.tables]
        for k, (name, dim, scheme) in enumerate(todo):
            if self.work.fqns[name] not in self.done:
                self._round(name, dim, scheme, None)
            if progress is not None:
                progress(k + 1, len(todo))

    def report(self, source: ExportedProgram) -> QuantizationReport:
        """What was done."""
        before = sum(t.nbytes for t in source.state_dict.values())
        saved = sum(
            source.state_dict[n].nbytes - w.codes.nbytes for n, w in self.done.items() if n in source.state_dict
        )
        work = self.work
        return QuantizationReport(
            self.done, tuple(work.activations), tuple(work.caches), work.kept, before, before - saved
        )

    def _moments(
        self, operand: str, values: list[Tensor], references: list[Tensor], site: WeightSite
    ) -> Moments | None:
        """Over all inputs; None for weights with more axes than two, whose tokens are dealt out."""
        if len(shape(site.weight)) != 2:
            return None
        if operand not in self._seen:
            self._seen.clear()  # only neighbours share an input
            self._seen[operand] = Moments.of(values, references)
        return self._seen[operand]

    def _weight(self, site: WeightSite, scheme: Weights, moments: Moments | None) -> Mapping[str, Tensor]:
        name = site.weight.name
        if self.work.fqns[name] in self.done:  # read before, by another layer
            return {}
        return {name: self._round(name, site.dim, scheme, moments)}

    def _round(self, name: str, dim: int, scheme: Weights, moments: Moments | None) -> Tensor:
        stored = self._constants[name].detach()
        moved = stored.movedim(dim, -1)
        matrix = moved.reshape(-1, moved.shape[-1]).float()
        if scheme.method == "gptq" and moments is not None:
            target = moments.target(matrix, scheme.damping) if scheme.follow else matrix
            codes = gptq(target, moments.own, scheme)
        else:
            codes = rounded(matrix, scheme)
        result = codes.dequantized()
        # the integers are kept, a quarter of what they stand for
        self.changed[name] = lambda: codes.dequantized().reshape(moved.shape).movedim(-1, dim).to(stored.dtype)
        if moments is None:
            error = float((result - matrix).square().sum() / matrix.square().sum().clamp_min(1e-30))
        else:
            error = moments.error(matrix, result)
        self.done[self.work.fqns[name]] = QuantizedWeight(codes, dim, scheme, error)
        return result.reshape(moved.shape).movedim(-1, dim).to(stored.dtype).contiguous()

    def _clip(self, values: list[Tensor], name: str) -> Mapping[str, Tensor]:
        node = self._nodes[name]
        args = arguments(node)
        node.update_arg(_CLIP, token_clip(values, args["bits"], args["symmetric"]))
        return {}

    def _static(self, values: list[Tensor], name: str) -> Mapping[str, Tensor]:
        scheme = self.work.config.activations
        assert scheme is not None
        found, node = static_range(values, scheme), self._nodes[name]
        node.update_arg(_LIMIT, found.limit)
        numbers = dict(zip((n.name for n in node.all_input_nodes[1:]), (found.scale, found.zero)))
        self.changed |= {name: lambda value=value: value for name, value in numbers.items()}
        return numbers
