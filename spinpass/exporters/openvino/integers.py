"""Integers of a quantized program as the constants that OpenVINO multiplies by where they lie.

    Constant W  ->  Reshape(Multiply(Subtract(Convert(q), Convert(z)), s)),   W = (q − z)·s bit for bit

q is u4, u8 or u2 (out, blocks, length), z of the same type and s float32 (out, blocks, 1); codes of three bits lie in
four. Symmetric codes are signed, i4 or i8, and have no z. A block is a group, or where groups do not divide the inputs
the largest part of one that does, with the same scale again. The CPU plugin keeps this form in memory:
``FullyConnected`` reads it by blocks, and ``Gather`` the rows that are looked up. A program's constants have
other names in the model, so they are known by their values, and one with several readers is replaced once for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.quantization import Codes, Quantized, QuantizedWeight

_FLOAT = "f32"
_TYPES = {(8, True): "i8", (8, False): "u8", (4, True): "i4", (4, False): "u4", (2, False): "u2", (2, True): "u2"}
_STORED = {2: 2, 3: 4, 4: 4, 8: 8}  # the width that codes lie in
_SHORTEST = 8  # of a block: its scale takes four bytes
_ADVICE = "choose another group size, or leave it out with --keep (QuantizationConfig(exclude=...))"


def check_integers(quantized: Quantized) -> None:
    """Raise ConfigError, naming the weights, where OpenVINO has no form for the integers of some."""
    stored = quantized.program.state_dict
    halves = [name for name in quantized.report.weights if name in stored and stored[name].dtype != torch.float32]
    if halves:
        raise ConfigError(
            f"{halves[0]} is {stored[halves[0]].dtype}, and OpenVINO multiplies by integers in float32: load the model "
            "in float32"
        )
    reasons = {name: _why_not(weight.codes) for name, weight in quantized.report.weights.items()}
    wrong = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if wrong:
        raise ConfigError(f"OpenVINO has no form for {len(wrong)} weights ({'; '.join(wrong[:3])}); {_ADVICE}")


def _why_not(codes: Codes) -> str:
    """Return why these integers cannot be written; the reason is empty where they can."""
    length, columns = codes.group_length, codes.q.shape[1]
    if codes.group_bits is not None:
        return f"its groups have {', '.join(map(str, sorted(set(codes.group_bits))))} bits"
    if length is None:
        return "its groups do not lie side by side"
    short = columns % length and gcd(length, columns) < _SHORTEST
    return f"groups of {length} of its {columns} inputs" if short else ""


def put_integers(openvino: Any, model: Any, weights: Mapping[str, QuantizedWeight]) -> int:
    """Put integers in the place of the constants that they stand for, in place, and return how many there are.

    Args:
        openvino: the package.
        model: that of the quantized program.
        weights: by parameter name, such as :func:`check_integers` lets pass.

    Raises:
        ExportError: the model has no constant of what the integers of a weight stand for.
    """
    named = {_digest(matrix): (name, flip) for name in weights for flip, matrix in enumerate(_both(weights[name]))}
    found: set[str] = set()
    count = 0
    for node in [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]:
        if len(node.shape) != 2 or node.get_element_type() != openvino.Type.f32:
            continue
        name, transposed = named.get(_digest(node.data), ("", 0))
        if not name:
            continue
        made = _dequantized(openvino, name, weights[name].codes)
        made = openvino.opset13.transpose(made, [1, 0]) if transposed else made
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))
        found.add(name)
        count += 1
    left = sorted({name for name, _ in named.values()} - found)
    if left:
        raise ExportError(
            f"OpenVINO's model has no constant that the integers of {left[0]} stand for, nor of {len(left) - 1} other "
            "weights: leave its layer in floats with --keep (QuantizationConfig(exclude=...))"
        )
    return count


def _both(weight: QuantizedWeight) -> tuple[Any, Any]:
    """Return what the integers stand for, float32 (out, in), and (in, out): the frontend transposes some constants."""
    matrix = weight.codes.dequantized().contiguous().numpy()
    return matrix, matrix.T


def _digest(matrix: Any) -> bytes:
    """Return a hash of shape and values of a float32 array."""
    return hashlib.sha256(str(tuple(matrix.shape)).encode() + matrix.tobytes()).digest()


def _dequantized(openvino: Any, name: str, codes: Codes) -> Any:
    """Return the last of the nodes that make (out, in) of integers; the first is called as the parameter is."""
    op = openvino.opset13
    out, columns = codes.q.shape
    assert codes.group_length is not None  # check_integers has looked
    block = gcd(codes.group_length, columns)
    group_of = codes.group_of[::block]
    bits = _STORED[codes.bits]
    signed = codes.symmetric and bits > 2
    shift = 2 ** (codes.bits - 1) if signed else 0
    kind = getattr(openvino.Type, _TYPES[bits, signed])

    def constant(values: Tensor, suffix: str = "") -> Any:
        packed = _packed(values, bits).numpy()
        made = op.constant(openvino.Tensor(packed, openvino.Shape(list(values.shape)), kind), shared_memory=False)
        made.set_friendly_name(f"{name}{suffix}")
        return op.convert(made, _FLOAT)

    made = constant(codes.q.view(out, -1, block) - shift)
    if not signed:
        made = op.subtract(made, constant(codes.zeros[:, group_of, None], ".zeros"))
    scales = op.constant(codes.scales[:, group_of, None].contiguous().numpy())
    scales.set_friendly_name(f"{name}.scales")
    return op.reshape(op.multiply(made, scales), [out, columns], False)


def _packed(values: Tensor, bits: int) -> Tensor:
    """Return integers as bytes, uint8 (n,), several in one from its low end up; negative ones as two's complement."""
    flat = values.reshape(-1) & (2**bits - 1)
    each = 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each)
    packed = flat[:, 0].clone()
    for place in range(1, each):
        packed |= flat[:, place] << bits * place
    return packed


def check_written(openvino: Any, path: Path, weights: Mapping[str, QuantizedWeight]) -> int:
    """Compare what OpenVINO makes of the integers in a file with the quantized program, and return how many it has.

    Nothing is shared with what packs: OpenVINO itself reads the file and computes each constant.

    Raises:
        VerificationError: a constant has another value than the program's, or integers of a weight are missing.
    """
    core = openvino.Core()
    model = core.read_model(str(path))
    ends = {node.get_friendly_name(): node for node in model.get_ops() if node.get_friendly_name() in weights}
    names = {_digest(_both(weight)[0]): name for name, weight in weights.items()}  # of equal ones the last
    for name in names.values():
        if name not in ends or ends[name].get_element_type().is_real():
            raise VerificationError(f"{path.name} has no integers of {name}: export it again")
        made = openvino.Model([_end(ends[name])], [])
        value = core.compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": _FLOAT})([])[0]
        if _digest(value) != _digest(_both(weights[name])[0]):
            raise VerificationError(f"{path.name}: the integers of {name} stand for other values than the program has")
    return len(names)


def _end(node: Any) -> Any:
    """Return the node where integers have become a matrix (out, in), from their constant on."""
    while node.get_type_name() != "Reshape":
        node = next(iter(node.output(0).get_target_inputs())).get_node()
    return node
