"""``genai_config.json``: what ONNX Runtime GenAI has to know about an exported folder to generate text from it.

Names and shapes come from the graph, the rest from the model's configuration. GenAI builds all caches alike, feeds
token ids, positions and a mask, and knows no other state: a graph that needs more is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from spinpass.errors import ExportError
from spinpass.formats import model_path, staged
from spinpass.runtime import GENAI_CONFIG

_TYPE = "decoder"  # GenAI's own name for a language model of no particular family
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_PRESENT = re.compile(r"present\.(\d+)\.(key|value)")
_PLAIN = ("input_ids", "attention_mask", "position_ids")
_SEARCH = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_length",
    "num_beams", "length_penalty", "diversity_penalty", "num_return_sequences",
)  # fmt: skip


@dataclass(frozen=True)
class _Graph:
    """It holds the roles of a decoder's inputs and outputs, and the one shape that all its caches have."""

    plain: tuple[str, ...]
    layers: int
    heads: int
    head_size: int
    vocabulary: int
    shares_buffers: bool


def save_genai_config(folder: str | Path, config: Any, generation_config: Any = None) -> Path:
    """Write ``genai_config.json`` beside ``folder/model.onnx`` and return its path.

    Raises ExportError where :func:`genai_config` does, or where the file cannot be written.
    """
    path = model_path(folder)
    found = genai_config(path, config, generation_config)
    with staged(path.parent) as staging:
        (staging / GENAI_CONFIG).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return path.parent / GENAI_CONFIG


def genai_config(path: Path, config: Any, generation_config: Any = None) -> dict[str, Any]:
    """Return what ``genai_config.json`` holds for a graph that :func:`~spinpass.exporters.names.cache_names` names.

    Args:
        path: the ONNX file.
        config: the model's configuration, as transformers loads it.
        generation_config: end tokens and defaults for the search, if any; without end tokens those of ``config`` count.

    Raises:
        ExportError: there is no file, the graph needs what GenAI does not give it, or the configuration lacks a number.
    """
    graph = _read(path)
    text = config.get_text_config()
    end = _first("eos_token_id", generation_config, text, config)
    if end is None:
        raise ExportError("ONNX Runtime GenAI needs an end token: set eos_token_id in the generation config")
    ends = list(end) if isinstance(end, list | tuple) else [end]
    pad = _first("pad_token_id", generation_config, text, config)
    outside = [token for token in (*ends, ends[0] if pad is None else pad) if token >= graph.vocabulary]
    if outside:
        raise ExportError(
            f"ONNX Runtime GenAI takes no end or padding token {outside[0]} of {graph.vocabulary} tokens: correct "
            "eos_token_id and pad_token_id in the generation config"
        )
    bos = _first("bos_token_id", generation_config, text, config)
    length = _number(text, "max_position_embeddings")
    model = {
        "type": _TYPE,
        "bos_token_id": bos,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": ends[0] if pad is None else pad,
        "context_length": length,
        "vocab_size": graph.vocabulary,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": path.name,
            "head_size": graph.head_size,
            "hidden_size": _number(text, "hidden_size"),
            "num_attention_heads": _number(text, "num_attention_heads"),
            "num_hidden_layers": graph.layers,
            "num_key_value_heads": graph.heads,
            "inputs": {name: name for name in graph.plain}
            | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    defaults = {name: value for name in _SEARCH if (value := getattr(generation_config, name, None)) is not None}
    search = defaults | {"max_length": length, "past_present_share_buffer": graph.shares_buffers}
    return {"model": {name: value for name, value in model.items() if value is not None}, "search": search}


def _read(path: Path) -> _Graph:
    if not path.is_file():
        raise ExportError(f"there is no model at {path}")
    graph = onnx.load(path, load_external_data=False).graph
    inputs = {value.name: _shape(value) for value in graph.input}
    outputs = {value.name: _shape(value) for value in graph.output}
    caches = {name: shape for name, shape in inputs.items() if _PAST.fullmatch(name)}
    plain = tuple(name for name in inputs if name not in caches)
    _check_plain(plain, inputs)
    if "logits" not in outputs or not isinstance(outputs["logits"][-1], int):
        raise ExportError(f"ONNX Runtime GenAI needs logits of a fixed size; {path.name} returns {', '.join(outputs)}")
    layers = _layers(caches, outputs)
    shapes = {(shape[1], shape[3]) if len(shape) == 4 else shape for shape in caches.values()}
    heads, size = next(iter(shapes)) if len(shapes) == 1 and len(next(iter(shapes))) == 2 else (None, None)
    if not isinstance(heads, int) or not isinstance(size, int):
        raise ExportError(
            "ONNX Runtime GenAI makes all caches alike, (batch, heads, length, head size); this graph takes "
            + ", ".join(sorted({str(list(shape)) for shape in caches.values()}))
        )
    return _Graph(plain, layers, heads, size, outputs["logits"][-1], _shares_buffers(graph, caches))


def _check_plain(plain: tuple[str, ...], inputs: dict[str, tuple[int | str, ...]]) -> None:
    unknown = [name for name in plain if name not in _PLAIN]
    if unknown or "input_ids" not in plain:
        raise ExportError(
            f"ONNX Runtime GenAI gives a graph {', '.join(_PLAIN)} and caches; this one takes {', '.join(plain)}"
        )
    for name in plain:
        if len(inputs[name]) != 2:
            raise ExportError(f"ONNX Runtime GenAI gives {name} two axes; this graph wants {list(inputs[name])}")


def _layers(caches: dict[str, tuple[int | str, ...]], outputs: dict[str, Any]) -> int:
    """Count the layers. Raises ExportError unless keys and values of all go in and come out, and nothing else does."""
    taken = {match.groups() for name in caches if (match := _PAST.fullmatch(name))}
    returned = {match.groups() for name in outputs if (match := _PRESENT.fullmatch(name))}
    layers = len(caches) // 2
    if not taken or taken != {(str(layer), part) for layer in range(layers) for part in ("key", "value")}:
        raise ExportError(
            "ONNX Runtime GenAI needs a KV cache, past_key_values.<layer>.key and .value for every layer; this graph "
            f"takes {', '.join(caches) or 'none'}"
        )
    if returned != taken or len(outputs) != len(returned) + 1:
        raise ExportError(
            f"ONNX Runtime GenAI needs logits and every cache back; this graph returns {', '.join(outputs)}"
        )
    return layers


def _shares_buffers(graph: onnx.GraphProto, caches: dict[str, tuple[int | str, ...]]) -> bool:
    """Say whether caches can be longer than what is in them: only where attention kernels alone read them, which the
    mask tells the length."""
    readers = [(node, name) for node in graph.node for name in node.input if name in caches]
    return "attention_mask" in {value.name for value in graph.input} and all(
        node.op_type == "GroupQueryAttention" and name in node.input[3:5] for node, name in readers
    )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)


def _first(name: str, *places: Any) -> Any:
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ExportError(f"ONNX Runtime GenAI needs one {name}; the configuration says {value}")
    return value
