"""channel_scales: a rotated program, inputs  ->  the scales in front of its online Hadamards, in closed form.

    (x D H)(H⁻¹ D⁻¹ Wᵀ) = x Wᵀ;    min over D = diag(d)  Σ |x D|² · |D⁻¹ g|²  is near  dᵢ⁴ = Σ |x|² gᵢ² / Σ |g|² xᵢ²

for the x (n,) that the Hadamards take and the gradients g of the log-probability of labels that are drawn from the
predictions. A Hadamard levels the coordinates of x D, so rounding to steps in proportion to its size is off by δ with
E δδᵀ = c |x D|² I, and g·δ is what the log-probability is off by. A channel that predictions depend on gets finer steps
than one that is only large. The weight behind, D⁻¹ Wᵀ, is rounded to steps in proportion to its rows' sizes: with g the
gradient through it, that error is the same product. A token counts by both of its sizes, so the few massive ones, on
which predictions depend little, do not decide. (It would be the minimum if a token's size in the sums were that of x D
and D⁻¹ g.) Closed forms for one side of it: SmoothQuant, Xiao et al.,
arXiv 2211.10438, and AWQ, Lin et al., arXiv 2306.00978, from the largest values and without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.graph import ProgramEditor, arguments, op_name
from spinpass.operators import HADAMARD
from spinpass.progress import Progress
from spinpass.rotations import Rotation

from ..calibration import each_backward
from .balance import FLOOR, has_values
from .changes import LearningPlace

_WIDEST = 12.0  # the largest scale by the least: what a certificate in bfloat16 allows a matrix to magnify rounding by


def takes_scales(place: LearningPlace) -> bool:
    """Whether a space is turned by a Hadamard as the program runs and admits scales in front of it."""
    rotation = place.rotation
    return place.group == "invertible" and rotation is not None and rotation.kind == "hadamard"


def channel_scales(
    program: ExportedProgram,
    begun: Mapping[str, Rotation],
    inputs: Sequence[object],
    progress: Progress | None = None,
) -> dict[str, Rotation]:
    """Return the Hadamard of each space with scales in front of it, whose mean logarithm is 0.

    It takes the memory of one input's backward pass beside the program.

    Args:
        program: of a language model, rotated by Hadamards; its first output are logits (…, vocabulary). It is not
            changed.
        begun: the Hadamards of spaces that take scales, by name. One that is not turned online, or whose values or
            gradients are all zero, is left out.
        inputs: of the program, whose tokens count.
        progress: told the inputs that were run.

    Raises ConfigError: the inputs do not fit the program, its first output is no logits, or is no number.
    """
    editor = ProgramEditor(program)
    sites: dict[str, str] = {}
    for node in editor.nodes:
        space = node.meta.get("custom", {}).get("spinpass_origin")
        if op_name(node) == HADAMARD and space in begun and not arguments(node)["transpose"]:
            sites[node.name] = space
    moments: dict[str, Tensor] = {}

    def receive(name: str, turned: Tensor, gradient: Tensor) -> None:
        # the Hadamard is orthogonal, so the value and the gradient in front of it are those behind it, turned back
        rotation = begun[sites[name]]
        x, g = (rotation.apply(each.double(), inverse=True).reshape(-1, rotation.size) for each in (turned, gradient))
        x, g = x.square(), g.square()
        moments[sites[name]] = moments.get(sites[name], 0) + torch.stack((g.sum(1) @ x, x.sum(1) @ g))

    def watch(node: Node, value: Any) -> Any:
        if node.name in sites:
            value = value if value.requires_grad else value.detach().requires_grad_()
            value.register_hook(partial(receive, node.name, value.detach()))
        return value

    for _ in each_backward(program, inputs, lambda _: watch, progress or (lambda done, total: None)):
        pass
    return {
        space: Rotation.from_scales(levelled(*both.cpu()), space, block_size=begun[space].order)
        for space, both in moments.items()
        if all(map(has_values, both))
    }


def levelled(values: Tensor, gradients: Tensor) -> Tensor:
    """Return d (n,) of the weighted squares of values and of gradients, float64 (n,): their mean logarithm is 0."""
    raised = [each + FLOOR * each.mean() for each in (gradients, values)]
    found = (raised[0].log() - raised[1].log()) / 4
    found = found - found.mean()
    half = math.log(_WIDEST) / 2
    return found.clamp(-half, half).exp()
