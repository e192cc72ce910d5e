"""Quantization-aware fine-tuning of a packed program:  the exported graph, with its scales and latent weights to train.

    packed_linear(x, q, s, z, g, b)   ->   linear(x, round_weight(w, s, z, g), b), w float (out, in)

Every forward pass rounds the latent weights w to codes again, and gradients pass straight through the rounding
(:func:`spinpass.operators.packed_linear.round_weight`; LSQ, Esser et al., arXiv 1902.08153). With ``frozen`` codes only
the scales are trained, on the packed graph itself, as in PEQA (Kim et al., arXiv 2305.14152). Roundings of activations
and caches pass gradients straight through as well where the value lies within the range. Importing this module
registers that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass import operators
from spinpass.errors import ConfigError
from spinpass.graph import ProgramEditor, arguments, integers_as_buffers, shape, storage_key, value, with_constants
from spinpass.operators import nearest, pack_words

from ..layers import ORIGIN
from .program import packed_layers, rewritten, weight_name, weight_of

_aten = torch.ops.aten


class Trainable(nn.Module):
    """A packed program to be fine-tuned, called as the program is.

    Its parameters with gradients are the scales, and the latent weights unless the codes are frozen, under their names
    in the program. All others are left without: set ``requires_grad`` of those that should move as well. Zero points do
    not move.

    Args:
        program: packed, as :func:`.program.pack` returns it. It is not changed.
        latent: float weights (out, in) by name, ``x.weight`` for ``x.qweight``, to begin with, for example those of the
            original program. Others begin as what their codes stand for. All take the dtype of their scales.
        frozen: keep the codes and train the scales alone.

    Raises:
        ConfigError: the program has no packed layer, or scales that are no constants. A latent weight belongs to no
            packed layer, has another shape, or is given beside ``frozen`` codes.
    """

    def __init__(
        self, program: ExportedProgram, *, latent: Mapping[str, Tensor] | None = None, frozen: bool = False
    ) -> None:
        super().__init__()
        self.source = program
        self.layers = _layers(program)
        given = dict(latent or {})
        _check(self.layers, given, frozen)
        self.frozen = frozen
        graph = integers_as_buffers(program) if frozen else rewritten(program, _latent_products(program, given))
        self.graph = with_constants(graph, _copied(graph.state_dict)).module()
        moving = {layer.scales for layer in self.layers.values()} | (set() if frozen else set(self.layers))
        for name, parameter in self.graph.named_parameters():
            parameter.requires_grad_(name in moving)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program returns for these inputs."""
        return self.graph(*args, **kwargs)

    def train(self, mode: bool = True) -> Trainable:
        """Set the mode, on which nothing of an exported graph depends."""
        self.training = mode
        return self

    def packed(self) -> ExportedProgram:
        """A packed program with the values that the parameters have by now. It computes what this module does.

        Raises:
            ConfigError: a scale is zero or not finite.
        """
        trained = self.graph.state_dict(keep_vars=True)
        state = dict(self.source.state_dict)
        state |= {name: t for name, t in _copied(trained).items() if name in state and t.is_floating_point()}
        for name, layer in self.layers.items():
            scales = trained[layer.scales]
            if not bool((scales.isfinite() & (scales != 0)).all()):
                raise ConfigError(f"{layer.scales} has become zero or not finite: train with a lower learning rate")
            if not self.frozen:
                g_idx = None if layer.g_idx is None else trained[layer.g_idx]
                q = nearest(trained[name], scales, trained[layer.qzeros], g_idx, layer.bits)
                state[layer.qweight] = nn.Parameter(pack_words(q.T, layer.bits, 0), requires_grad=False)
        return with_constants(self.source, state)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies without gradients, one for all names of a tensor."""
    made: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tensors.values():
        if _identity(tensor) not in made:
            new = tensor.detach().clone()
            made[_identity(tensor)] = nn.Parameter(new, requires_grad=False) if _is_parameter(tensor) else new
    return {name: made[_identity(tensor)] for name, tensor in tensors.items()}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return *storage_key(tensor), _is_parameter(tensor)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


@dataclass(frozen=True)
class _Layer:
    """The names of a packed layer's constants, the width of its codes, and the shape (out, in) of its weight."""

    qweight: str
    scales: str
    qzeros: str
    g_idx: str | None
    bits: int
    shape: tuple[int, int]


def _layers(program: ExportedProgram) -> dict[str, _Layer]:
    """The packed layers by the names of their weights."""
    editor = ProgramEditor(integers_as_buffers(program))
    found: dict[str, _Layer] = {}
    for node in packed_layers(editor):
        args = arguments(node)
        name = weight_name(editor, args["qweight"])
        if not editor.is_stored(args["scales"]):
            raise ConfigError(f"the scales of {name} are computed in the graph: make them constants with decode_scales")
        (_, out), columns = shape(args["scales"]), shape(args["x"])[-1]
        assert isinstance(out, int) and isinstance(columns, int)  # those of a stored weight
        g_idx = None if args["g_idx"] is None else editor.fqn(args["g_idx"])
        qweight, scales, qzeros = (editor.fqn(args[key]) for key in ("qweight", "scales", "qzeros"))
        found[name] = _Layer(qweight, scales, qzeros, g_idx, args["bits"], (out, columns))
    if not found:
        raise ConfigError("the program has no packed linear layer; quantize it and pack the result")
    return found


def _check(layers: Mapping[str, _Layer], latent: Mapping[str, Tensor], frozen: bool) -> None:
    if frozen and latent:
        raise ConfigError("latent weights move codes, and frozen=True keeps them: give one of the two")
    for name, tensor in latent.items():
        if name not in layers:
            raise ConfigError(f"{name} is the weight of no packed layer; those are {', '.join(sorted(layers))}")
        if tuple(tensor.shape) != layers[name].shape:
            raise ConfigError(f"{name} is {list(tensor.shape)}, and its layer takes {list(layers[name].shape)}")


def _latent_products(
    program: ExportedProgram, latent: Mapping[str, Tensor]
) -> Callable[[ProgramEditor, Node], tuple[Any, ...]]:
    """What makes the call for a packed layer whose weight is rounded from a latent one, once for all its readers."""
    made: dict[Node, Node] = {}

    def product(editor: ProgramEditor, node: Node) -> tuple[Any, ...]:
        args = arguments(node)
        key, dtype = args["qweight"], value(args["x"]).dtype
        if key not in made:
            name, scales = weight_name(editor, key), args["scales"]
            start = latent[name].detach() if name in latent else weight_of(editor, program, args)
            weight = editor.add_constant(name, start.to(value(scales).dtype, copy=True))
            constants = (weight, scales, args["qzeros"], args["g_idx"], args["bits"])
            target = torch.ops.spinpass.round_weight.default
            made[key] = editor.call(target, *constants, after=node.prev, origin=ORIGIN)
        weight = made[key]
        if value(weight).dtype != dtype:
            weight = editor.call(_aten.to.dtype, weight, dtype, after=node.prev, origin=ORIGIN)
        return _aten.linear.default, args["x"], weight, args["bias"]

    return product


# Straight through the rounding, and nothing where a value was cut off.


def _tokens_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.symmetric, ctx.clip = inputs
    ctx.save_for_backward(x)


def _tokens_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    if ctx.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return gradient * ((x <= ctx.clip * high) & (x >= ctx.clip * low)), None, None, None


def _tensor_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bits = inputs
    ctx.save_for_backward(*tensors)


def _tensor_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero = ctx.saved_tensors
    return gradient * _is_covered(x, scale, zero, ctx.bits), None, None, None


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.limit, ctx.bits = inputs
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero = ctx.saved_tensors
    factor = (x.abs().amax(-1, keepdim=True) / ctx.limit).clamp_min(1)
    return gradient * _is_covered(x / factor, scale, zero, ctx.bits), None, None, None, None


def _is_covered(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    level = (x.to(scale.dtype) / scale).round() + zero
    covered: Tensor = (level >= 0) & (level <= 2**bits - 1)
    return covered


operators.round_tokens.register_autograd(_tokens_backward, setup_context=_tokens_context)
operators.round_tensor.register_autograd(_tensor_backward, setup_context=_tensor_context)
operators.round_rows.register_autograd(_rows_backward, setup_context=_rows_context)
