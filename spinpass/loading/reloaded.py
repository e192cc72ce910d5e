"""A written checkpoint as its users read it: loaded by transformers, and run."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import VerificationError, first_line
from spinpass.formats import is_transform, read_object, read_tensors

from .quiet import quietly


def reloaded_logits(folder: str | Path, ids: Sequence[int]) -> Tensor:
    """Load a folder with transformers, in the dtype that is stored, and return the logits (tokens, vocabulary) of a
    text, float32.

    Raises VerificationError where transformers cannot load it, or finds tensors missing or left over.
    """
    transformers = importlib.import_module("transformers")
    try:
        with quietly():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype="auto", output_loading_info=True
            )
    except Exception as error:  # of transformers, safetensors and configuration: no common base below Exception
        raise VerificationError(f"transformers cannot load what was written: {first_line(error)}") from error
    taken = _apply_transforms(model, folder, info)
    wrong = [f"{kind.replace('_', ' ')}: {min(found)}" for kind, found in _differences(info, taken).items() if found]
    if wrong:
        raise VerificationError(f"transformers does not load what was written as it is; {'; '.join(wrong)}")
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return found


def _apply_transforms(model: Any, folder: str | Path, info: Mapping[str, Any]) -> set[str]:
    """Let a model compute the online transforms that its checkpoint declares, where transformers has not done so.

    Returns the names of the stored matrices that they are by. Raises VerificationError where compressed-tensors cannot
    apply them.
    """
    entry = read_object(Path(folder) / "config.json").get("quantization_config") or {}
    declared = entry.get("transform_config") or {}
    if not declared.get("config_groups") or hasattr(model, "transform_config"):
        return set()
    transform = importlib.import_module("compressed_tensors.transform")
    try:
        with quietly():
            transform.apply_transform_config(model, transform.TransformConfig.model_validate(declared))
    except Exception as error:  # of pydantic and of the package: no common base below Exception
        raise VerificationError(f"compressed-tensors cannot apply what is declared: {first_line(error)}") from error
    names = {str(name) for name in info.get("unexpected_keys") or () if is_transform(str(name))}
    held = read_tensors(Path(folder)) if names else {}
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).copy_(held[name])  # which the modules of a group share
    return names


def _differences(info: Mapping[str, Any], taken: Collection[str]) -> dict[str, list[str]]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {kind: sorted(set(map(str, info.get(kind) or ())) - set(taken)) for kind in kinds}
