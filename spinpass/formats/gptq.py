"""GPTQ checkpoints: a folder of safetensors with ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` for every module.

| tensor | | |
|---|---|---|
| ``qweight`` | int32 (in·bits/32, out) | the integers, packed along the inputs |
| ``scales`` | float (groups, out) | |
| ``qzeros`` | int32 (groups, out·bits/32) | the zero points, packed along the outputs |
| ``g_idx`` | int32 (in,) | the group of every input; any order, as act-order makes it |

    w[o, i] = (q[i, o] − z[g_idx[i], o])·s[g_idx[i], o]

``checkpoint_format`` is ``gptq``, which stores z − 1 (modulo 2^bits), or ``gptq_v2``, which stores z. Readers of the
first disagree about z = 0: some take the stored 2^bits − 1 for 2^bits. So such a weight is only written as the second.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, DamageError, ExportError
from spinpass.graph import Handle
from spinpass.operators import pack_words, unpack_words, words
from spinpass.quantization import WEIGHT_BITS, Codes, QuantizedWeight

from .documents import read_object
from .packed_words import PackedWords
from .safetensors_header import check_safetensors
from .shards import SHARD_BYTES, check_storable, put_shards, shards_in
from .staging import staged

FORMATS = ("gptq", "gptq_v2")
QUANTIZE_CONFIG = "quantize_config.json"
"""The file in which loaders of GPTQ checkpoints look for the widths."""
_MODEL, _CONFIG = "model.safetensors", "config.json"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_HEAD = "lm_head"  # both a key of the layout and the module that it speaks of


@dataclass(frozen=True)
class GptqReport:
    """This is what :func:`write_gptq` wrote. ``config`` is the ``quantization_config``; ``changed`` names
    the weights whose values the scales' dtype has changed, with the largest relative change of a scale."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
    config: Mapping[str, Any]
    changed: Mapping[str, float]

    @property
    def summary(self) -> str:
        """Say it in one line."""
        worst = max(self.changed.values(), default=0.0)
        note = f"; scales in a half type: {len(self.changed)} weights changed by up to {worst:.1e}" if worst else ""
        return f"GPTQ checkpoint of {self.bytes / 1e6:.1f} MB{note}"


@dataclass(frozen=True)
class GptqCheckpoint:
    """This is what :func:`read_gptq` found: ``codes`` by parameter name, scales in the dtype of the file, and
    ``tensors``, all that is not quantized. ``config`` is the quantization's."""

    codes: Mapping[str, Codes]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


# -- out --------------------------------------------------------------------------------------------------------------


def write_gptq(
    folder: str | Path,
    weights: Mapping[str, QuantizedWeight],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    checkpoint_format: str = "gptq",
    scales_dtype: torch.dtype = torch.float16,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> GptqReport:
    """Write ``model.safetensors``, ``config.json`` and ``quantize_config.json``; files of these names are replaced.

    Codes are packed, and tensors that are handles read, when their bytes are due (:func:`.shards.write_shards`).

    Args:
        folder: where they are written; it is made if it is missing.
        weights: those of linear layers by parameter name, as the report of :func:`spinpass.quantization.quantize` has
            them.
        tensors: everything else by name (tables, norms, biases).
        checkpoint_format: ``gptq`` or ``gptq_v2``.
        scales_dtype: float16, which kernels take, or float32, in which nothing changes; the report says what did.
        config: the model's configuration, which ``config.json`` holds beside the quantization's.
        shard_bytes: how many bytes of tensors a file holds at most; there are several and an index where one is not
            enough.

    Raises:
        ConfigError: the format or dtype is not one of these, a weight is no matrix of a module, its sizes leave words
            unfilled, a zero point is 0 in the format ``gptq``, or the dtype cannot hold a scale.
        ExportError: the folder is not writable. Nothing is left behind.
    """
    if checkpoint_format not in FORMATS:
        raise ConfigError(f"checkpoint_format {checkpoint_format!r} is not one of {', '.join(FORMATS)}")
    if scales_dtype not in (torch.float16, torch.float32):
        raise ConfigError(f"scales_dtype {scales_dtype} is not float16 or float32")
    stored = dict(tensors or {})
    changed: dict[str, float] = {}
    for name, weight in weights.items():
        stored |= _tensors_of(name, weight, checkpoint_format, scales_dtype)
        scales = weight.codes.scales
        off = ((scales.to(scales_dtype).to(scales.dtype) - scales).abs() / scales.abs()).max()
        if off:
            changed[name] = float(off)
    found = _quantization_config({n: w.codes for n, w in weights.items()}, checkpoint_format)
    folder = Path(folder)
    check_storable(stored)
    with staged(folder, sum(t.nbytes for t in stored.values()), gone=shards_in(folder)) as staging:
        put_shards(staging, stored, shard_bytes=shard_bytes)
        (staging / QUANTIZE_CONFIG).write_text(json.dumps(found, indent=2))
        (staging / _CONFIG).write_text(json.dumps({**(config or {}), "quantization_config": found}, indent=2))
        written = sorted(staging.iterdir())
        size = sum(file.stat().st_size for file in written)
    return GptqReport(folder, tuple(folder / file.name for file in written), size, found, changed)


def _tensors_of(
    name: str, weight: QuantizedWeight, checkpoint_format: str, scales_dtype: torch.dtype
) -> dict[str, Tensor]:
    codes, module = weight.codes, name.removesuffix(".weight")
    if module == name or weight.dim not in (0, 1):
        raise ConfigError(f"{name} is not the weight of one linear layer; leave it out, or give its values in tensors")
    (rows, columns), bits = codes.q.shape, codes.bits
    for axis, size in (("inputs", columns), ("outputs", rows)):
        if size * bits % 32:
            raise ConfigError(
                f"{name} has {size} {axis} of {bits} bits, which do not fill words of 32 bits; leave it out"
            )
    if checkpoint_format == "gptq" and not bool(codes.zeros.all()):
        raise ConfigError(f"{name} has a zero point of 0, which readers of 'gptq' disagree about; write 'gptq_v2'")
    scales = codes.scales.to(scales_dtype)
    if not bool((scales.isfinite() & (scales != 0)).all()):
        raise ConfigError(f"{name} has scales that {scales_dtype} cannot hold; use scales_dtype=torch.float32")
    zeros = codes.zeros.to(torch.int32) - int(checkpoint_format == "gptq")
    return {
        f"{module}.qweight": Handle(PackedWords(codes.q.T, bits, 0)),
        f"{module}.qzeros": pack_words(zeros.T, bits, 1),
        f"{module}.scales": scales.T.contiguous(),
        f"{module}.g_idx": codes.group_of.to(torch.int32),
    }


def _quantization_config(weights: Mapping[str, Codes], checkpoint_format: str) -> dict[str, Any]:
    """Return the settings of most modules, and in ``dynamic`` those of the others by a pattern of their name."""
    settings = {name.removesuffix(".weight"): _settings(codes) for name, codes in weights.items()}
    counted = Counter(tuple(s.items()) for s in settings.values())
    common = dict(counted.most_common(1)[0][0]) if counted else {"bits": 4, "group_size": -1, "sym": True}
    others = {f"+:^{re.escape(module)}$": s for module, s in settings.items() if s != common}
    return {
        "quant_method": "gptq",
        **common,
        "desc_act": any(codes.group_length is None for codes in weights.values()),
        "checkpoint_format": checkpoint_format,
        **({_HEAD: True} if _HEAD in settings else {}),  # loaders take it for floats otherwise
        "pack_dtype": "int32",
        **({"dynamic": others} if others else {}),
    }


def _settings(codes: Codes) -> dict[str, Any]:
    columns, groups = codes.q.shape[1], codes.scales.shape[1]
    length = codes.group_length or -(-columns // groups)
    return {"bits": codes.bits, "group_size": -1 if groups == 1 else length, "sym": codes.symmetric}


# -- in ---------------------------------------------------------------------------------------------------------------


def read_gptq(folder: str | Path) -> GptqCheckpoint:
    """Read the integers and other tensors of a checkpoint folder, of one file or of several with an index.

    Raises:
        ConfigError: there is no checkpoint, or one of another method or format.
        ExportError: safetensors is missing or cannot read a file; tensors of a module are missing or do not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = read_tensors(folder)
    codes = dict(_every_weight(tensors, config))
    packed = {f"{name.removesuffix('.weight')}.{part}" for name in codes for part in _PARTS}
    return GptqCheckpoint(codes, {name: t for name, t in tensors.items() if name not in packed}, config)


def gptq_codes(folder: str | Path) -> Iterator[tuple[str, Codes]]:
    """Yield the integers of a checkpoint folder by parameter name, a weight at a time. Raises as :func:`read_gptq`."""
    yield from _every_weight(read_tensors(Path(folder)), _read_config(Path(folder)))


def _every_weight(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Codes]]:
    for module in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        yield f"{module}.weight", _codes(module, tensors, config)


def _read_config(folder: Path) -> Mapping[str, Any]:
    for name in (_CONFIG, QUANTIZE_CONFIG):
        if not (folder / name).is_file():
            continue
        found = read_object(folder / name)
        config: Mapping[str, Any] = found.get("quantization_config", {}) if name == _CONFIG else found
        if config:
            break
    else:
        raise ConfigError(f"{folder} has no {_CONFIG} with a quantization_config and no {QUANTIZE_CONFIG}")
    method, layout = config.get("quant_method", "gptq"), config.get("checkpoint_format", "gptq")
    if method != "gptq" or layout not in FORMATS:
        raise ConfigError(
            f"{folder} is quantized by {method!r} in the format {layout!r}, not in {' or '.join(FORMATS)}"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise ConfigError(f"{folder} is packed into {config['pack_dtype']}; only int32 is read")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the safetensors files of a folder, which the index names where there is one.

    Raises ConfigError where there is none, ExportError where a file cannot be read.
    """
    load = _safetensors().load_file
    index = folder / f"{_MODEL}.index.json"
    if index.is_file():
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict):
            raise DamageError(f"{index} has no weight_map of names of files: copy it again")
        outside = [name for name in named.values() if Path(str(name)).name != name]
        if outside:
            raise DamageError(f"{index} names {outside[0]!r}, which is no file of its folder: it is not read")
        files = sorted({folder / name for name in named.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no .safetensors file")
    found: dict[str, Tensor] = {}
    for file in files:
        check_safetensors(file)
        try:
            found |= load(file)
        except Exception as error:  # safetensors' own error derives from Exception alone
            raise ExportError(f"{file} cannot be read: {error}; download it again") from error
    return found


def _codes(module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Codes:
    parts = {part: tensors.get(f"{module}.{part}") for part in _PARTS}
    qweight, qzeros, scales, g_idx = parts.values()
    if qweight is None or qzeros is None or scales is None:
        missing = [part for part in _PARTS[:3] if parts[part] is None]
        raise ExportError(f"{module} has a qweight but no {' and no '.join(missing)}; the checkpoint is not whole")
    (rows, out), groups = qweight.shape, scales.shape[0]
    columns = rows * 32 // int(config.get("bits", 4)) if g_idx is None else g_idx.numel()
    bits = rows * 32 // columns
    sizes = bits in WEIGHT_BITS and words(columns, bits) == rows
    if not sizes or tuple(scales.shape) != (groups, out) or tuple(qzeros.shape) != (groups, words(out, bits)):
        shapes = ", ".join(f"{part} {list(t.shape)}" for part, t in parts.items() if t is not None)
        raise ExportError(f"{module}: the shapes {shapes} do not fit each other; the checkpoint is damaged")
    if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ExportError(f"{module}: g_idx names group {int(g_idx.max())} of {groups}; the checkpoint is damaged")
    q = unpack_words(qweight, bits, 0, columns).T.contiguous()
    zeros = unpack_words(qzeros, bits, 1, out).T.contiguous()
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    made = Codes(q, scales.T.contiguous(), zeros, bits, bool((zeros == 2 ** (bits - 1)).all()))
    if g_idx is None or torch.equal(g_idx.long(), made.group_of):
        return made
    return Codes(made.q, made.scales, made.zeros, bits, made.symmetric, g_idx.long())


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ExportError("GPTQ checkpoints need safetensors: pip install safetensors") from error
    return safetensors.torch
