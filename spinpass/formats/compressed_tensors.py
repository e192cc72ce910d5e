"""Checkpoints in the layout of compressed-tensors, which transformers and vLLM load: integers and online transforms.

| tensor of a linear layer | | |
|---|---|---|
| ``weight_packed`` | int32 (out, in·bits/32) | the codes, packed along the inputs |
| ``weight_scale`` | float (out, groups) | in the dtype of the model |
| ``weight_zero_point`` | int32 (out·bits/32, groups) | packed along the outputs; absent where it is the middle |
| ``weight_shape`` | int64 (2,) | out, in |

    w[o, i] = (q[o, i] − z[o, g(i)])·s[o, g(i)]          groups lie side by side and are equally long

Everything else has the names and dtypes of a checkpoint of floats. ``config.json`` says in its ``quantization_config``
which modules are packed and how, and in the ``transform_config`` within what is rotated online
(:mod:`.transform_config`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.graph import Handle
from spinpass.operators import unpack_words, words
from spinpass.passes import OnlineTransform
from spinpass.quantization import Codes, QuantizedWeight

from .documents import read_object
from .gptq import read_tensors
from .packed_words import PackedWords
from .shards import SHARD_BYTES, check_storable, put_shards, shards_in
from .staging import staged
from .transform_config import REGEX, DeclaredTransform, declared_transforms, is_target, transform_config

COMPRESSED_TENSORS = "compressed-tensors"
_CONFIG, _ENTRY = "config.json", "quantization_config"
_PACKED, _DENSE = "pack-quantized", "dense"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BITS = (2, 4, 8)
"""Widths that every version packs alike: codes of 3 bits lie across words since 0.20, and ten to a word before."""

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_INDEX = "weight_g_idx"  # of act-order by groups


@dataclass(frozen=True)
class CompressedReport:
    """This is what :func:`write_compressed_tensors` wrote. ``config`` is the ``quantization_config``; ``changed`` names
    the weights whose values the scales' dtype has changed, with the largest relative change of a scale; ``matrices``
    are the bytes of matrices of transforms."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
    config: Mapping[str, Any]
    changed: Mapping[str, float]
    transforms: int
    matrices: int

    @property
    def summary(self) -> str:
        """Say it in one line."""
        online = f", {self.transforms} online transforms" if self.transforms else ""
        held = f", whose matrices take {self.matrices / 1e6:.1f} MB" if self.matrices else ""
        worst = max(self.changed.values(), default=0.0)
        note = f"; scales in a half type: {len(self.changed)} weights changed by up to {worst:.1e}" if worst else ""
        return f"compressed-tensors checkpoint of {self.bytes / 1e6:.1f} MB{online}{held}{note}"


@dataclass(frozen=True)
class CompressedCheckpoint:
    """This is what :func:`read_compressed_tensors` found: ``codes`` by parameter name, ``tensors``, all that is not
    packed, ``transforms`` that are declared. ``config`` is the quantization's."""

    codes: Mapping[str, Codes]
    tensors: Mapping[str, Tensor]
    transforms: tuple[DeclaredTransform, ...]
    config: Mapping[str, Any]


# -- out --------------------------------------------------------------------------------------------------------------


def write_compressed_tensors(
    folder: str | Path,
    weights: Mapping[str, QuantizedWeight],
    transforms: Iterable[OnlineTransform] = (),
    *,
    tensors: Mapping[str, Tensor] | None = None,
    scales_dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CompressedReport:
    """Write ``model.safetensors`` and ``config.json``; files of these names are replaced.

    Codes are packed, and tensors that are handles read, when their bytes are due (:func:`.shards.write_shards`).

    Args:
        folder: where they are written; it is made if it is missing.
        weights: those of linear layers by parameter name; none writes floats alone.
        transforms: what is rotated online, as :func:`spinpass.passes.online_transforms` finds it.
        tensors: everything else by name (tables, norms, biases).
        scales_dtype: the model's, float32, float16 or bfloat16: a loader computes weights in the dtype of their scales.
        config: the model's configuration, which ``config.json`` holds beside the quantization's.
        shard_bytes: how many bytes of tensors a file holds at most.

    Raises:
        ConfigError: a weight is no matrix (out, in) of a module, its groups do not lie side by side or are not equally
            long, it has several widths; the dtype cannot hold a scale; a transform is no plain Hadamard.
        ExportError: the folder is not writable. Nothing is left behind.
    """
    if scales_dtype not in _FLOATS:
        raise ConfigError(f"scales_dtype {scales_dtype} is not float32, float16 or bfloat16")
    declared, matrices = transform_config(transforms)
    stored = {**(tensors or {}), **matrices}
    changed: dict[str, float] = {}
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, weight in weights.items():
        stored |= _tensors_of(name, weight, scales_dtype)
        codes = weight.codes
        off = ((codes.scales.to(scales_dtype).to(codes.scales.dtype) - codes.scales).abs() / codes.scales.abs()).max()
        if off:
            changed[name] = float(off)
        settings = _settings(codes)
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(name.removesuffix(".weight"))
    found = _quantization_config(list(groups.values())) | {"transform_config": declared}
    check_storable(stored)
    folder = Path(folder)
    with staged(folder, sum(t.nbytes for t in stored.values()), gone=shards_in(folder)) as staging:
        put_shards(staging, stored, shard_bytes=shard_bytes)
        (staging / _CONFIG).write_text(json.dumps({**(config or {}), _ENTRY: found}, indent=2), encoding="utf-8")
        written = sorted(staging.iterdir())
        size = sum(file.stat().st_size for file in written)
    files = tuple(folder / file.name for file in written)
    count = sum(len(a["targets"]) for group in declared["config_groups"].values() for a in group["apply"])
    return CompressedReport(folder, files, size, found, changed, count, sum(t.nbytes for t in matrices.values()))


def _tensors_of(name: str, weight: QuantizedWeight, scales_dtype: torch.dtype) -> dict[str, Tensor]:
    codes, module = weight.codes, name.removesuffix(".weight")
    if module == name or weight.dim != 1 or weight.stack != 1:
        raise ConfigError(f"{name} is not the weight (out, in) of one linear layer; leave it out")
    columns, groups = codes.q.shape[1], codes.scales.shape[1]
    if codes.bits not in _BITS:
        raise ConfigError(
            f"{name} has codes of {codes.bits} bits, which versions of compressed-tensors pack differently: choose "
            f"{', '.join(map(str, _BITS))}"
        )
    if codes.group_bits is not None:
        raise ConfigError(f"{name} has groups of several widths; leave the part rows out of --quantize")
    if codes.group_length is None or codes.group_length * groups != columns:
        raise ConfigError(
            f"{name} has groups that are not equally long and side by side ({columns} inputs, {groups} groups): choose "
            "a group size that divides the inputs, and no act-order"
        )
    scales = codes.scales.to(scales_dtype)
    if not bool((scales.isfinite() & (scales != 0)).all()):
        raise ConfigError(f"{name} has scales that {scales_dtype} cannot hold; write the model in another dtype")
    found = {
        f"{module}.weight_packed": Handle(PackedWords(codes.q, codes.bits, 1)),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor(codes.q.shape, dtype=torch.int64, device="cpu"),
    }
    if not codes.symmetric:
        found[f"{module}.weight_zero_point"] = Handle(PackedWords(codes.zeros, codes.bits, 0))
    return found


def _settings(codes: Codes) -> dict[str, Any]:
    columns, groups = codes.q.shape[1], codes.scales.shape[1]
    return {
        "num_bits": codes.bits,
        "type": "int",
        "symmetric": codes.symmetric,
        "strategy": "channel" if groups == 1 else "group",
        "group_size": None if groups == 1 else columns // groups,
        "dynamic": False,
    }


def _quantization_config(groups: list[tuple[dict[str, Any], list[str]]]) -> dict[str, Any]:
    kind = _PACKED if groups else _DENSE
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": modules,
                "weights": settings,
                "input_activations": None,
                "output_activations": None,
                "format": kind,
            }
            for i, (settings, modules) in enumerate(groups)
        },
        "ignore": [],
        "kv_cache_scheme": None,
    }


# -- in ---------------------------------------------------------------------------------------------------------------


def read_compressed_tensors(folder: str | Path) -> CompressedCheckpoint:
    """Read the integers, the other tensors and the declared transforms of a checkpoint folder.

    Raises:
        ConfigError: there is no checkpoint, one of another method or format, or one that rounds activations or caches;
            a transform is declared that is not known here.
        ExportError: safetensors is missing or cannot read a file; tensors of a module are missing or do not fit.
    """
    folder = Path(folder)
    config, groups = _checked_config(folder)
    transforms = declared_transforms(config.get("transform_config") or {})
    tensors = read_tensors(folder)
    codes = dict(_every_weight(folder, tensors, groups))
    packed = {f"{name.removesuffix('.weight')}.{part}" for name in codes for part in _PARTS}
    return CompressedCheckpoint(
        codes, {name: t for name, t in tensors.items() if name not in packed}, transforms, config
    )


def compressed_codes(folder: str | Path) -> Iterator[tuple[str, Codes]]:
    """Yield the integers of a checkpoint folder by parameter name, a weight at a time. Raises as
    :func:`read_compressed_tensors`."""
    folder = Path(folder)
    yield from _every_weight(folder, read_tensors(folder), _checked_config(folder)[1])


def _every_weight(
    folder: Path, tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Codes]]:
    mark = f".{_PARTS[0]}"
    for module in sorted(name.removesuffix(mark) for name in tensors if name.endswith(mark)):
        yield f"{module}.weight", _codes(module, tensors, _group_of(folder, module, groups))


def _checked_config(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]:
    """Return the ``quantization_config`` and its groups. Raises ConfigError where they say what is not read."""
    config = read_object(folder / _CONFIG).get(_ENTRY) or {}
    if config.get("quant_method") != COMPRESSED_TENSORS:
        raise ConfigError(f"{folder} is quantized by {config.get('quant_method')!r}, not by {COMPRESSED_TENSORS}")
    groups = {name: _checked_group(folder, name, group) for name, group in (config.get("config_groups") or {}).items()}
    kinds = {group.get("format") or config.get("format") for group in groups.values()} - {_PACKED, _DENSE}
    if kinds or config.get("kv_cache_scheme") or config.get("sparsity_config"):
        what = f"the format {min(map(str, kinds))!r}" if kinds else "a rounded cache, or pruned weights"
        raise ConfigError(f"{folder} has {what}: of {COMPRESSED_TENSORS}, integers in the format {_PACKED} are read")
    return config, groups


def _checked_group(folder: Path, name: str, group: Any) -> Mapping[str, Any]:
    """Return a group of the configuration. Raises ConfigError where it is not of integer weights alone."""
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ConfigError(f"{folder}: the group {name} of config.json says nothing of weights, and is not read")
    weights = group["weights"]
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise ConfigError(
                f"{folder}: the group {name} rounds activations ({part}), which the values of weights do not say: "
                "export the model as it was before it was quantized"
            )
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    if kind != "int" or bits not in _BITS or strategy not in ("group", "channel"):
        raise ConfigError(
            f"{folder}: the group {name} has weights of {bits} bits ({kind}, {strategy}); integers of "
            f"{', '.join(map(str, _BITS))} bits by group or channel are read"
        )
    return group


def _group_of(folder: Path, module: str, groups: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the settings of the weight of a module: its name counts more than a pattern, and its class least."""
    found: list[tuple[bool, bool, Mapping[str, Any]]] = [
        (target != module, not target.startswith(REGEX), group["weights"])
        for group in groups.values()
        for target in group.get("targets") or ()
        if is_target((target,), module, "Linear")
    ]
    if not found:
        raise ConfigError(f"{folder}: no group of config.json is of {module}, whose weight is packed")
    return min(found, key=lambda each: each[:2])[2]


def _codes(module: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Codes:
    packed, scales, zeros, sizes = (tensors.get(f"{module}.{part}") for part in _PARTS)
    symmetric, bits = bool(settings.get("symmetric", True)), int(settings["num_bits"])
    if f"{module}.{_INDEX}" in tensors:
        raise ConfigError(
            f"{module} has groups of inputs in an order of their own ({_INDEX}), which are not read: export the model "
            "as it was before it was quantized"
        )
    if packed is None or scales is None or sizes is None or (zeros is None) != symmetric:
        held = [part for part in _PARTS if f"{module}.{part}" in tensors]
        raise ExportError(f"{module} has {' and '.join(held)} alone; the checkpoint is not whole")
    out, columns = map(int, sizes.tolist())
    groups = 1 if settings["strategy"] == "channel" else columns // max(int(settings.get("group_size") or columns), 1)
    fits = tuple(packed.shape) == (out, words(columns, bits)) and tuple(scales.shape) == (out, groups)
    if not fits or (zeros is not None and tuple(zeros.shape) != (words(out, bits), groups)):
        raise ExportError(
            f"{module}: weight_packed {list(packed.shape)} and weight_scale {list(scales.shape)} do not fit a weight "
            f"of {out}x{columns} in {bits} bits; the checkpoint is damaged"
        )
    middle = torch.full((out, groups), 2 ** (bits - 1), dtype=torch.uint8, device="cpu")
    stored = middle if zeros is None else unpack_words(zeros, bits, 0, out).contiguous()
    return Codes(unpack_words(packed, bits, 1, columns).contiguous(), scales, stored, bits, symmetric)
