"""From what a user names to an exported program: a model folder, a name on the hub, a GGUF file or a ``.pt2`` file.

transformers does the loading and the exporting; it is imported when it is needed. Its programs with a KV cache are one
graph that reads prompts of any length and continues from any cache.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import load_program, staged

from .gptq import quantization_method, skeleton, with_values
from .older_transformers import add_older_words
from .sources import Source, locate
from .static_cache import export_static_cache

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
_SAMPLE = (2, 16)  # a batch of one would be specialised to one


@dataclass(frozen=True)
class Companions:
    """This belongs beside an exported model: the configuration and, where the source has one, the tokenizer."""

    config: Any
    generation_config: Any
    tokenizer: Any

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write ``config.json``, ``generation_config.json`` and the tokenizer's files, for transformers 5 and 4.

        Returns their paths. Raises ExportError where they cannot be written; nothing is left half written.
        """
        folder = Path(folder)
        with staged(folder) as staging, _quiet():
            for part in (self.config, self.generation_config, self.tokenizer):
                if part is not None:
                    part.save_pretrained(staging)
            add_older_words(staging)
            names = sorted(path.name for path in staging.iterdir() if path.is_file())
        return tuple(folder / name for name in names)


@dataclass(frozen=True)
class LoadedModel:
    """This is an exported program and where it came from; ``companions`` is None for a ``.pt2`` file."""

    source: Source
    program: ExportedProgram
    companions: Companions | None


def load_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    cache: bool = True,
    context: int | None = None,
    dequantize: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load and export ``model``. A ``.pt2`` file is taken as it is.

    Args:
        model: a folder of transformers or a name on the hub, a ``.gguf`` file or a folder with one, a ``.pt2`` file.
        dtype: that of the weights: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for what is stored.
        cache: make one graph with the KV cache as inputs and outputs; False exports the prompt's pass alone, without
            cache.
        context: put a cache of that many tokens inside instead (:mod:`.static_cache`), which ExecuTorch takes.
        dequantize: where the folder holds a GPTQ checkpoint, take the values of its integers; it is refused otherwise.
        progress: it is called with the name of each step before it starts.

    Raises:
        ConfigError: there is no such file or folder, or no model in it; the dtype is unknown; the context does not fit;
            weights are packed and may not be dequantized.
        ExportError: transformers is missing, cannot load the model, or cannot export it.
    """
    source = locate(model)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    report = progress or (lambda step: None)
    report("load")
    if source.kind == "program":
        return LoadedModel(source, load_program(source.location), None)
    packed = _is_packed(source, dequantize)
    with _quiet():
        loaded, tokenizer = _load(source, _DTYPES[dtype], packed)
        report("export")
        program = _exported(loaded, cache, source.location, context)
    if packed:
        report("dequantize")
        program = with_values(program, source.location)
    return LoadedModel(source, program, Companions(loaded.config, loaded.generation_config, tokenizer))


def _is_packed(source: Source, dequantize: bool) -> bool:
    """Say whether the folder holds a GPTQ checkpoint. Raises ConfigError where that is not to be dequantized."""
    if source.kind != "transformers" or not Path(source.location).is_dir():
        return False
    if quantization_method(Path(source.location)) != "gptq":
        return False
    if not dequantize:
        raise ConfigError(
            f"{source.location} holds packed weights (gptq), which are not rotated behind your back: "
            "add --dequantize (dequantize=True) to take their values as floats"
        )
    return True


def _load(source: Source, dtype: Any, packed: bool) -> tuple[Any, Any]:
    """Return the model and its tokenizer, None where it has none."""
    transformers = _module("transformers", f"loading {source.location}")
    where: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        if packed:
            model = skeleton(transformers, source.location, dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, **where).eval()
    except Exception as error:  # hub, file, configuration and import errors: no common base below Exception
        raise ExportError(f"transformers cannot load {source.location}: {_summary(error)}") from error
    if source.gguf:  # the weights are dequantized, yet the model says otherwise and refuses to be saved
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **where)
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # only text generation misses it
        logging.getLogger("spinpass").info("%s has no tokenizer that transformers can load", source.location)
        tokenizer = None
    return model, tokenizer


def _exported(model: Any, cache: bool, name: str, context: int | None) -> ExportedProgram:
    ids = torch.arange(_SAMPLE[0] * _SAMPLE[1]).reshape(_SAMPLE) % model.get_input_embeddings().num_embeddings
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exporters = _module("transformers.exporters", f"exporting {name}")
    stages = _module("transformers.exporters.utils", f"exporting {name}")
    try:
        if context is not None:
            return export_static_cache(model, context)
        if cache:
            model, inputs = stages.decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
        else:
            inputs = inputs | {"use_cache": False}
        exported = exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=True))
    except ConfigError:
        raise
    except Exception as error:  # whatever tracing a model's own code raises
        raise ExportError(f"{name} cannot be exported: {_summary(error)}") from error
    program: ExportedProgram = exported.program
    return program


def _module(name: str, purpose: str) -> Any:
    """Import a module of transformers. Raises ExportError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"{purpose} needs transformers 5 with its exporters ({error}): pip install 'spinpass[transformers]'"
        ) from error


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of the packages behind; loggers and settings are put back."""
    from_below = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(from_below)


@contextmanager
def _no_bars() -> Iterator[None]:
    try:
        gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        theirs: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    shown, bar = theirs.is_progress_bar_enabled(), getattr(gguf, "tqdm", None)
    theirs.disable_progress_bar()
    if bar is not None:  # the one bar that does not ask
        gguf.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
        if bar is not None:
            gguf.tqdm = bar
