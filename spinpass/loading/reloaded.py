"""A written checkpoint as its users read it: loaded by transformers, and run."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import VerificationError, first_line
from spinpass.formats import is_transform, online_alone, read_object, read_tensors

from .quantized import dequantized_config
from .quiet import quietly


def reloaded_logits(folder: str | Path, ids: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Load a folder with transformers, in ``dtype`` or the one that is stored, and return the logits (tokens,
    vocabulary) of a text, float32.

    Raises VerificationError where transformers cannot load it, or finds tensors missing or left over.
    """
    transformers = importlib.import_module("transformers")
    try:
        with quietly():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype or "auto", output_loading_info=True, **_options(transformers, folder)
            )
    except Exception as error:  # of transformers, safetensors and configuration: no common base below Exception
        raise VerificationError(f"transformers cannot load what was written: {first_line(error)}") from error
    taken = apply_declared_transforms(model, folder)
    wrong = [f"{kind.replace('_', ' ')}: {min(found)}" for kind, found in _differences(info, taken).items() if found]
    if wrong:
        raise VerificationError(f"transformers does not load what was written as it is; {'; '.join(wrong)}")
    with torch.no_grad():
        found: Tensor = (
            model.eval()(input_ids=torch.tensor([list(ids)], device="cpu"), use_cache=False).logits[0].float()
        )
    return found


def apply_declared_transforms(model: Any, folder: str | Path) -> set[str]:
    """Let a model of transformers compute the online transforms that its checkpoint declares.

    transformers reads the weights of such a checkpoint and, up to 5.23 at least, leaves its ``transform_config`` alone:
    the model would then compute something else. Where something was applied already, nothing is done.

    Args:
        model: what ``from_pretrained`` made of the folder.
        folder: of the checkpoint, in the layout of compressed-tensors.

    Returns:
        The names of the stored matrices that the transforms are by.

    Raises VerificationError where compressed-tensors is missing, or cannot apply them.
    """
    entry = read_object(Path(folder) / "config.json").get("quantization_config") or {}
    declared = entry.get("transform_config") or {}
    if not declared.get("config_groups") or hasattr(model, "transform_config"):
        return set()
    try:
        transform = importlib.import_module("compressed_tensors.transform")
        with quietly():
            transform.apply_transform_config(model, transform.TransformConfig.model_validate(online_alone(declared)))
    except Exception as error:  # of pydantic and of the package: no common base below Exception
        raise VerificationError(f"compressed-tensors cannot apply what is declared: {first_line(error)}") from error
    places = {name for name, _ in model.named_parameters() if is_transform(name)}
    held = {name: t for name, t in read_tensors(Path(folder)).items() if name in places}
    with torch.no_grad():
        for name, matrix in held.items():
            model.get_parameter(name).copy_(matrix)  # which the modules of a group share
    return set(held)


def _options(transformers: Any, folder: str | Path) -> dict[str, Any]:
    """Return what else transformers needs to be told: it reads packed zero points of compressed-tensors as floats
    alone."""
    path = Path(folder) / "config.json"
    config = read_object(path) if path.is_file() else {}
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    symmetric = all((group.get("weights") or {}).get("symmetric", True) for group in groups.values())
    return {} if symmetric else {"quantization_config": dequantized_config(transformers, config)}


def _differences(info: Mapping[str, Any], taken: Collection[str]) -> dict[str, list[str]]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {kind: sorted(set(map(str, info.get(kind) or ())) - set(taken)) for kind in kinds}
