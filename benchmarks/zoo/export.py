"""From a model to a program, by the first way of exporting that works."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .models import build, sample_inputs, set_cache

# Shorter than the tiny sliding windows: the exporter traces a windowed cache as one that keeps everything.
_PROMPT = 5


@dataclass(frozen=True)
class Exported:
    """A program, how it was made (``dynamic``, ``static`` or ``torch``: the first way that works), and how long that
    took; ``failures`` holds what the ways before said."""

    program: ExportedProgram
    way: str
    seconds: float
    failures: tuple[str, ...] = ()


class NotExported(Exception):
    """No way of exporting the model works; the message has one line per way."""


def export(
    model: nn.Module, inputs: Mapping[str, Any], ways: tuple[str, ...] = ("dynamic", "static", "torch")
) -> Exported:
    """The first of ``ways`` that exports; without a cache unless ``inputs`` bring one. Raises NotExported."""
    failures: list[str] = []
    given = dict(inputs) if "use_cache" in inputs else {**inputs, "use_cache": False}
    for way in ways:
        started = time.perf_counter()
        try:
            program = _WAYS[way](model, copy.deepcopy(given))
        except Exception as error:  # tracing runs the model: anything can come out of it
            failures.append(f"{way}: {first_line(error)}")
            continue
        return Exported(program, way, time.perf_counter() - started, tuple(failures))
    raise NotExported("\n".join(failures))


def prefill_and_decode(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``generate`` gives to the model: first the prompt, then two more tokens and the cache of the prompt."""
    from transformers.exporters.utils import decompose_prefill_decode

    set_cache(model, True)
    prompt = sample_inputs(model, sequence=_PROMPT)
    if "attention_mask" in prompt:
        prompt["attention_mask"] = torch.ones_like(prompt["attention_mask"])
    parts = decompose_prefill_decode(model, prompt, multi_token_decode=True)
    return tuple({k: v for k, v in parts[p][1].items() if v is not None} for p in ("prefill", "decode"))  # type: ignore[return-value]


def save(program: ExportedProgram, path: Path) -> None:
    """Write a program, whole or not at all."""
    from spinpass.errors import ExportError
    from spinpass.formats import save_program

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_program(program, path)
    except ExportError as error:
        raise NotExported(f"kept: {first_line(error)}") from error


def load(path: Path) -> ExportedProgram:
    """Read a program that :func:`save` wrote."""
    register()
    from spinpass.formats import load_program

    return load_program(path)


def register() -> None:
    """Import what registers the operators and classes that saved programs name."""
    import transformers.exporters
    import transformers.integrations.moe
    import transformers.modeling_outputs  # noqa: F401


def warm_up() -> None:
    """Import everything and trace once: forked workers then start with all of it in memory."""
    register()
    model, inputs = build("llama")
    export(model, inputs, ways=("dynamic",))
    import spinpass.exporters.onnx  # noqa: F401


def _dynamo(model: Any, inputs: dict[str, Any], dynamic: bool) -> ExportedProgram:
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    exporter: Any = DynamoExporter
    made = exporter().export(model, inputs, DynamoConfig(dynamic=dynamic))
    program = getattr(made, "program", made)
    assert isinstance(program, ExportedProgram)
    return program


def _torch(model: nn.Module, inputs: dict[str, Any]) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (), inputs, strict=False)


_WAYS: dict[str, Callable[[nn.Module, dict[str, Any]], ExportedProgram]] = {
    "dynamic": lambda model, inputs: _dynamo(model, inputs, dynamic=True),
    "static": lambda model, inputs: _dynamo(model, inputs, dynamic=False),
    "torch": _torch,
}


def first_line(error: BaseException) -> str:
    """What is said of an error in a record."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0]}"[:300]
