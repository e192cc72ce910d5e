"""How much predictions depend on what a layer returns for a token:  c = ‖g‖²/n,  g = ∂ log p(t)/∂y,  t ~ p.

With y = W x of n outputs this is the diagonal of the Fisher information, averaged over the outputs of a token. One
label is drawn for each prediction, so that one backward pass of an input gives the curvature of all of its tokens in
all layers. As weights of tokens in GPTQ's Hessian, Σ x xᵀ·√c, they let it spend its error where predictions do not
see it. Second-order theory asks for c itself (Kim et al., GuidedQuant, arXiv 2505.07004). The square root does better
here: c is that of one draw, and few tokens have most of it, where the Hessian should know of every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.execution import Watch, flat_inputs, log_probabilities
from spinpass.graph import shape
from spinpass.passes import open_program
from spinpass.progress import Progress
from spinpass.workers import Team

from ..layers import WeightSite, weight_sites

_SEED = 0
_TINY = 1e-30
_POWER = 0.5
_Kept = TypeVar("_Kept")
NamedSites = Sequence[tuple[WeightSite, str]]
"""Layers, and the names of their weights."""


def draw_gradients(
    program: ExportedProgram,
    named: NamedSites,
    inputs: Sequence[object],
    keep: Callable[[Tensor], _Kept],
    receive: Callable[[str, _Kept, Tensor], None],
    progress: Progress,
    places: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield, input by input, the number of predictions, once their gradients have been received.

    It takes, beside the program, the memory of one input's backward pass, in which values are computed twice where that
    is much (:mod:`spinpass.execution.recomputed`).

    Args:
        program: of a language model. It is not changed.
        named: the layers.
        inputs: of the program.
        keep: is given what a layer takes, (…, in), and returns what is kept of it until there is a gradient.
        receive: is given the name of a weight, what was kept, and the gradient of what the layer returns, (…, n), of
            the log-probability of labels that are drawn from it; it is not called where no prediction depends on that.
        progress: called with (inputs done, all inputs).
        places: of the inputs among those of all ranks. What is drawn for one then depends on its place alone.

    Raises:
        ConfigError: the inputs do not fit the program, its first output is no logits, or depends on none of the layers,
            or is no number.
    """

    def watching(given: Mapping[str, Any]) -> Watch:
        return _Hooked(named, keep, receive, {n: keep(x) for n, x in given.items() if isinstance(x, Tensor)})

    yield from each_backward(program, inputs, watching, progress, places)


def each_backward(
    program: ExportedProgram,
    inputs: Sequence[object],
    watching: Callable[[Mapping[str, Any]], Watch],
    progress: Progress,
    places: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield, input by input, the number of predictions, once the log-probability of labels drawn from them went back.

    Args:
        program, inputs, progress, places: as for :func:`draw_gradients`.
        watching: is given the flat inputs of a run, by name, and returns what watches it: that hooks the values whose
            gradients it wants, after it has had them require gradients where they do not.

    Raises ConfigError as :func:`draw_gradients`.
    """
    generator = torch.Generator("cpu").manual_seed(_SEED)  # the same draws on every device
    for done, values in enumerate(inputs):
        if places is not None:
            generator.manual_seed(places[done])
        watch = watching(flat_inputs(program, values))
        predicted = log_probabilities(program, values, {}, gradients=True, watch=watch)
        _check_predicted(predicted, done)
        drawn = torch.multinomial(predicted.detach().exp().cpu(), 1, generator=generator).to(predicted.device)
        torch.autograd.backward(predicted.gather(1, drawn).sum())
        progress(done + 1, len(inputs))
        yield len(predicted)


def _check_predicted(predicted: Tensor, place: int) -> None:
    """Raise ConfigError where log-probabilities have no gradients, or are no numbers."""
    without = "leave out what needs gradients ('fisher', balance, or bits on average)"
    if not predicted.requires_grad:
        raise ConfigError(
            "no prediction depends on what a layer that is rounded returns: the first output of the program has to be "
            f"the logits of the whole model; export it so, or {without}"
        )
    if bool(predicted.isnan().any()):
        raise ConfigError(
            f"what the program predicts for input {place + 1} is no number: see whether its weights are, and whether "
            f"they overflow its dtype; or {without}"
        )


def curvature(tokens: Sequence[int], gradient: Tensor) -> Tensor:
    """Return ‖g‖²/n of every token, float32 (number of tokens,), for g (*tokens, n). All have the same where g is laid
    out otherwise."""
    squares = gradient.float().square()
    if tuple(gradient.shape[: len(tokens)]) == tuple(tokens):
        return squares.reshape(math.prod(tokens), -1).mean(1)
    return squares.mean().expand(math.prod(tokens))


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
    share, places = team.dealt(inputs), team.dealt(range(len(inputs)))
    tick: Progress = progress or (lambda done, total: None)
    found: dict[str, list[Tensor]] = {fqn: [] for _, fqn in named}
    this: dict[str, Tensor] = {}

    def receive(fqn: str, tokens: Sequence[int], gradient: Tensor) -> None:
        this[fqn] = this.get(fqn, 0) + curvature(tokens, gradient)

    for _ in draw_gradients(prepared, named, share, lambda x: x.shape[:-1], receive, tick, places):
        for fqn, each in found.items():
            if fqn in this:  # else no prediction depends on it, whatever the input
                each.append(this.pop(fqn).pow(_POWER))
    return {fqn: _of_mean_one(each, team) for fqn, each in found.items() if each}


def _of_mean_one(each: Sequence[Tensor], team: Team) -> list[Tensor]:
    of_all = torch.cat(list(each)).double()
    total, tokens = team.sum(torch.stack([of_all.sum(), torch.ones_like(of_all).sum()])).tolist()
    mean = total / tokens
    return [c / mean if _TINY < mean < math.inf else torch.ones_like(c) for c in each]


class _Hooked(Generic[_Kept]):
    """A watch that hands out the gradient of what each layer returns, once there is one."""

    def __init__(
        self,
        named: NamedSites,
        keep: Callable[[Tensor], _Kept],
        receive: Callable[[str, _Kept, Tensor], None],
        given: Mapping[str, _Kept],
    ) -> None:
        self._layers = {site.linear.name: (site.operand.name, fqn) for site, fqn in named}
        self._operands = {site.operand.name for site, _ in named}
        self._keep, self._receive, self._kept = keep, receive, dict(given)

    def __call__(self, node: Node, result: Any) -> Any:
        if node.name in self._layers:
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            operand, fqn = self._layers[node.name]
            result.register_hook(partial(self._receive, fqn, self._kept[operand]))
        if node.name in self._operands:
            self._kept[node.name] = self._keep(result.detach())
        return result
