"""Configuration files in the words of transformers 4 as well: that is what optimum's models for ONNX Runtime load with.

transformers 5 writes ``dtype`` where 4 reads ``torch_dtype``, ``rope_parameters`` where 4 reads ``rope_theta``,
``rope_scaling`` and ``partial_rotary_factor``, and it calls the class of tokenizers that are all in tokenizer.json
``TokenizersBackend``. It still reads the old words, so both stand in one file, with the same values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the new name of a class, and the one both know
_BESIDE = ("rope_theta", "partial_rotary_factor")


def add_older_words(folder: Path) -> None:
    """Rewrite ``config.json`` and ``tokenizer_config.json`` of ``folder``, where they are, so that transformers 4 and 5
    both read them."""
    for name, rewrite in (("config.json", model_config), ("tokenizer_config.json", tokenizer_config)):
        _rewrite(folder / name, rewrite)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the older words, in the configurations inside it too.

    What has no older words stays as it is, for example rotary embeddings that differ from layer to layer.
    """
    result = {key: model_config(value) if _is_config(value) else value for key, value in config.items()}
    if result.get("dtype") is not None:
        result.setdefault("torch_dtype", result["dtype"])
    rope = result.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return result
    for key in _BESIDE:
        if rope.get(key) is not None:
            result.setdefault(key, rope[key])
    if rope.get("rope_type", "default") != "default":
        result.setdefault("rope_scaling", {key: value for key, value in rope.items() if key not in _BESIDE})
    return result


def tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with a class of tokenizers that transformers 4 has, where that is the same class."""
    named = config.get("tokenizer_class")
    return {**config, "tokenizer_class": _TOKENIZERS[named]} if named in _TOKENIZERS else dict(config)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _rewrite(path: Path, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(change(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
