"""4-bit weights for ONNX Runtime: constant MatMuls become ``MatMulNBits``, token tables ``GatherBlockQuantized``.

Rounding is ONNX Runtime's own round-to-nearest per block of ``block_size`` weights along the contracted axis; the
Hadamards' factors live in functions and are not touched. The output head is left as ``Transpose(constant) -> MatMul``
by every exporter as long as it shares its constant with the embedding, and other tools skip it; here the transpose is
folded into the packing.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from spinpass.errors import ConfigError
from spinpass.formats import model_path

from .copies import QuantizeReport, check_replaced, load, write_quantized
from .rewrite import Work

_BLOCKS = (16, 32, 64, 128, 256)


def quantize_4bit(
    source: str | Path,
    destination: str | Path,
    *,
    block_size: int = 32,
    symmetric: bool = True,
    accuracy_level: int = 4,
    head_bits: int | None = 8,
    table_bits: int | None = 8,
    keep: Collection[str] = (),
    external_data: bool | None = None,
) -> QuantizeReport:
    """Write a weight-only quantized copy of an ONNX model.

    A table tied to the head is the largest constant of a small model, so what happens to the two decides the file's
    size. With ``head_bits == table_bits`` one packed constant serves both and the float table goes (538 MB become 99 MB
    for a model of 135M parameters with 49k tokens; 212 MB with the float table kept beside an 8-bit head, 180 MB with
    one float constant for both). Eight bits are the default for both because the head is where four bits cost most.

    Args:
        source, destination: an ``.onnx`` file, or a folder with ``model.onnx``, whose other files (tokenizer,
            configuration) are copied.
        block_size: weights per scale, 16 to 256.
        symmetric: use no zero points; else there is one per block.
        accuracy_level: how ``MatMulNBits`` computes, 0 to 4; 4 rounds activations to int8 per block and is fastest on a
            CPU.
        head_bits: 4 or 8 for the constant products that yield a graph output, through elementwise ops at most; None
            keeps them.
        table_bits: 4 or 8 for tables that are looked up by row; None keeps them.
        keep: names of constants to leave as they are.
        external_data: where the weights go, as :func:`spinpass.exporters.onnx.export` has it.

    Raises:
        ConfigError: an option is out of its range.
        ExportError: there is no readable model at ``source`` or nothing in it to quantize, ONNX Runtime cannot load the
            result, or ``destination`` cannot be written. Nothing is left behind.
    """
    _check_options(block_size, accuracy_level, head_bits, table_bits)
    model = load(model_path(source))
    work = Work(model.graph, block_size, symmetric, accuracy_level, head_bits, table_bits, frozenset(keep))
    work.run()
    return write_quantized(model, work, source, model_path(destination), external_data)


def round_converted(
    model: ir.Model,
    *,
    block_size: int,
    symmetric: bool,
    accuracy_level: int,
    head_bits: int | None,
    table_bits: int | None,
) -> Work:
    """Round the weights of a model as :func:`quantize_4bit` does, in place, and return what was replaced.

    Raises ConfigError for an option out of its range, and ExportError where there is nothing to round.
    """
    _check_options(block_size, accuracy_level, head_bits, table_bits)
    work = Work(model.graph, block_size, symmetric, accuracy_level, head_bits, table_bits, frozenset())
    work.run()
    check_replaced(model, work, "the model")
    return work


def _check_options(block_size: int, accuracy_level: int, head_bits: int | None, table_bits: int | None) -> None:
    if block_size not in _BLOCKS:
        raise ConfigError(f"block_size {block_size} is not one of {', '.join(map(str, _BLOCKS))}")
    if accuracy_level not in range(5):
        raise ConfigError(f"accuracy_level {accuracy_level} is not one of 0, 1, 2, 3, 4")
    for name, bits in (("head_bits", head_bits), ("table_bits", table_bits)):
        if bits not in (4, 8, None):
            raise ConfigError(f"{name} {bits} is not 4, 8 or None")
