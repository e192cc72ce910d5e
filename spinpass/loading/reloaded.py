"""A written checkpoint as its users read it: loaded by transformers, and run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spinpass.errors import VerificationError, first_line

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
    wrong = [f"{kind.replace('_', ' ')}: {min(found)}" for kind, found in _differences(info).items() if found]
    if wrong:
        raise VerificationError(f"transformers does not load what was written as it is; {'; '.join(wrong)}")
    with torch.no_grad():
        found: Tensor = (
            model.eval()(input_ids=torch.tensor([list(ids)], device="cpu"), use_cache=False).logits[0].float()
        )
    return found


def _differences(info: dict[str, object]) -> dict[str, list[str]]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {kind: sorted(map(str, info.get(kind) or ())) for kind in kinds}  # type: ignore[call-overload]
