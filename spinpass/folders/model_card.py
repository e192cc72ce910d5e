"""``README.md`` of a folder: what a hub, and whoever downloads the folder, wants to know of it.

Front matter that the hub reads; what the file is; what it costs and loses (:mod:`.card`); the proofs; the command that
made it; how to run it. It names no place of this machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spinpass.formats import COMPRESSED_TENSORS, MANIFEST
from spinpass.loading import LoadedModel, Papers, Source

from .card import plural
from .command import command_of
from .judge import runtime_names

_RUNTIMES = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "gptq": "loaders of GPTQ checkpoints",
    COMPRESSED_TENSORS: "loaders of compressed-tensors",
    "transformers": "transformers",
}
_HOME = "spinpass"
_PROMPT = "Why is the sky blue?"
_PYTHON_ORT = f"""```python
from spinpass.runtime import OrtModel

model = OrtModel.from_pretrained(".")
text = model.tokenizer("{_PROMPT}", return_tensors="pt")
print(model.tokenizer.decode(model.generate(**text, max_new_tokens=32)[0]))
```"""
_TRANSFORMED = """
Its `config.json` declares online rotations in `transform_config`. A loader that leaves them out computes something
else, as transformers 5.23 does by itself:

```python
from transformers import AutoModelForCausalLM
from spinpass.loading import apply_declared_transforms

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
apply_declared_transforms(model, ".")
```"""
_DECODERS = {"openvino": "OpenVINODecoder", "executorch": "PteDecoder"}
_PYTHON_DECODER = f"""```python
from spinpass.runtime import DECODER

decoder = DECODER(".")
ids = decoder.tokenizer("{_PROMPT}")["input_ids"]
print(decoder.tokenizer.decode(decoder.generate(ids, 32).tokens))
```"""


def model_card(loaded: LoadedModel, about: Mapping[str, Any], settings: Mapping[str, Any] | None) -> str:
    """Return the text.

    Args:
        loaded: the model that the folder was made of.
        about: what ``spinpass.json`` says of the folder.
        settings: the options that make it again; None where options cannot say it.
    """
    library = next((name for name in ("onnx", "openvino", "executorch") if about.get(name)), "transformers")
    made = about.get("quantization") or {}
    integers = bool(made.get("weights")) or bool(about.get("packed"))
    name, rotated = _name(loaded), bool(about.get("plan"))
    parts = [
        "\n".join(_front_matter(loaded.papers, library, rotated=rotated, quantized=integers)),
        f"# {name} for {_reader(about, library, integers)}",
        _what(about, name, _reader(about, library, integers)),
        *_section("Measured", _measured(about.get("card"), about.get("compared"))),
        *_section("Proved", _proved(about, library)),
        *_section("Made by", _command(settings, hub_name(loaded.source), about)),
        *_section("Run it", _run(loaded, about, library)),
        *_section("Licence", _licence(loaded.papers)),
    ]
    return "\n\n".join(parts) + "\n"


def hub_name(source: Source) -> str:
    """The name of a model on the hub; empty where the source is a file or a folder here."""
    return source.location if source.kind == "transformers" and not Path(source.location).exists() else ""


def _name(loaded: LoadedModel) -> str:
    """What the model is called: by the hub, by its file, or by the last part of its folder."""
    source = loaded.source
    name = Path(source.gguf).stem if source.gguf else hub_name(source) or Path(source.location).resolve().name
    return "".join(letter if letter.isalnum() or letter in "._-/" else "-" for letter in name.removesuffix(".pt2"))


def _front_matter(papers: Papers, library: str, *, rotated: bool, quantized: bool) -> Iterator[str]:
    yield "---"
    for key in ("license", "license_name", "license_link"):
        if getattr(papers, key):
            yield f"{key}: {json.dumps(getattr(papers, key))}"
    if papers.base_model:
        yield f"base_model: {json.dumps(papers.base_model)}"
        if quantized:
            yield "base_model_relation: quantized"
    yield f"library_name: {library}"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    tags = {"spinpass": True, library: library != "transformers", "rotated": rotated, "quantized": quantized}
    yield from (f"- {tag}" for tag, given in tags.items() if given)
    yield "---"


def _reader(about: Mapping[str, Any], library: str, integers: bool) -> str:
    """What reads the folder, for people."""
    if (about.get("layout") or {}).get("name") == COMPRESSED_TENSORS:
        return _RUNTIMES[COMPRESSED_TENSORS]
    return _RUNTIMES["gptq" if library == "transformers" and integers else library]


def _what(about: Mapping[str, Any], name: str, reader: str) -> str:
    version = about.get("versions", {}).get(_HOME, "")
    said = [f"{name}, written for {reader} by {_HOME} {version}".rstrip() + "."]
    plan, made = about.get("plan"), about.get("quantization") or {}
    if plan:
        roles = ", ".join(sorted({space["rotation"] for space in plan["spaces"]}))
        said.append(f"Activations and weights are rotated ({roles}), which leaves what the model computes as it is.")
    widths = Counter(_width(weight) for weight in made.get("weights", {}).values())
    if widths:
        said.append(
            "Weights of linear layers: " + "; ".join(f"{n} of {what}" for what, n in widths.most_common()) + "."
        )
    elif about.get("packed"):
        said.append("Weights are rounded to nearest, to 4 bits in blocks of 32.")
    if made.get("activations"):
        said.append("Inputs of these layers are rounded as the model runs.")
    if about.get("cache"):
        said.append(f"Keys and values are kept as integers of {about['cache']['bits']} bits.")
    return " ".join(said)


def _width(weight: Mapping[str, Any]) -> str:
    groups = f" in groups of {weight['group_size']}" if weight.get("group_size") else " per channel"
    return f"{weight['bits']} bits{groups}"


def _section(title: str, lines: Iterator[str]) -> list[str]:
    found = "\n".join(lines)
    return [f"## {title}", found] if found else []


def _measured(card: Mapping[str, Any] | str | None, compared: Mapping[str, Any] | None) -> Iterator[str]:
    if not isinstance(card, Mapping):
        return
    yield "| of the file, beside the model it was made of | |"
    yield "|---|---|"
    yield f"| perplexity ÷ the model's | {_ratio(card)} |"
    if compared is not None:
        left = "not rotated" if compared["kept"] == "rotated" else "rotated"
        other = compared["other"]
        yield f"| the same scheme, {left} | {_ratio(other) if isinstance(other, Mapping) else other} |"
    yield f"| divergence of its predictions (KL) | {card['kl']:.4f} nats per token |"
    yield f"| the same likeliest token | {card['agreement']:.1%} |"
    yield f"| size | {card['bytes'] / 1e6:,.1f} MB |"
    yield f"| bits per weight, graph, scales and tables included | {card['bits_per_weight']:.2f} |"
    if card["decode"] is not None:
        speeds = f"{card['decode']:.1f}, {card['prefill']:.0f} tokens/s"
        yield f"| decode, prefill | {speeds} on the machine that made it |"
    yield ""
    yield f"On {card['windows']} windows of {card['length']} tokens of Python's own help, in {card['runtime']}."


def _ratio(card: Mapping[str, Any]) -> str:
    return f"{card['ratio']:.4f}" + ("" if card["ratio_error"] is None else f" ± {card['ratio_error']:.4f}")


def _proved(about: Mapping[str, Any], library: str) -> Iterator[str]:
    certificate = (about.get("record") or {}).get("certificate")
    if about.get("plan"):
        yield f"- the rotation: {certificate['verdict'] if certificate else 'not certified'}"
    file = about.get(library) or {}
    if file:
        proof = file.get("certificate")
        yield f"- the file: {proof['verdict'] if proof else 'not certified: ' + str(file.get('uncertified'))}"
    run = [trial for trial in about.get("trials", []) if trial["error"] is not None]
    if run:
        names = runtime_names(run)
        tokens = sum(trial["tokens"] for trial in run)
        yield f"- the folder: {tokens} tokens in {plural(len(run), 'case')} are as the program has them ({names})"
    yield f"- `{MANIFEST}` holds the plan, the proofs, and the hash of every file: `spinpass inspect . --check`"


def _console(command: str) -> str:
    return "```console\n$ " + command + "\n```"


def _command(settings: Mapping[str, Any] | None, model: str, about: Mapping[str, Any]) -> Iterator[str]:
    if settings is not None:
        yield _console(command_of(settings, model))
        versions = {name: number for name, number in about.get("versions", {}).items() if number != "not installed"}
        yield "\nwith " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."


def _run(loaded: LoadedModel, about: Mapping[str, Any], library: str) -> Iterator[str]:
    """How to get text out of it; nothing where there is no tokenizer, or no cache to decode with."""
    tokenizer = None if loaded.companions is None else loaded.companions.tokenizer
    cached = any("past" in name or "cache" in name for name in (about.get(library) or {}).get("inputs", ()))
    layout = about.get("layout") or {}
    if layout.get("name") == COMPRESSED_TENSORS:
        yield "A checkpoint of compressed-tensors in safetensors, which transformers reads with that package."
        if layout["transforms"]:
            yield _TRANSFORMED
    elif library == "transformers":
        kind = "GPTQ checkpoint" if (about.get("quantization") or {}).get("weights") else "checkpoint of transformers"
        yield f"A {kind} in safetensors: whatever reads those reads this one, without spinpass."
    elif tokenizer is not None and (cached or library == "executorch"):
        command = "chat ." if tokenizer.chat_template else f'generate . "{_PROMPT}"'
        yield _console(f"spinpass {command}") + "\n"
        decoder = _DECODERS.get(library)
        yield _PYTHON_DECODER.replace("DECODER", decoder) if decoder else _PYTHON_ORT
        if (about.get("genai") or {}).get("file"):
            yield '\nONNX Runtime GenAI reads the folder as it is: `onnxruntime_genai.Model(".")`.'


def _licence(papers: Papers) -> Iterator[str]:
    if papers.license or papers.texts:
        named = papers.license_name or papers.license
        yield f"That of the model: {named}." if named else "That of the model."
    if papers.texts:
        yield "Its texts lie beside this file: " + ", ".join(f"`{name}`" for name in sorted(papers.texts)) + "."
