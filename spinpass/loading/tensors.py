"""What became of every tensor that was saved: loaded, renamed or left over. What is loaded is what was saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spinpass.errors import ExportError, first_line

from .architecture import find_file

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
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


def stored_tensors(transformers: Any, location: str) -> dict[str, torch.dtype | str]:
    """Return the dtypes of the tensors in a folder's weights by name, without loading them; none where not known.

    Safetensors are read by their header; a dtype that torch has no name for stays the file's.

    Raises ExportError: a file that the index names is not one.
    """
    found: dict[str, torch.dtype | str] = {}
    for path in _weight_files(transformers, location):
        try:
            found |= _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
        except Exception as error:  # of safetensors, pickle and zip: no common base below Exception
            raise ExportError(
                f"{path} holds no weights that can be read ({first_line(error)}): copy it again"
            ) from error
    return found


def _weight_files(transformers: Any, location: str) -> list[Path]:
    """Return the files that transformers loads, in its order of preference."""
    for single, index in zip(_SINGLE, _INDICES, strict=True):
        path = find_file(transformers, location, single)
        if path is not None:
            return [path]
        path = find_file(transformers, location, index)
        if path is not None:
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return [p for p in (find_file(transformers, location, name) for name in names) if p is not None]
    return []


def _of_safetensors(path: Path) -> dict[str, torch.dtype | str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - no mapping


def _of_pickle(path: Path) -> dict[str, torch.dtype | str]:
    tensors = torch.load(path, map_location="meta", weights_only=True)
    return {name: tensor.dtype for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


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
    broken = [name for name, parameter in model.named_parameters() if not bool(parameter.detach().isfinite().all())]
    if broken:
        raise ExportError(
            f"{location}: not every value of {listed(broken)} is a finite number; the checkpoint is broken"
        )
    return unused


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
