"""What makes each row: the command that a user of the tool gives, on the same weights.

A row is ``TOOL:WAY``. ``spinpass:float`` is the model itself as an ONNX file, ``spinpass:4`` is ``--bits 4``,
``spinpass:4/plain`` the same with ``--recipe plain``; ``genai:k_quant`` is the model builder of ONNX Runtime GenAI in
int4 with that method, ``genai:rtn/128`` in blocks of 128, and ``genai:fp32`` what it makes without rounding;
``olive:gptq/32`` is Olive's GPTQ in groups of 32, then the builder; ``autoround:w4/32`` AutoRound's W4A16 in groups of
32, exported as GPTQ and given to the builder; ``llama:Q4_K_M`` llama.cpp's own quantizer. Olive and AutoRound leave a
head that is the token table to the builder, which rounds it to four bits, and with ``/head8`` to eight, as the
builder's own methods ``..._last`` do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

from benchmarks.llama_cpp import Worker

from .environments import Cost, Environments, PeerError, run
from .source import PIECES, Source

LENGTH = 512  # tokens of a calibration window
_BLOCK = 32
_KEYS = ("key", "value")
_HEAD8 = "algo_config=rtn_last"


@dataclass(frozen=True)
class Made:
    """A folder with ``model.onnx`` or a GGUF file, what it took, and what is to be said of it."""

    path: Path
    cost: Cost | None = None
    note: str = ""


@dataclass(frozen=True)
class Tuning:
    """What AutoRound trains with at each layer: how often, on how many windows at a time, and of how many in all."""

    iterations: int = 200
    batch: int = 8
    samples: int = PIECES


@dataclass(frozen=True)
class Workshop:
    """Where files are made: the weights, the tools, and llama.cpp's process, which is started when it is needed."""

    source: Source
    environments: Environments
    tuning: Tuning = Tuning()

    @cached_property
    def llama(self) -> Worker:
        """llama.cpp. Raises PeerError where it cannot be started."""
        try:
            return Worker(self.environments.python("llama"))
        except (SystemExit, typer.BadParameter) as error:
            raise PeerError(str(error)) from error


def make(row: str, folder: Path, shop: Workshop) -> Made:
    """Make the file of a row in ``folder``. Raises PeerError with what its tool said."""
    tool, _, way = row.partition(":")
    if tool not in MAKERS:
        raise PeerError(f"there is no tool {tool!r}: {', '.join(MAKERS)} are known")
    return MAKERS[tool](way, folder, shop)


def tool_of(row: str) -> str:
    """The name of the environment that a row needs; none for spinpass."""
    tool = row.partition(":")[0]
    return "" if tool == "spinpass" else tool


def _spinpass(way: str, folder: Path, shop: Workshop) -> Made:
    bits, _, recipe = way.partition("/")
    asked = ["--bits", "16", "--rotations", "none"] if bits == "float" else ["--bits", bits]
    asked += ["--recipe", recipe] if recipe else []
    out = folder / "onnx"
    command = [sys.executable, "-m", "spinpass", "export", str(shop.source.gguf), str(out), *asked]
    return Made(out, run(command, folder / "log.txt"), " ".join(asked))


def _genai(way: str, folder: Path, shop: Workshop) -> Made:
    method, _, block = way.partition("/")
    asked = [f"algo_config={method}", f"block_size={block or _BLOCK}", "accuracy_level=4"]
    precision, options = ("fp32", []) if method == "fp32" else ("int4", ["--extra_options", *asked])
    out = folder / "onnx"
    cost = _build(shop.environments.python("genai"), shop.source.folder, out, precision, options, folder / "log.txt")
    return Made(out, cost, " ".join([precision, *options[1:]]))


def _olive(way: str, folder: Path, shop: Workshop) -> Made:
    group, builder = _grouped(way, "gptq")
    config, out = folder / "olive.json", folder / "onnx"
    config.write_text(json.dumps(olive_config(shop.source, group, folder)), encoding="utf-8")
    olive = Path(shop.environments.python("olive")).with_name("olive")
    rounded = run([str(olive), "run", "--config", str(config)], folder / "rounding.txt")
    options = ["--extra_options", "disable_qkv_fusion=true", *builder]  # which asks for zero points, and there are none
    saved, genai = _saved(folder / "olive"), shop.environments.python("genai")
    built = _build(genai, saved, out, "int4", options, folder / "log.txt")
    asked = f"Gptq, {group} in a group, {PIECES} windows, then GenAI's int4"
    return Made(out, rounded + built, " ".join([asked, *options[1:]]))


def _grouped(way: str, method: str) -> tuple[int, list[str]]:
    """The group of ``METHOD/GROUP[/head8]``, and the options of the builder that follows."""
    asked, group, *more = [*way.split("/"), ""] if "/" not in way else way.split("/")
    if asked != method or not group.isdecimal() or more not in ([], ["head8"]):
        raise PeerError(f"there is no way {way!r} here: {method}/GROUP and {method}/GROUP/head8 are known")
    return int(group), [_HEAD8] if more else []


def olive_config(source: Source, group: int, folder: Path) -> dict[str, Any]:
    """What ``olive run`` reads: GPTQ on the text, symmetric.

    Its own pass for GenAI's builder knows an older one: it looks for a module that GenAI 0.18 does not have.
    """
    cut: dict[str, Any] = {"type": "text_generation_huggingface_pre_process", "strategy": "join", "text_cols": "text"}
    cut |= {"joiner": "\n", "max_seq_len": LENGTH, "max_samples": PIECES, "add_special_tokens": False}
    read = {"type": "huggingface_dataset", "data_name": "text", "split": "train", "data_files": [str(source.text)]}
    data = {"name": "text", "type": "HuggingfaceContainer", "load_dataset_config": read, "pre_process_data_config": cut}
    gptq = {"type": "Gptq", "bits": 4, "group_size": group, "sym": True, "data_config": "text"}
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    return {
        "input_model": {"type": "HfModel", "model_path": str(source.folder)},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "data_configs": [data],
        "passes": {"quantize": gptq},
        "host": "here",
        "target": "here",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "olive"),
    }


def _autoround(way: str, folder: Path, shop: Workshop) -> Made:
    group, builder = _grouped(way, "w4")
    tuned, out, tuning = folder / "tuned", folder / "onnx", shop.tuning
    options = {"model": shop.source.folder, "scheme": "W4A16", "group_size": group, "format": "auto_gptq"}
    options |= {"dataset": shop.source.windows, "nsamples": tuning.samples, "seqlen": LENGTH, "output_dir": tuned}
    options |= {"iters": tuning.iterations, "batch_size": tuning.batch, "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--disable_torch_compile", "--disable_amp"]  # on one thread of a CPU both take longer than they save
    trained = run([shop.environments.python("autoround"), "-m", "auto_round", *words], folder / "tuning.txt")
    more = ["--extra_options", *builder] if builder else []
    built = _build(shop.environments.python("genai"), _saved(tuned), out, "int4", more, folder / "log.txt")
    trained_on = f"{tuning.samples} windows, {tuning.iterations} × {tuning.batch}"
    asked = f"W4A16, {group} in a group, {trained_on}, then GenAI's int4"
    return Made(out, trained + built, " ".join([asked, *builder]))


def _saved(folder: Path) -> Path:
    """The folder of transformers somewhere in what a tool wrote. Raises PeerError where there is none."""
    found = next((path for path in sorted(folder.rglob("config.json")) if any(path.parent.glob("*.safetensors"))), None)
    if found is None:
        raise PeerError("the tool ended well and saved no model")
    return found.parent


def _build(python: str, model: Path, out: Path, precision: str, options: list[str], log: Path) -> Cost:
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out), "-p", precision]
    cost = run([*command, "-e", "cpu", "-c", str(out.with_name("cache")), *options], log)
    settled(out)
    return cost


def settled(folder: Path) -> Path:
    """Write the size of a head into the shapes of a cache that the builder leaves open. Nothing is computed with it.

    An open size says the same of an axis as an open length, and a cache has to be begun with some size.
    """
    import onnx

    size = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        if value.name.endswith(_KEYS) and axes and axes[-1].dim_param:
            axes[-1].dim_value = size
    onnx.save(model, path)
    return folder


def _llama(way: str, folder: Path, shop: Workshop) -> Made:
    target = folder / f"{way}.gguf"
    try:
        shop.llama.ask("requantize", source=str(shop.source.gguf), target=str(target), kind=way)
    except SystemExit as error:
        raise PeerError(str(error)) from error
    return Made(target)


MAKERS: Mapping[str, Callable[[str, Path, Workshop], Made]] = {
    "spinpass": _spinpass,
    "genai": _genai,
    "olive": _olive,
    "autoround": _autoround,
    "llama": _llama,
}
