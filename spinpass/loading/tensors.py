"""What became of every tensor that was saved: loaded, renamed or left over. What is loaded is what was saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spinpass.errors import DamageError, ExportError, first_line
from spinpass.formats import check_safetensors
from spinpass.graph import Handle

_INSIDE = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPERS = re.compile(rf"^(?:(?:module|base_model\.model|_forward_module|{_INSIDE})\.)+|(?<=\.)(?:(?:{_INSIDE})\.)+")
"""What torch.compile, data parallelism, FSDP, checkpointing and peft put in front of the names of a model's tensors."""
_SCALES = re.compile(
    r"(?:^|[._])(?:(?:weight|input|output|act|activation|proj|[qkv])_scales?(?:_inv|_\d+)?|scales|scale_inv|amax|absmax|"
    r"nested_absmax|scb|q?zeros|zero_points?|quant_map|quant_state|g_idx|qweight|weight_packed|weight_shape|proj_blocks)"
    r"(?:$|[._])|\.(?:scale|zero)$",
    re.IGNORECASE,
)
_ADAPTERS = re.compile(
    r"(?:^|\.)(?:lora_\w+|ia3_\w+|adapters?|adapter_\w+|prompt_encoder|base_layer)(?:$|\.)", re.IGNORECASE
)
_SHOWN = 4
_PART = 1 << 24  # elements


@dataclass(frozen=True)
class LoadingReport:
    """This is what loading did beyond taking every tensor as it was saved.

    ``unused``: names of saved tensors that the model has no place for. ``renamed``: what was taken off in front of
    names. ``dequantized``: how the weights were quantized whose values were taken. ``notes``: anything else.
    """

    unused: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    dequantized: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Say it, a sentence each; nothing where nothing was done."""
        said = []
        if self.unused:
            said.append(f"not used by the model, and not exported: {listed(self.unused)}")
        if self.renamed:
            said.append(f"taken off the names of tensors: {', '.join(self.renamed)}")
        if self.dequantized is not None:
            said.append(f"dequantized: the values of {self.dequantized} weights, as floats")
        return [*said, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "unused": list(self.unused), "renamed": list(self.renamed), "dequantized": self.dequantized,
            "notes": list(self.notes),
        }  # fmt: skip


def stored_tensors(weights: Iterable[Path]) -> dict[str, torch.dtype | str]:
    """Return the dtypes of the tensors in files of weights by name, without loading them.

    Safetensors are read by their header; a dtype that torch has no name for stays the file's.

    Raises:
        DamageError: a file is not what it says, or unpickling it could run code.
        ExportError: two files hold a tensor of one name.
    """
    found: dict[str, torch.dtype | str] = {}
    for path in weights:
        held = check_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
        twice = sorted(found.keys() & held.keys())
        if twice:
            raise ExportError(
                f"{path} holds {listed(twice)}, as does another file beside it: which counts is not clear"
            )
        found |= held
    return found


def _of_pickle(path: Path) -> dict[str, torch.dtype | str]:
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # of torch, pickle and zip: no common base below Exception
        raise DamageError(
            f"{path} holds no weights that can be read without running code ({first_line(error)}); it is not read"
        ) from error
    if not isinstance(tensors, dict):
        raise DamageError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    found: dict[str, torch.dtype | str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise DamageError(f"{path}: {name} of shape {list(tensor.shape)} claims more values than are stored")
        found[name] = tensor.dtype
    return found


def renamings(stored: Iterable[str]) -> dict[str, str]:
    """Return what transformers is to take off the names, ``{pattern: ""}``, by the wrappers that are in them."""
    return {_WRAPPERS.pattern: ""} if any(map(_WRAPPERS.search, stored)) else {}


def wrappers(stored: Iterable[str]) -> tuple[str, ...]:
    """Return the wrappers that are in the names, each once."""
    return tuple(sorted({match for name in stored for match in _WRAPPERS.findall(name)}))


def check_loaded_tensors(
    location: str, model: torch.nn.Module, info: Mapping[str, Any], stored: Mapping[str, torch.dtype | str]
) -> tuple[str, ...]:
    """Make sure that a model holds what was saved, and return the names of the tensors that it has no place for.

    Args:
        location: the folder, for messages.
        model: what transformers made.
        info: its report of the loading, with nothing ignored.
        stored: the dtypes in the files by name.

    Raises:
        ExportError: a tensor is missing, has another shape, belongs to an adapter or to a quantization that was not
            applied, is of integers where the model computes with floats, or holds a value that is not finite.
    """
    unused = tuple(sorted(info["unexpected_keys"]))
    missing = sorted(info["missing_keys"])
    adapter = [name for name in unused if _ADAPTERS.search(name)]
    if adapter:
        raise ExportError(
            f"{location} holds tensors of an adapter ({listed(adapter)}), which are not applied behind your back: "
            "merge them into the base model (merge_and_unload in peft), save that, and export the result"
        )
    scales = [name for name in unused if _SCALES.search(name)]
    if scales:
        raise ExportError(
            f"{location} holds scales that the model has no place for ({listed(scales)}): its weights are quantized "
            "in a way that config.json does not say; export the model as it was before"
        )
    if missing:
        also = f"; it holds {listed(unused)} instead, which the model has no place for" if unused else ""
        raise ExportError(
            f"{location} lacks {listed(missing)}, which would be drawn at random{also}: take a whole checkpoint of "
            f"{type(model).__name__}"
        )
    if info["mismatched_keys"]:
        raise ExportError(
            f"{location}: {'; '.join(_mismatch(*found) for found in sorted(info['mismatched_keys'])[:_SHOWN])}"
        )
    if info.get("error_msgs"):
        raise ExportError(f"{location}: {listed(map(str, info['error_msgs']))}")
    codes = _codes_as_values(model, stored, unused)
    if codes:
        raise ExportError(
            f"{location} stores {listed(codes)}: the codes of a quantization that config.json does not say; export the "
            "model as it was before"
        )
    check_finite(location, model.named_parameters())
    return unused


def check_finite(location: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ExportError where a value of tensors, given with their names, is no number."""
    broken = [name for name, tensor in tensors if not _is_finite(tensor.detach())]
    if broken:
        raise ExportError(
            f"{location}: not every value of {listed(broken)} is a finite number; the checkpoint is broken"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Say whether all values are numbers, a part at a time: tests make copies."""
    parts = tensor.blocks() if isinstance(tensor, Handle) else torch.split(tensor.flatten(), _PART)
    return all(bool(part.isfinite().all()) for part in parts)


def _mismatch(name: str, stored: Any, wanted: Any) -> str:
    return f"{name} is {list(stored)} in the file and {list(wanted)} by config.json"


def _codes_as_values(
    model: torch.nn.Module, stored: Mapping[str, torch.dtype | str], unused: tuple[str, ...]
) -> list[str]:
    """Return the stored tensors of codes, 8-bit floats or integers, where the model computes with floats."""
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    left = set(unused)
    found = []
    for name, dtype in stored.items():
        spelled = str(dtype).removeprefix("torch.").upper()
        bare = _WRAPPERS.sub("", name)
        if bare in left:
            continue
        small = spelled.startswith(("F8", "F4", "F6", "FLOAT8", "FLOAT4"))
        whole = spelled.startswith(("I", "U", "BOOL")) and (bare in floats or bare.endswith((".weight", "_proj")))
        if small or whole:
            found.append(f"{name} as {spelled.lower()}")
    return sorted(found)


def listed(names: Iterable[str]) -> str:
    """Name the first few, those of other layers as alike: ``layers.0.up.weight (and 29 alike), norm.weight``."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    groups = list(alike.values())
    shown = [f"{first} (and {len(others)} alike)" if others else first for first, *others in groups[:_SHOWN]]
    rest = sum(map(len, groups[_SHOWN:]))
    return ", ".join(shown) + (f", and {rest} more" if rest else "")
