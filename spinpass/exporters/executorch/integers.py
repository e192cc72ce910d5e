"""Linear layers on integers in the form that ExecuTorch's XNNPACK delegate multiplies as integers (8da4w, 8da8w).

    linear(round_tokens(x), Ŵ)  ->  linear(dequantize(quantize(x)), dequantize(q, s))

Each token is rounded to int8 with a scale and a zero point found as it comes; weights are the integers of the
quantizer, less their zero point, and are not rounded again. XNNPACK keeps the scales of groups in bfloat16, so they are
in the graph as well (per channel: float32), and its tokens have zero points: the scheme ``w4g32-bf16-gptq-a8asym``
simulates both, and with any other the simulation's rounding differs a little from the kernel's.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import executorch.exir  # noqa: F401  (registers quantized_decomposed)
import torch
import torchao.quantization.quant_primitives  # noqa: F401  (registers torchao)
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass import record
from spinpass.errors import ConfigError
from spinpass.graph import ProgramEditor, arguments, op_name, shape
from spinpass.quantization import Codes, Quantized, pack, rewritten, weight_name

_ROUNDING = "spinpass::round_tokens"
_GROUP_MULTIPLE = 32  # XNNPACK's block-wise kernel
_TOKEN = (torch.int8, -128, 127)
_ADVICE = (
    "choose w4g32 (groups of a multiple of 32), w4 or w8 per channel, symmetric, with a8 or a8asym, or leave the layer "
    "out with QuantizationConfig(exclude=...)"
)


@dataclass(frozen=True)
class IntegerLayers:
    """This is a program whose quantized linear layers are integers.

    ``layers`` is how many there are, ``scale_error`` the largest relative change of a scale by bfloat16. ``kept`` says
    by parameter name why a quantized weight stayed a float constant.
    """

    program: ExportedProgram
    layers: int
    scale_error: float
    kept: Mapping[str, str]


def with_integer_layers(quantized: Quantized) -> IntegerLayers:
    """Put the integers of a quantized program into its graph. What is given stays as it is.

    Raises:
        ConfigError: the program has no quantized linear layer, or one whose integers or inputs XNNPACK has no kernel
            for; the message lists them.
    """
    packed = pack(quantized)
    weights = quantized.report.weights
    _check(weights, packed.kept)
    work = _Work({name: weights[name].codes for name in weights})
    program = rewritten(packed.program, work.product)
    found = record.read(quantized.program)
    if found is not None and record.read(program) is None:
        record.write(program.graph, found)
    return IntegerLayers(program, work.layers, work.scale_error, packed.kept)


def _check(weights: Mapping[str, Any], kept: Mapping[str, str]) -> None:
    reasons = {name: _why_not(weight.codes) for name, weight in weights.items() if name not in kept}
    wrong = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if wrong:
        raise ConfigError(f"XNNPACK has no kernel for {len(wrong)} weights ({'; '.join(wrong[:3])}); {_ADVICE}")


def _why_not(codes: Codes) -> str:
    """Return why XNNPACK cannot multiply by these integers; the reason is empty where it can."""
    length, columns = codes.group_length, codes.q.shape[1]
    if not codes.symmetric:
        return "its zero points differ"
    if length is None or columns % length:
        return "its groups are not equally long, side by side"
    if length == columns:
        return "" if columns % 2 == 0 or codes.bits == 8 else f"its {columns} inputs are an odd number"
    if codes.bits == 8:
        return f"8 bits in groups of {length}"
    return "" if length % _GROUP_MULTIPLE == 0 else f"groups of {length}"


class _Work:
    """This makes the new layers, one after the other."""

    def __init__(self, codes: Mapping[str, Codes]) -> None:
        self._codes = codes
        self.layers = 0
        self.scale_error = 0.0

    def product(self, editor: ProgramEditor, node: Node) -> tuple[Any, ...]:
        """Return what stands for a packed layer, as :func:`spinpass.quantization.rewritten` asks for it."""
        given = arguments(node)
        name = weight_name(editor, given["qweight"])
        chain = _Chain(editor, node)
        operand = self._tokens(chain, given["x"], name)
        weight = self._weight(chain, self._codes[name], name.removesuffix(".weight"))
        self.layers += 1
        return torch.ops.aten.linear.default, operand, weight, given["bias"]

    def _tokens(self, chain: _Chain, rounding: Node, name: str) -> Node:
        """Round the tokens anew for every layer: XNNPACK takes the nodes into the delegate with it."""
        rounds = op_name(rounding) == _ROUNDING and arguments(rounding)
        if not rounds or rounds["bits"] != 8 or rounds["clip"] != 1.0:
            found = f"{op_name(rounding)}{[rounds['bits'], rounds['clip']] if rounds else ''}"
            raise ConfigError(
                f"{name}: XNNPACK multiplies integers by int8 tokens over their whole range, and its input is {found}; "
                f"quantize with a8, or export the simulated program, which is float: {_ADVICE}"
            )
        x = rounds["x"]
        block = [1] * (len(shape(x)) - 1) + [shape(x)[-1]]
        ops = torch.ops.torchao
        chosen = chain.call(ops.choose_qparams_affine.default, x, "ASYMMETRIC", block, *_TOKEN, None, None, torch.int8)
        scale, zero = (chain.call(operator.getitem, chosen, i) for i in (0, 1))
        q = chain.call(ops.quantize_affine.default, x, block, scale, zero, *_TOKEN)
        return chain.call(ops.dequantize_affine.default, q, block, scale, zero, *_TOKEN)

    def _weight(self, chain: _Chain, codes: Codes, module: str) -> Node:
        grouped = codes.scales.shape[1] > 1
        shift = 2 ** (codes.bits - 1)
        low, high = (-128, 127) if codes.bits == 8 else (-8, 7)  # 2 and 3 bits lie in 4
        scales = codes.scales.float()
        if grouped:
            scales = self._narrowed(scales)
        q = (codes.q.to(torch.int16) - shift).to(torch.int8)
        kept = scales if grouped else scales[:, 0].contiguous()
        parts = {"q": q, "scale": kept, "zero_point": torch.zeros(kept.shape, dtype=torch.int8, device="cpu")}
        stored = [chain.editor.add_constant(f"{module}.{part}", tensor) for part, tensor in parts.items()]
        if not grouped:
            target = torch.ops.quantized_decomposed.dequantize_per_channel.default
            return chain.call(target, *stored, 0, low, high, torch.int8)
        block = [1, codes.group_length]
        q_node, *rest = stored
        return chain.call(torch.ops.torchao.dequantize_affine.default, q_node, block, *rest, torch.int8, low, high)

    def _narrowed(self, scales: Tensor) -> Tensor:
        narrow = scales.bfloat16().float()
        self.scale_error = max(self.scale_error, float(((narrow - scales).abs() / scales).max()))
        return narrow


class _Chain:
    """A chain adds nodes in a row before a layer."""

    def __init__(self, editor: ProgramEditor, layer: Node) -> None:
        self.editor = editor
        self._at = layer.prev

    def call(self, target: Any, *args: Any) -> Node:
        self._at = self.editor.call(target, *args, after=self._at, origin="integer layers")
        return self._at
