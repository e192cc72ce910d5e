"""Which checkpoints are quantized, and how the values of their codes are taken: one rule for all, ``dequantize``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import COMPRESSED_TENSORS, read_object

from .architecture import find_file
from .files import gguf_header

_BY_TRANSFORMERS = ("fp8", "mxfp4")  # it computes their values without a GPU and without another package
BY_READING = ("gptq", COMPRESSED_TENSORS)
"""Methods whose codes are read here, from a folder."""

_METHODS = (*BY_READING, *_BY_TRANSFORMERS)
_FLOATS = ("F32", "F16", "BF16", "F64")


def check_quantization(transformers: Any, location: str, config: Mapping[str, Any], *, dequantize: bool) -> str | None:
    """Return how a folder's weights are quantized, None where they are as they were trained.

    Args:
        transformers: the module.
        location: the folder, or its name on the hub.
        config: what its config.json holds.
        dequantize: the values of the codes may be taken.

    Raises:
        ConfigError: they are quantized, and may not be dequantized.
        ExportError: they are quantized in a way that cannot be dequantized here.
    """
    method = _method(transformers, location, config)
    if method is None:
        return None
    entry = _declared(config) or {}
    floats = method == COMPRESSED_TENSORS and not entry.get("config_groups")
    if floats and (entry.get("transform_config") or {}).get("config_groups") and Path(location).is_dir():
        return method  # with online transforms
    if method not in _METHODS or floats or (method in BY_READING and not Path(location).is_dir()):
        raise ExportError(
            f"{location} holds packed weights ({method}), whose values cannot be taken here (those of "
            f"{', '.join(_METHODS)} can): export the model as it was before it was quantized"
        )
    if not dequantize:
        raise ConfigError(
            f"{location} holds packed weights ({method}), which are not rotated behind your back: "
            "add --dequantize (dequantize=True) to take their values as floats"
        )
    return method


def _method(transformers: Any, location: str, config: Mapping[str, Any]) -> str | None:
    """Return what config.json, or a file beside it, says of the weights."""
    found = _declared(config)
    if found is None:
        path = find_file(transformers, location, "hf_quant_config.json")
        if path is None:
            return None
        found = read_object(path).get("quantization") or {}
        return f"modelopt {found.get('quant_algo') or ''}".strip()
    named = found.get("quant_method") or found.get("quant_algo")
    if named is None and any(key.startswith("load_in_") for key in found):
        named = "bitsandbytes"
    return str(named or "of a method that config.json does not name")


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of config.json on the weights' quantization, that of the text model in a composite one."""
    for part in (config, config.get("text_config") or {}):
        found: Mapping[str, Any] | None = part.get("quantization_config") or part.get("compression_config")
        if found:
            return found
    return None


def dequantized_config(transformers: Any, config: Mapping[str, Any]) -> Any:
    """Return the configuration that lets transformers take the values of the codes."""
    entry = dict(_declared(config) or {}) | {"dequantize": True}
    return transformers.quantizers.AutoQuantizationConfig.from_dict(entry)


def gguf_types(path: Path) -> list[str]:
    """Return the types of a GGUF file's tensors that are no floats, the most frequent first."""
    from gguf import GGMLQuantizationType

    counted = Counter(GGMLQuantizationType(tensor.kind).name for tensor in gguf_header(path).tensors.values())
    return [name for name, _ in counted.most_common() if name not in _FLOATS]
