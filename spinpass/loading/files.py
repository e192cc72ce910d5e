"""The files that a model is loaded from, each looked at before transformers opens it.

| files | are |
|---|---|
| all | what was recorded of them, where anybody has (:mod:`spinpass.formats.recorded`) |
| of a folder that spinpass has exported | what ``spinpass.json`` lists |
| JSON | one object without a key twice |
| safetensors, GGUF | as their headers say, to the last byte |
| ``.bin`` | an archive whose checksums hold; or older than those, without any |

A byte of a weight in safetensors or GGUF can be known to be wrong only where somebody has recorded the file's hash. The
hash of what was loaded is kept, for ``spinpass.json``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinpass.errors import DamageError, ExportError
from spinpass.formats import (
    FileHash,
    GgufHeader,
    GgufTensor,
    check_archive,
    check_checkpoint,
    check_gguf,
    check_recorded,
    check_safetensors,
    is_plain_name,
    read_object,
    sha256,
)
from spinpass.progress import Progress

from .architecture import find_file
from .sources import Source

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model",
)  # fmt: skip
"""Where one of these is, there is a tokenizer."""
_BESIDE = (
    "config.json", "generation_config.json", "hf_quant_config.json", "quantize_config.json", *_TOKENIZER,
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_QUIET = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "quantize_config.json")  # not asked of the hub


@dataclass(frozen=True)
class SourceFiles:
    """The files that a model is loaded from: hashes by name, where the weights are, whether a tokenizer is there."""

    hashes: Mapping[str, FileHash] = field(default_factory=dict)
    weights: tuple[Path, ...] = ()
    tokenizer: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Say which files were changed after they were downloaded."""
        return tuple(found.note for found in self.hashes.values() if found.note is not None)

    @property
    def weight_bytes(self) -> int:
        """Return the size of all weights."""
        return sum(path.stat().st_size for path in self.weights)

    def check_unchanged(self, progress: Progress | None = None) -> None:
        """Read the weights again and compare them with what was loaded; ``progress`` gets (bytes done, all bytes).

        Weights that stay in their files are read for as long as a run takes. Raises ExportError: somebody has written
        to one meanwhile.
        """
        done, whole = 0, sum(self.hashes[path.name].bytes for path in self.weights)
        for path in self.weights:
            known = self.hashes[path.name]
            try:
                same = path.stat().st_size == known.bytes and sha256(path) == known.sha256
            except (OSError, DamageError):  # it is gone
                same = False
            if not same:
                raise ExportError(
                    f"{path} is not what it was when the run began: somebody has written to it meanwhile; export again "
                    "when it is whole"
                )
            done += known.bytes
            if progress is not None:
                progress(done, whole)

    def to_dict(self) -> dict[str, Any]:
        """Return it as ``spinpass.json`` holds it."""
        return {name: found.to_dict() for name, found in self.hashes.items()}


def check_program_file(path: Path) -> SourceFiles:
    """Return the hash of a ``.pt2`` file. Raises DamageError where it is not what was recorded."""
    return SourceFiles({path.name: check_recorded(path)}, (path,))


def check_folder(transformers: Any, location: str) -> SourceFiles:
    """Look at every file of a folder, or of a model on the hub, that transformers opens.

    Raises:
        DamageError: one is damaged, or not what was recorded; the index names a file outside the folder.
        VerificationError: one is not what ``spinpass.json`` of an exported folder lists.
    """
    folder = Path(location)
    if folder.is_dir():
        check_checkpoint(folder)
    found = check_documents(transformers, location)
    weights = weight_files(transformers, location)
    for path in weights.values():
        check_weights(path)
    hashes = {name: check_recorded(path) for name, path in (found | weights).items()}
    parts = [path for name, path in weights.items() if name not in _INDICES]
    return SourceFiles(hashes, tuple(parts), any(name in found for name in _TOKENIZER))


def check_documents(transformers: Any, location: str) -> dict[str, Path]:
    """Look at the files beside the weights and return them by name. Raises DamageError where one holds no JSON."""
    asked = _BESIDE if Path(location).is_dir() else [name for name in _BESIDE if name not in _QUIET]
    found = {name: path for name in asked if (path := find_file(transformers, location, name)) is not None}
    for path in found.values():
        if path.suffix == ".json":
            read_object(path)
    return found


def has_tokenizer(transformers: Any, location: str) -> bool:
    """Say whether there are files of a tokenizer."""
    return any(find_file(transformers, location, name) is not None for name in _TOKENIZER)


def gguf_header(path: Path) -> GgufHeader:
    """Return what a GGUF file says of itself; the reader of the package gguf takes ten times as long.

    Raises DamageError: it cannot be so. Raises ExportError where that package is missing.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ExportError(f"reading {path} needs the package gguf ({error}): pip install gguf") from error
    return check_gguf(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})


def check_gguf_file(source: Source) -> SourceFiles:
    """Look at a GGUF file, as :func:`check_folder`.

    Raises ExportError where the package gguf is missing, or cannot dequantize a type of its tensors.
    """
    path = Path(source.location, str(source.gguf))
    header = gguf_header(path)
    _check_types(path, header.tensors)
    from gguf.constants import Keys

    kind = header.values.get("general.architecture")
    known = {
        text.replace("{arch}", str(kind))
        for part in vars(Keys).values() if isinstance(part, type)
        for text in vars(part).values() if isinstance(text, str)
    }  # fmt: skip
    check_keys(str(path), header.values, known, "GGUF")
    blocks = header.values.get(f"{kind}.block_count", 0)
    check_layers(str(path), {"block_count": blocks}, len(header.tensors))
    has_tokens = "tokenizer.ggml.tokens" in header.values
    return SourceFiles({path.name: check_recorded(path)}, (path,), has_tokens)


def _check_types(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    """Raise ExportError where the values of a tensor's type cannot be taken."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind in sorted({tensor.kind for tensor in tensors.values()}):
        named = GGMLQuantizationType(kind)
        try:
            dequantize(numpy.zeros((1, GGML_QUANT_SIZES[named][1]), numpy.uint8), named)
        except NotImplementedError as error:
            of_type = [name for name, own in tensors.items() if own.kind == kind]
            raise ExportError(
                f"{path} holds {len(of_type)} tensors of the type {named.name}, such as {of_type[0]}, whose values the "
                "package gguf cannot take: write the model with weights of another type, such as Q8_0"
            ) from error


def weight_files(transformers: Any, location: str) -> dict[str, Path]:
    """Return the weights that transformers loads by name, in its order of preference, with their index.

    Raises DamageError: the index is none, or names a file that is not in the folder.
    """
    for single, index in zip(_SINGLE, _INDICES, strict=True):
        path = find_file(transformers, location, single)
        if path is not None:
            return {single: path}
        path = find_file(transformers, location, index)
        if path is not None:
            return {index: path} | _parts(transformers, location, path)
    return {path.name: path for path in sorted(Path(location).glob("*.safetensors"))}


def _parts(transformers: Any, location: str, index: Path) -> dict[str, Path]:
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise DamageError(f"{index} has no weight_map of names of files: copy it again")
    found = {}
    for name in sorted(set(named.values())):
        if not is_plain_name(name):
            raise DamageError(f"{index} names {name!r}, which is no file of its folder: it is not read")
        path = find_file(transformers, location, name)
        if path is None:
            raise DamageError(f"{location} lacks {name}, which {index.name} names: copy all of it")
        found[name] = path
    return found


def check_weights(path: Path) -> None:
    """Check what a file of weights says of itself. Raises DamageError where it cannot be so."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
    elif path.suffix == ".bin" and zipfile.is_zipfile(path):
        check_archive(path)


def check_layers(location: str, config: Mapping[str, Any], tensors: int) -> None:
    """Raise DamageError where a configuration asks for more layers than so many tensors can fill.

    Layers are made one by one before anything else can be compared.
    """
    for key, value in _entries(config):
        if not key.endswith(("layers", "layer", "blocks", "block_count", "experts", "depth")):
            continue
        most = max(4 * tensors, 1 << 14 if key.endswith("experts") else 1 << 10)
        if isinstance(value, int) and value > most:
            raise DamageError(f"{location} says {key} = {value:,}, and holds {tensors:,} tensors: it is damaged")


def check_extent(transformers: Any, location: str, bytes_held: int) -> None:
    """Raise DamageError where a configuration describes far more parameters than the files can hold.

    What is missing would be drawn at random first, whatever its size. Nothing is allocated here. Raises whatever
    transformers raises for a configuration that it cannot build.
    """
    import torch

    config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for what, tensors, most in (
        ("parameters", model.parameters(), 8 * bytes_held + (1 << 20)),
        ("values of its own making", model.buffers(), 1 << 30),
    ):
        count = sum(tensor.numel() for tensor in tensors)
        if count > most:
            raise DamageError(
                f"{location}: config.json describes {count:,} {what}, and the weights have {bytes_held:,} bytes: one "
                "of them is damaged"
            )


def check_config_keys(transformers: Any, location: str, config: Mapping[str, Any]) -> None:
    """Raise DamageError where a key of config.json or generation_config.json is a known one but for one letter."""
    made = (
        transformers.CONFIG_MAPPING[config["model_type"]]
        if config.get("model_type") in transformers.CONFIG_MAPPING
        else None
    )
    if made is not None:
        default = made()
        check_keys(
            f"{location}: config.json", config, {*vars(default), *default.to_dict(), *made.attribute_map}, made.__name__
        )
    path = find_file(transformers, location, "generation_config.json")
    if path is not None:
        known = set(vars(transformers.GenerationConfig()))
        check_keys(str(path), read_object(path), known, "GenerationConfig")


def check_keys(where: str, found: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise DamageError where an unknown key differs in one letter from a known one that is missing.

    It would be dropped in silence, and the default taken.
    """
    keys, others = set(found), set(known)
    missing = others - keys
    for key in sorted(keys - others):
        for meant in missing:
            if len(key) == len(meant) and sum(a != b for a, b in zip(key, meant)) == 1:
                raise DamageError(
                    f"{where} says {key!a}, which {what} does not know: {meant!r} is meant; copy it again"
                )


def _entries(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the entries of a configuration and of those within it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        else:
            yield key, value
