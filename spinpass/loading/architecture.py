"""Which class a folder is loaded as: the one that it was saved as, and a causal language model. Nothing is guessed.

transformers loads any folder as any class: what is not in the file is drawn at random, what the class has no place for
is dropped. So a reward model, an encoder or an adapter becomes a language model with a random head, or the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinpass.errors import ExportError

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
TRUST = "add --trust-remote-code (trust_remote_code=True) if you trust it"


def check_architecture(transformers: Any, location: str, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Make sure that ``AutoModelForCausalLM`` makes of a folder the class that it was saved as.

    Args:
        transformers: the module.
        location: the folder, or its name on the hub.
        config: what its config.json holds.
        trust_remote_code: the folder's own code may run.

    Raises:
        ExportError: it holds an adapter; it needs code of its own and may not run it; it is no causal language model;
            or config.json names another class in ``architectures``.
    """
    check_adapters(transformers, location)
    _check_names(location, config, trust_remote_code=trust_remote_code)
    kind = config.get("model_type")
    saved_as = [str(name) for name in config.get("architectures") or ()]
    known = kind in transformers.CONFIG_MAPPING
    owned = config.get("auto_map") or {}
    if "AutoModelForCausalLM" in owned and trust_remote_code:
        return
    if not known and owned:
        if trust_remote_code:
            raise ExportError(
                f"{location}: {_named(saved_as, kind)} is no causal language model, as exports are: choose one"
            )
        raise ExportError(
            f"{location} runs modelling code of its own ({', '.join(sorted(set(owned.values())))}): {TRUST}"
        )
    if not known:
        raise ExportError(
            f"{location}: transformers {transformers.__version__} knows no model type {kind!r}"
            f"{f' ({saved_as[0]})' if saved_as else ''}: try a newer version"
        )
    classes = causal_classes(transformers, config)
    if not classes:
        raise ExportError(
            f"{location}: {_named(saved_as, kind)} is no causal language model, as exports are: choose one"
        )
    made = classes[0]
    if not saved_as or made.__name__.casefold() in {name.casefold() for name in saved_as}:
        return
    part = made.config_class is not transformers.CONFIG_MAPPING[kind]  # the text model of a composite one
    if part and any(name.endswith("ForConditionalGeneration") for name in saved_as):
        return
    raise ExportError(
        f"{location} was saved as {saved_as[0]}, which is not exported: as {made.__name__}, its causal language model, "
        'it would miss tensors or drop some; if it is one, say so under "architectures" in its config.json'
    )


def causal_classes(transformers: Any, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the classes that ``AutoModelForCausalLM`` may take for a config.json, by its model type; none for some."""
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        return ()
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(transformers.CONFIG_MAPPING[kind], ())
    return found if isinstance(found, tuple) else (found,)


def _named(saved_as: list[str], kind: Any) -> str:
    return f"{saved_as[0]} (model type {kind})" if saved_as else f"model type {kind}"


def check_adapters(transformers: Any, location: str) -> None:
    """Raise ExportError where an adapter lies in the folder: transformers may or may not apply it."""
    for name in _ADAPTERS:
        if find_file(transformers, location, name) is not None:
            raise ExportError(
                f"{location} holds an adapter ({name}), which is not applied behind your back: merge it into its base "
                "model (merge_and_unload in peft), save that, and export the result"
            )


def _check_names(location: str, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Raise ExportError where config.json names kernels on the hub, which are code, or other weights than the usual."""
    if "transformers_weights" in config:
        raise ExportError(
            f"{location} names the weights {config['transformers_weights']!r} in its config.json: rename them to "
            "model.safetensors, and take the entry out"
        )
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, value in part.items():
            if (
                key.endswith(("_implementation", "_implementation_internal"))
                and "/" in str(value)
                and not trust_remote_code
            ):
                raise ExportError(f"{location} runs kernels from the hub ({key} {value!r} in config.json): {TRUST}")


def find_file(transformers: Any, location: str, name: str) -> Path | None:
    """Return where a file of a folder or of a model on the hub is, fetched if need be; None where there is none."""
    if Path(location).is_dir():
        path = Path(location, name)
        return path if path.is_file() else None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = transformers.utils.cached_file(location, name, **quiet)
    return None if found is None else Path(found)
