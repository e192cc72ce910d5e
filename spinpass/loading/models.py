"""From what a user names to an exported program: a model folder, a name on the hub, a GGUF file or a ``.pt2`` file.

transformers does the loading and the exporting; it is imported when it is needed. Its programs with a KV cache are one
graph that reads prompts of any length and continues from any cache.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from spinpass.errors import ConfigError, ExportError, SpinpassError
from spinpass.formats import load_program, staged

from .architecture import TRUST, causal_classes, check_adapters, check_architecture
from .decoder import export_decoder, sample_ids, traced_program
from .faithful import check_faithful, reads_padding
from .files import (
    SourceFiles,
    check_config_keys,
    check_documents,
    check_extent,
    check_folder,
    check_gguf_file,
    check_layers,
    check_program_file,
    has_tokenizer,
)
from .gptq import skeleton, with_values
from .older_transformers import add_older_words
from .papers import Papers, papers_of
from .quantized import BY_READING, check_quantization, dequantized_config, gguf_types
from .quiet import quietly
from .sources import Source, locate
from .static_cache import export_static_cache
from .streamed import Streamed, can_stream
from .tensors import LoadingReport, check_loaded_tensors, renamings, stored_tensors, wrappers

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
_IGNORED = "_keys_to_ignore_on_load_unexpected"  # of a class of transformers


@dataclass(frozen=True)
class Companions:
    """This belongs beside an exported model: the configuration and, where the source has one, the tokenizer."""

    config: Any
    generation_config: Any
    tokenizer: Any

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None where the configuration does not say."""
        config = None if self.config is None else self.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write ``config.json``, ``generation_config.json`` and the tokenizer's files, for transformers 5 and 4.

        Returns their paths. Raises ExportError where they cannot be written; nothing is left half written.
        """
        folder = Path(folder)
        with staged(folder) as staging, quietly():
            for part in (self.config, self.tokenizer):
                if part is not None:
                    part.save_pretrained(staging)
            if self.generation_config is not None:  # as it came: save_pretrained refuses a top_p without do_sample
                self.generation_config.to_json_file(staging / "generation_config.json")
            add_older_words(staging)
            names = sorted(path.name for path in staging.iterdir() if path.is_file())
        return tuple(folder / name for name in names)


_PADDING = "padding changes what the model makes of a text: rows of different length are run one by one"


@dataclass(frozen=True)
class LoadedModel:
    """This is an exported program and where it came from; ``companions`` is None for a ``.pt2`` file. ``report`` says
    what loading did beyond taking every tensor as it was saved, ``files`` what it was loaded from. ``reads_padding``:
    padding in front of a text changes what the model makes of it. ``papers``: its licence."""

    source: Source
    program: ExportedProgram
    companions: Companions | None
    report: LoadingReport = field(default_factory=LoadingReport)
    files: SourceFiles = field(default_factory=SourceFiles)
    reads_padding: bool = False
    papers: Papers = field(default_factory=Papers)


def load_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    cache: bool = True,
    context: int | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
    experts: str | None = None,
    streamed: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load and export ``model``. A ``.pt2`` file is taken as it is.

    Args:
        model: a folder of transformers or a name on the hub, a ``.gguf`` file or a folder with one, a ``.pt2`` file.
        dtype: that of the weights: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for what is stored.
        cache: make one graph with the KV cache as inputs and outputs; False exports the prompt's pass alone, without
            cache.
        context: put a cache of that many tokens inside instead (:mod:`.static_cache`), which ExecuTorch takes.
        dequantize: where the checkpoint is quantized (GPTQ, compressed-tensors, FP8, MXFP4), take the values of its
            codes; it is refused otherwise. The weights of a GGUF file always are.
        trust_remote_code: run modelling code that comes with the model. Without it nothing of a folder is run.
        experts: which of transformers' implementations of a mixture's experts goes into the graph, for a target that
            has not all of their operators (``grouped_mm``, ``batched_mm``). None leaves the model's own, and so do
            models that have but one.
        streamed: leave large weights of a folder in its files: the program's constants are read when they are used
            (:class:`spinpass.graph.Handle`). Small models are loaded all the same.
        progress: it is called with the name of each step before it starts.

    Raises:
        ConfigError: there is no such file or folder, or no model in it; the dtype is unknown; the context does not fit;
            weights are quantized and may not be dequantized.
        ExportError: transformers is missing, cannot load the model, or cannot export it; or what would be loaded is not
            what was saved: another class, tensors missing or of another shape, an adapter, codes without their scales,
            a weight that is not finite.
    """
    source = locate(model)
    check_dtype(dtype)
    report = progress or (lambda step: None)
    report("load")
    if source.kind == "program":
        program, files = load_program(source.location), check_program_file(Path(source.location))
        return LoadedModel(source, program, None, LoadingReport(notes=files.notes), files)
    with quietly():
        given, tokenizer, done, files = _load(source, _DTYPES[dtype], dequantize, trust_remote_code, streamed)
        loaded = given.traced if isinstance(given, Streamed) else given
        if experts is not None and loaded._can_set_experts_implementation():  # noqa: SLF001  as their exporters ask
            loaded.set_experts_implementation(experts)
        report("export")
        padding = False
        program = _with_values(given, _exported(given, cache, source.location, context))
        if cache and context is None and done.dequantized not in BY_READING:  # whose values are filled in below
            report("compare")
            program, notes = _faithful(given, program, source.location)
            padding = reads_padding(loaded, program)
            done = replace(done, notes=(*done.notes, *notes, *([_PADDING] if padding else ())))
    if done.dequantized in BY_READING:
        report("dequantize")
        program = with_values(program, source.location, done.dequantized)
    beside = Companions(loaded.config, loaded.generation_config, tokenizer)
    papers = papers_of(source, _module("transformers", f"loading {source.location}"))
    return LoadedModel(source, program, beside, done, files, padding, papers)


def check_dtype(dtype: str) -> None:
    """Raise ConfigError where ``dtype`` is none that :func:`load_model` takes."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")


def load_config(source: Source, *, dequantize: bool = False, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a folder or a name on the hub, before its weights are read; None for a file.

    Raises ConfigError and ExportError as :func:`load_model`, where the configuration alone says that it would.
    """
    if source.kind != "transformers":
        return None
    transformers = _module("transformers", f"loading {source.location}")
    try:
        with quietly():
            check_documents(transformers, source.location)
            _checked_config(transformers, source.location, dequantize, trust_remote_code)
            return transformers.AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    except SpinpassError:
        raise
    except Exception as error:  # see _load
        raise _loading_error(source, error) from error


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer beside a model, without the model; None where there is none, as for a ``.pt2`` file.

    Raises ExportError: transformers is missing, the tokenizer's files are damaged, or they need code that may not run.
    """
    if source.kind == "program":
        return None
    transformers = _module("transformers", f"loading {source.location}")
    with quietly():
        here = has_tokenizer(transformers, source.location)
        return _tokenizer(transformers, source, here, trust_remote_code)[0]


def _loading_error(source: Source, error: Exception) -> SpinpassError:
    """Return what to raise where transformers cannot load a model: first of all whether there is one."""
    name = str(Path(source.location, source.gguf)) if source.gguf else source.location
    why = f"transformers cannot load {name}: {_summary(error).rstrip('.')}"
    if isinstance(error, OSError) and not Path(source.location).exists():
        return ConfigError(f"there is no file or folder {source.location} here, and {why}: check the name")
    return ExportError(f"{why}; check that it is whole, as save_pretrained writes it")


def _load(
    source: Source, dtype: Any, dequantize: bool, trust: bool, streamed: bool
) -> tuple[Any, Any, LoadingReport, SourceFiles]:
    """Return the model, its tokenizer (None where it has none), what loading did, and the files it read.

    A model whose weights stay in their files is :class:`.streamed.Streamed`.
    """
    transformers = _module("transformers", f"loading {source.location}")
    try:
        if source.gguf:
            check_adapters(transformers, source.location)
            files = check_gguf_file(source)
            model, done = _of_gguf(transformers, source, dtype)
        else:
            files = check_folder(transformers, source.location)
            later = streamed and not (dequantize or trust) and can_stream(files.weights)
            model, done = _of_folder(
                transformers, source.location, files, "auto" if later else dtype, dequantize, trust
            )
            if later and done.dequantized is None:
                model = (
                    Streamed.of(model, dtype, stored_tensors(files.weights))
                    or _of_folder(transformers, source.location, files, dtype, dequantize, trust)[0]
                )
    except SpinpassError:
        raise
    except Exception as error:  # hub, file, configuration and import errors: no common base below Exception
        raise _loading_error(source, error) from error
    tokenizer, missed = _tokenizer(transformers, source, files.tokenizer, trust)
    notes = (*files.notes, *missed, *_table_notes(getattr(model, "traced", model), tokenizer))
    return model, tokenizer, replace(done, notes=notes), files


def _tokenizer(transformers: Any, source: Source, here: bool, trust: bool) -> tuple[Any, tuple[str, ...]]:
    """Return the tokenizer, and a note where it needs what is not here; ``here`` says that there are files of one.

    Raises ExportError where its files are damaged or need code that may not run.
    """
    options: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        return transformers.AutoTokenizer.from_pretrained(source.location, trust_remote_code=trust, **options), ()
    except Exception as error:  # files, packages, and readers in other languages: no common base below Exception
        if not here:  # only text generation misses it
            logging.getLogger("spinpass").info("%s has no tokenizer", source.location)
            return None, ()
        if source.gguf or isinstance(error, ImportError):
            return None, (f"its tokenizer cannot be loaded, and is not exported: {_summary(error)}",)
        code = f"; if it needs code of its own, {TRUST}" if "remote_code" in str(error) else ""
        raise ExportError(f"{source.location}: its tokenizer cannot be loaded: {_summary(error)}{code}") from error


def _of_gguf(transformers: Any, source: Source, dtype: Any) -> tuple[Any, LoadingReport]:
    model, unused = _checked(
        transformers, source.location, {}, gguf_file=source.gguf, dtype=dtype, trust_remote_code=False
    )
    # the weights are dequantized, yet the model says otherwise and refuses to be saved
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    types = gguf_types(Path(source.location, str(source.gguf)))
    return model, LoadingReport(unused, dequantized=f"GGUF {'/'.join(types)}" if types else None)


def _of_folder(
    transformers: Any, location: str, files: SourceFiles, dtype: Any, dequantize: bool, trust: bool
) -> tuple[Any, LoadingReport]:
    """Load a folder or a name on the hub as the class that it was saved as, every tensor of it."""
    config, method = _checked_config(transformers, location, dequantize, trust)
    stored = stored_tensors(files.weights)
    if not (trust and config.get("auto_map")):
        check_layers(location, config, len(stored))
        check_config_keys(transformers, location, config)
        check_extent(transformers, location, files.weight_bytes)
    if method in BY_READING:
        return skeleton(transformers, location, dtype), LoadingReport(dequantized=method)
    options: dict[str, Any] = {"quantization_config": dequantized_config(transformers, config)} if method else {}
    names = renamings(stored)
    if names:
        options["key_mapping"] = names
    with _nothing_ignored(transformers, config):
        values = {} if method else stored
        model, unused = _checked(transformers, location, values, dtype=dtype, trust_remote_code=trust, **options)
    return model, LoadingReport(unused, wrappers(stored), method)


def _checked_config(
    transformers: Any, location: str, dequantize: bool, trust: bool
) -> tuple[dict[str, Any], str | None]:
    """Return what config.json holds and how the weights are quantized. Raises as the two checks do."""
    config, _ = transformers.PreTrainedConfig.get_config_dict(location)
    check_architecture(transformers, location, config, trust_remote_code=trust)
    return config, check_quantization(transformers, location, config, dequantize=dequantize)


def _checked(
    transformers: Any, location: str, stored: Mapping[str, torch.dtype | str], **options: Any
) -> tuple[Any, tuple[str, ...]]:
    """Load a causal language model; return it and what it has not used of the file.

    ``stored`` are the dtypes of what the file holds as values. Raises ExportError as :func:`.check_loaded_tensors`.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        location, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    return model.eval(), check_loaded_tensors(location, model, info, stored)


@contextmanager
def _nothing_ignored(transformers: Any, config: dict[str, Any]) -> Iterator[None]:
    """Let transformers report the tensors as well that a class is known to drop, such as heads of further tokens."""
    classes = causal_classes(transformers, config)
    before = [getattr(one, _IGNORED) for one in classes]
    for one in classes:
        setattr(one, _IGNORED, None)
    try:
        yield
    finally:
        for one, patterns in zip(classes, before, strict=True):
            setattr(one, _IGNORED, patterns)


def _table_notes(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """Say where the tokenizer makes tokens that the model has no row for."""
    if tokenizer is None:
        return ()
    tokens, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if tokens <= rows:
        return ()
    return (f"the tokenizer has {tokens} tokens, the model's table {rows} rows: text with the others cannot be read",)


def _exported(given: Any, cache: bool, name: str, context: int | None) -> ExportedProgram:
    model = given.traced if isinstance(given, Streamed) else given
    _module("transformers.exporters", f"exporting {name}")
    try:
        if context is not None:
            return export_static_cache(model, context)
        if cache:
            return export_decoder(model, running=_running(given))
        ids = sample_ids(model)
        return traced_program(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
    except ConfigError:
        raise
    except Exception as error:  # whatever tracing a model's own code raises
        raise ExportError(f"{name} cannot be exported: {_summary(error)}") from error


def _running(given: Any) -> Callable[[], AbstractContextManager[Any]]:
    return given.filled if isinstance(given, Streamed) else nullcontext


def _with_values(given: Any, program: ExportedProgram) -> ExportedProgram:
    return given.with_values(program) if isinstance(given, Streamed) else program


def _faithful(given: Any, program: ExportedProgram, name: str) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Return the decoder, or where that is not the model the one that takes single tokens, with a note of it.

    Raises ExportError where neither is the model.
    """
    model = given.traced if isinstance(given, Streamed) else given

    def check(made: ExportedProgram) -> None:
        with _running(given)():
            check_faithful(model, made, name)

    try:
        check(program)
    except ExportError as refusal:
        try:
            program = _with_values(given, export_decoder(model, one_by_one=True, running=_running(given)))
            check(program)
        except Exception as error:  # whatever tracing a model's own code raises: what was said first is about more
            raise refusal from error
        return program, ("its program takes one token at a call, so that prompts are read token by token",)
    return program, ()


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
