"""A KV cache of 8 or 4 bits in GroupQueryAttention:  k ≈ q·s, one scale for every head and channel.

The kernel rounds keys and values as they come, keeps the integers in the cache, and attends to what they stand for. The
scales are constants of the file, from texts that the model itself is run on: the largest value of each channel divided
by the largest integer, or with four bits the scale of least squared error. A rotation of the heads (R2, R3) spreads
outliers over the channels of a head before that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.formats import model_path
from spinpass.runtime import DecoderGraph

from ..fusion.attention import GQA
from ..fusion.builder import Builder
from ..fusion.match import sizes, static
from .copies import load, write_copy

_STORED = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}  # two codes of four bits, plus 8 each, the first in the low half
SCALES = 12
"""From which input on the kernel takes the scales, of keys and of values."""

_WIDE = 127  # codes up to here cover the largest value; fewer are better spent on the others, which are clipped
_SHRUNK, _SMALLEST = 24, 0.25  # ranges that are tried, down to this share of the largest value
_JUDGED = 2048  # tokens of all texts

_FITTING = 1.25  # how far a scale may be from that of a run whose products round otherwise
Scales = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CacheReport:
    """This is what :func:`quantize_cache` did: ``attention`` counts the nodes whose cache holds integers of so many
    ``bits``; bytes are those of the cache for one token."""

    path: Path
    files: tuple[Path, ...]
    bits: int
    attention: int
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return self.__dict__ | {"path": str(self.path), "files": [str(file) for file in self.files]}


def quantize_cache(
    source: str | Path,
    destination: str | Path,
    bits: int,
    calibration: Sequence[Sequence[int]],
    *,
    external_data: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CacheReport:
    """Write a copy of a fused decoder whose cache holds integers.

    Args:
        source, destination: an ``.onnx`` file, or a folder with ``model.onnx``, whose other files are copied. The
            source was exported with ``fuse=True`` and computes in float32; its weights may be packed.
        bits: 8 (int8 of the shape of the float cache) or 4 (uint8, half as wide).
        calibration: token ids of texts, each run from an empty cache.
        external_data: where the weights go, as :func:`spinpass.exporters.onnx.export` has it.
        progress: it is called with (texts done, all texts).

    Raises:
        ConfigError: ``bits`` is another number, or there are no calibration tokens.
        ExportError: there is no readable model at ``source``, attention in it is not fused or not in float32, ONNX
            Runtime cannot load the result, or ``destination`` cannot be written. Nothing is left behind.
    """
    if bits not in _STORED:
        raise ConfigError(f"a KV cache of {bits} bits: choose 4 or 8")
    if not any(len(text) for text in calibration):
        raise ConfigError("the scales of a quantized KV cache need calibration tokens: give some")
    origin, target = model_path(source), model_path(destination)
    model = load(origin)
    nodes = _attention(model.graph, origin)
    scales = _scales(DecoderGraph.open(origin), 2 ** (bits - 1) - 1, calibration, progress)
    before = sum(_row_bytes(node.inputs[i]) for node in nodes for i in (3, 4))
    builder = Builder(model.graph)
    for node in nodes:
        _requantize(model.graph, builder.at(node), node, bits, scales)
    model.metadata_props["spinpass.cache"] = json.dumps({"bits": bits, "scales": "per head and channel"})
    files, _ = write_copy(model, source, target, external_data)
    return CacheReport(target, files, bits, len(nodes), before, before * bits // 32)


def cache_bits(node: ir.Node) -> int:
    """Return in how many bits an attention keeps keys and values; 0 where it keeps floats."""
    bits = node.attributes.get("kv_cache_bit_width")
    return 0 if bits is None else bits.as_int()


def check_cache(path: str | Path, unrounded: Path, calibration: Sequence[Sequence[int]]) -> None:
    """Compare the scales in a file with what its cache holds over the calibration texts when nothing is rounded.

    Args:
        path: an ``.onnx`` file, or a folder with ``model.onnx``, whose cache holds integers.
        unrounded: its :func:`.unrounded.unrounded_copy`.
        calibration: token ids of the texts that the scales are from.

    Raises:
        VerificationError: a scale is another one.
        ExportError: one of the files cannot be read or run.
    """
    nodes = [node for node in load(model_path(path)).graph if node.op_type == GQA and cache_bits(node)]
    wanted = _scales(DecoderGraph.open(unrounded), 2 ** (cache_bits(nodes[0]) - 1) - 1, calibration, None)
    for node in nodes:
        for past, scale in zip(node.inputs[3:5], node.inputs[SCALES : SCALES + 2], strict=True):
            assert past is not None  # of a cache
            name, known = str(past.name), None if scale is None else scale.const_value
            found = torch.from_numpy(np.array([] if known is None else known.numpy(), np.float32)).flatten()
            fits = found.shape == wanted[name].shape and bool(
                ((found <= wanted[name] * _FITTING) & (found * _FITTING >= wanted[name])).all()
            )
            if not fits:
                raise VerificationError(
                    f"the scales that the file has for {name} are not those of what it holds over the calibration text"
                )


def _attention(graph: ir.Graph, path: Path) -> list[ir.Node]:
    """List the fused attention of a graph. Raises ExportError where there is none, or another cache."""
    nodes = [node for node in graph if node.op_type == GQA]
    held = {node.inputs[i] for node in nodes for i in (3, 4)}
    left = [v.name for v in graph.inputs if len(sizes(v)) >= 3 and v not in held]
    if left or not nodes:
        what = f"its cache {left[0]} is not" if left else "no cache is"
        raise ExportError(
            f"{path}: {what} read by GroupQueryAttention; export the decoder with its cache, fused, and see "
            "in the report what is not"
        )
    odd = next((node.inputs[3] for node in nodes if node.inputs[3].dtype != ir.DataType.FLOAT), None)  # type: ignore[union-attr]
    if odd is not None:
        raise ExportError(f"{path}: its cache {odd.name} is of type {odd.dtype}, and only float32 can be quantized")
    return nodes


def _scales(
    graph: DecoderGraph, top: int, texts: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None
) -> Scales:
    """Return a scale per channel of every cache input, (heads · size,) float32; a channel that stays 0 has scale 1."""
    peaks: Scales = {}
    seen: dict[str, list[torch.Tensor]] = {}
    step = max(1, sum(map(len, texts)) // _JUDGED)
    for done, text in enumerate(texts):
        if len(text):
            state = graph.start(1)
            graph.step(torch.tensor([list(text)], device="cpu"), state)
            for name, held in graph.held(state).items():
                peak = held.abs().amax((0, 2)).flatten()
                peaks[name] = torch.maximum(peaks.get(name, peak), peak)
                if top < _WIDE:
                    seen.setdefault(name, []).append(held[0, :, ::step].transpose(0, 1).flatten(1).clone())
        if progress is not None:
            progress(done + 1, len(texts))
    scales = {name: torch.where(peak > 0, peak / top, 1.0).float() for name, peak in peaks.items()}
    return {name: _clipped(torch.cat(seen[name]), scale, top) if seen else scale for name, scale in scales.items()}


def _clipped(values: torch.Tensor, whole: torch.Tensor, top: int) -> torch.Tensor:
    """Return for every channel of values (tokens, channels) the scale of least squared error, at most ``whole``."""
    best, least = whole, torch.full_like(whole, torch.inf)
    for step in range(_SHRUNK):
        scale = whole * (1 - (1 - _SMALLEST) * step / _SHRUNK)
        error = ((values / scale).round_().clamp_(-top - 1, top).mul_(scale) - values).square_().sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _requantize(graph: ir.Graph, builder: Builder, node: ir.Node, bits: int, scales: Scales) -> None:
    """Make the node anew with integers in its cache."""
    inputs = [*node.inputs, *[None] * (SCALES - len(node.inputs))]
    past = [node.inputs[3], node.inputs[4]]
    constants = [builder.constant(np.asarray(scales[str(v.name)].numpy())) for v in past if v is not None]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    stored = ir.TensorType(_STORED[bits])
    y, *present = builder.node(
        GQA,
        [*inputs, *constants],
        [(v, None, None) for v in node.outputs],
        domain=node.domain,
        attributes=attributes,
    )
    for value in (*past, *present):
        assert value is not None and value.shape is not None  # matched by its shape
        value.type = stored
        value.shape = ir.Shape([*value.shape[:-1], (static(value, -1) or 0) * bits // 8])
    names = [v.name for v in node.outputs]
    ir.convenience.replace_all_uses_with(node.outputs, [y, *present], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for value, name in zip((y, *present), names, strict=True):
        value.name = name


def _row_bytes(cache: ir.Value | None) -> int:
    """Return the bytes of a float32 cache (batch, heads, length, size) for one token."""
    return 4 * (static(cache, 1) or 0) * (static(cache, -1) or 0)
