"""How much predictions depend on what a layer returns for a token:  c = ‖g‖²/n,  g = ∂ log p(t)/∂y,  t ~ p.

With y = W x of n outputs this is the diagonal of the Fisher information, averaged over the outputs of a token. One
label is drawn for each prediction, so that one backward pass of an input gives the curvature of all of its tokens in
all layers. As weights of tokens in GPTQ's Hessian, Σ x xᵀ·√c, they let it spend its error where predictions do not
see it. Second-order theory asks for c itself (Kim et al., GuidedQuant, arXiv 2505.07004). The square root does better
here: c is that of one draw, and few tokens have most of it, where the Hessian should know of every token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.execution import constants, log_probabilities
from spinpass.graph import shape
from spinpass.passes import open_program
from spinpass.progress import Progress
from spinpass.workers import Team

from ..layers import WeightSite, weight_sites

_SEED = 0
_TINY = 1e-30
_POWER = 0.5
NamedSites = Sequence[tuple[WeightSite, str]]
"""Layers, and the names of their weights."""


@dataclass(frozen=True)
class Drawn:
    """These are the values of one input that a backward pass leaves.

    Args:
        tokens: the number of predictions.
        layers: by name of a weight, what the layer takes, (…, in), and the gradient of what it returns, None where no
            prediction depends on it.
    """

    tokens: int
    layers: Mapping[str, tuple[Tensor, Tensor | None]]


def drawn_gradients(
    program: ExportedProgram,
    named: NamedSites,
    inputs: Sequence[object],
    progress: Progress,
    places: Sequence[int] | None = None,
) -> Iterator[Drawn]:
    """Yield, input by input, what layers take and the gradients of the log-probability of labels drawn from it.

    It takes, beside the program, the memory of one input's backward pass. With ``places`` of these inputs among those
    of all ranks, what is drawn for one depends on its place alone.

    Raises:
        ConfigError: the inputs do not fit the program, or its first output is no logits.
    """
    fixed = {name: t.detach() for name, t in constants(program).items() if isinstance(t, Tensor)}
    generator = torch.Generator("cpu").manual_seed(_SEED)  # the same draws on every device
    for done, values in enumerate(inputs):
        if places is not None:
            generator.manual_seed(places[done])
        kept = _Kept({s.operand.name for s, _ in named}, {s.linear.name for s, _ in named})
        predicted = log_probabilities(program, values, fixed, gradients=True, watch=kept)
        drawn = torch.multinomial(predicted.detach().exp().cpu(), 1, generator=generator).to(predicted.device)
        torch.autograd.backward(predicted.gather(1, drawn).sum())
        layers = {fqn: (kept.taken[s.operand.name], kept.returned[s.linear.name].grad) for s, fqn in named}
        yield Drawn(len(predicted), layers)
        progress(done + 1, len(inputs))


def curvature(x: Tensor, gradient: Tensor) -> Tensor:
    """Return ‖g‖²/n of every token, float32 (tokens,), for x (…, in) and g (…, n). All tokens have the same where g is
    laid out otherwise."""
    tokens = x.shape[:-1].numel()
    if gradient.shape[: x.ndim - 1] == x.shape[:-1]:
        return gradient.float().reshape(tokens, -1).square().mean(1)
    return gradient.float().square().mean().expand(tokens)


def token_counts(
    program: ExportedProgram, names: Collection[str], inputs: Sequence[object], team: Team, progress: Progress | None
) -> dict[str, list[Tensor]]:
    """Return by name of a weight how much each token counts, for each input a tensor float32 (tokens,).

    They are 1 on average over all inputs of the ``team``. Each rank calls this with all ``inputs``, and has the tensors
    of those that are dealt to it.

    Args:
        program: of a language model, whose first output are logits (…, vocabulary). It is not changed.
        names: of weights; those that are no linear layer of two axes get no entry.
        inputs: as for :func:`spinpass.quantization.quantize`.
        team: the ranks.
        progress: called with (inputs done, all inputs).

    Raises:
        ConfigError: the inputs do not fit the program, or its first output is no logits.
    """
    editor = open_program(program)
    sites = [site for site in weight_sites(editor)[0] if len(shape(site.weight)) == 2]
    named = [(site, fqn) for site, fqn in ((s, editor.fqn(s.weight)) for s in sites) if fqn in names]
    prepared = editor.finish()
    if not named:
        return {}
    found: dict[str, list[Tensor]] = {fqn: [] for _, fqn in named}
    share, places = team.dealt(inputs), team.dealt(range(len(inputs)))
    tick: Progress = progress or (lambda done, total: None)
    for drawn in drawn_gradients(prepared, named, share, tick, places):
        for fqn, (x, gradient) in drawn.layers.items():
            tokens = x.shape[:-1].numel()
            c = torch.ones(tokens, device=x.device) if gradient is None else curvature(x, gradient)
            found[fqn].append(c.pow(_POWER))
    return {fqn: _of_mean_one(each, team) for fqn, each in found.items()}


def _of_mean_one(each: Sequence[Tensor], team: Team) -> list[Tensor]:
    sums = torch.stack([torch.stack([c.double().sum() for c in each]).sum(), _number(each)])
    total, tokens = team.sum(sums).tolist()
    mean = total / tokens
    return [c / mean if mean > _TINY else torch.ones_like(c) for c in each]


def _number(each: Sequence[Tensor]) -> Tensor:
    return torch.tensor(float(sum(map(len, each))), dtype=torch.float64, device=each[0].device)


class _Kept:
    """A watch that keeps what layers take, and what they return with its gradient, once there is one."""

    def __init__(self, operands: Collection[str], layers: Collection[str]) -> None:
        self._operands, self._layers = operands, layers
        self.taken: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}

    def __call__(self, node: Node, result: Any) -> Any:
        if node.name in self._layers:
            if result.requires_grad:
                result.retain_grad()
            else:
                result = result.detach().requires_grad_()
            self.returned[node.name] = result
        if node.name in self._operands:
            self.taken[node.name] = result.detach()
        return result
