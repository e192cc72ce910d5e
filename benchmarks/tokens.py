"""Are the greedy tokens of every runtime those of transformers?  ``python -m benchmarks.tokens [--consumer PYTHON]``.

The model, rotated R1–R4 in float32, is exported for each runtime and continues the demo's prompts; what transformers
generates with the original model is what is expected. A runtime whose package is absent is skipped and says so.
``ORTModelForCausalLM`` needs transformers 4, so it runs in an environment of its own (``make consumer`` makes one), the
interpreter of which ``--consumer`` names. Exits with 1 where a token differs.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spinpass
from benchmarks.consumers.expected import answer, original_model
from spinpass.cli.screen import Screen
from spinpass.config import Form
from spinpass.exporters import cache_names
from spinpass.exporters import onnx as onnx_exporter
from spinpass.exporters.onnx import save_genai_config
from spinpass.folders import ANSWER_TOKENS, PROMPTS, packaged_model
from spinpass.loading import LoadedModel, load_model
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder, OrtModel

CONSUMERS = Path(__file__).parent / "consumers"
Answers = list[dict[str, Any]]
Generate = Callable[[list[int], int], list[int]]


@dataclass(frozen=True)
class Row:
    """How many answers of a runtime, and how many of their tokens, are those expected; or why it was skipped."""

    runtime: str
    answers: int = 0
    tokens: int = 0
    expected: int = 0
    skipped: str = ""


@dataclass(frozen=True)
class Case:
    """What the runtimes share."""

    model: Any
    loaded: LoadedModel
    config: spinpass.RotationConfig
    expected: Answers
    context: int
    folder: Path
    consumer: Path | None


def main(
    model: Annotated[str, typer.Option(help="Folder, hub name or GGUF file; the demo's model if none.")] = "",
    form: Annotated[Form, typer.Option(help="Of R1.")] = "auto",
    runtimes: Annotated[str, typer.Option(help="Separated by commas; all if none.")] = "",
    prompts: Annotated[int, typer.Option(help="How many of the demo's prompts.", min=1)] = len(PROMPTS),
    context: Annotated[int, typer.Option(help="Tokens that ExecuTorch's cache holds.")] = 256,
    consumer: Annotated[Path | None, typer.Option(help="Interpreter of an environment with optimum-onnx.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the exported models in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Generate with every runtime and compare."""
    torch.set_num_threads(1)
    chosen = [name.strip() for name in runtimes.split(",") if name.strip()] or list(RUNTIMES)
    unknown = sorted(set(chosen) - set(RUNTIMES))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(RUNTIMES)}", param_hint="--runtimes")
    screen = Screen(as_json=as_json)
    config = spinpass.RotationConfig(form=form)
    name = model or packaged_model()
    with screen.steps() as steps, TemporaryDirectory() as temporary:
        loaded = load_model(name, progress=steps.begin)
        steps.start("transformers")
        original, tokenizer = original_model(name)
        expected = [answer(original, tokenizer, prompt) for prompt in PROMPTS[:prompts]]
        case = Case(original, loaded, config, expected, context, out or Path(temporary), consumer)
        rows = [_row(runtime, case, steps) for runtime in chosen]
    if as_json:
        screen.document({"model": name, "config": config.to_dict(), "runtimes": [asdict(row) for row in rows]})
    screen.show(_table(rows, len(expected)))
    raise SystemExit(any(row.tokens != row.expected or row.answers != len(expected) for row in rows if not row.skipped))


def _row(runtime: str, case: Case, steps: Steps) -> Row:
    steps.start(runtime)
    package, generate = RUNTIMES[runtime]
    if find_spec(package) is None:
        return Row(runtime, skipped=f"{package} is not installed")
    return generate(runtime, case)


def _compared(runtime: str, case: Case, generate: Generate) -> Row:
    """Compare what ``generate`` returns for (token ids of the prompt, how many new tokens) with what is expected."""
    same = [(generate(a["ids"], len(a["tokens"])), a["tokens"]) for a in case.expected]
    tokens = sum(sum(x == y for x, y in zip(found, wanted)) for found, wanted in same)
    return Row(runtime, sum(a == b for a, b in same), tokens, sum(len(wanted) for _, wanted in same))


def _ort_folder(case: Case) -> Path:
    """Export the rotated model for ONNX Runtime, fused, with what lies beside it; once."""
    folder = case.folder / "ort"
    if not (folder / "model.onnx").is_file():
        program = spinpass.transform(case.loaded.program, case.config)
        onnx_exporter.export(program, folder, fuse=True, **cache_names(program))
        if case.loaded.companions is not None:
            case.loaded.companions.save(folder)
            save_genai_config(folder, case.loaded.companions.config, case.loaded.companions.generation_config)
    return folder


def _ort_decoder(runtime: str, case: Case) -> Row:
    decoder = OrtDecoder(_ort_folder(case), threads=1)
    return _compared(runtime, case, lambda ids, new: list(decoder.generate(ids, new).tokens))


def _ort_model(runtime: str, case: Case) -> Row:
    """Generate for all prompts in one call, padded on the left."""
    model = OrtModel.from_pretrained(_ort_folder(case), threads=1, generation_config={})
    longest = max(len(a["ids"]) for a in case.expected)
    padding = [longest - len(a["ids"]) for a in case.expected]
    ids = torch.tensor([[0] * pad + a["ids"] for pad, a in zip(padding, case.expected)])
    mask = torch.arange(longest)[None] >= torch.tensor(padding)[:, None]
    found = model.generate(ids, mask.long(), max_new_tokens=max(len(a["tokens"]) for a in case.expected))
    by_prompt = {tuple(a["ids"]): row[longest:].tolist() for a, row in zip(case.expected, found)}
    return _compared(runtime, case, lambda ids, new: by_prompt[tuple(ids)][:new])


def _genai(runtime: str, case: Case) -> Row:
    import onnxruntime_genai as og

    model = og.Model(str(_ort_folder(case)))
    end = min(_ends(case), default=0)

    def generate(ids: list[int], new: int) -> list[int]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + new, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        tokens: list[int] = generator.get_sequence(0)[len(ids) :].tolist()
        return tokens if len(tokens) == new else [*tokens, end]  # it stops at an end token and leaves it out

    return _compared(runtime, case, generate)


def _transformers_onnx(runtime: str, case: Case) -> Row:
    from transformers.exporters import OnnxConfig

    from spinpass.exporters.transformers import RotatedOnnxExporter, generate_exported

    exporter = RotatedOnnxExporter(rotation=case.config)
    inputs = {"input_ids": torch.tensor([case.expected[0]["ids"]])}
    exported = exporter.export_for_generation(case.model, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    return _compared(runtime, case, lambda ids, new: generate_exported(exported, ids, new, end=_ends(case)))


def _openvino(runtime: str, case: Case) -> Row:
    from spinpass.exporters import openvino
    from spinpass.runtime import CompiledModel, generate_openvino

    program = spinpass.transform(case.loaded.program, case.config)
    model = CompiledModel(openvino.export(program, case.folder / "openvino").path, threads=1)
    return _compared(runtime, case, lambda ids, new: generate_openvino(model, ids, new, end=_ends(case)))


def _executorch(runtime: str, case: Case) -> Row:
    from spinpass.exporters import executorch
    from spinpass.loading import export_static_cache
    from spinpass.runtime import PteDecoder

    program = spinpass.transform(export_static_cache(case.model, case.context), case.config)
    decoder = PteDecoder(executorch.export(program, case.folder / "executorch").path)
    return _compared(runtime, case, lambda ids, new: list(decoder.generate(ids, new, end=_ends(case)).tokens))


def _optimum(runtime: str, case: Case) -> Row:
    if case.consumer is None:
        return Row(runtime, skipped="no environment: --consumer names its interpreter")
    stated = case.folder / "expected.json"
    folder = _ort_folder(case)
    stated.write_text(json.dumps(case.expected), encoding="utf-8")
    command = [str(case.consumer), str(CONSUMERS / "optimum_onnx.py"), str(folder), str(stated)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [(int(a), int(b)) for a, b in re.findall(r"^(\d+) of (\d+) tokens equal", done.stdout, re.M)]
    if len(found) != len(case.expected):
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return Row(runtime, sum(a == b for a, b in found), sum(a for a, _ in found), sum(b for _, b in found))


def _ends(case: Case) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = case.model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


# the package that must be there, and what generates with it; an error of one that is there is an error
RUNTIMES: dict[str, tuple[str, Callable[[str, Case], Row]]] = {
    "OrtDecoder": ("onnxruntime", _ort_decoder),
    "OrtModel": ("onnxruntime", _ort_model),
    "GenAI": ("onnxruntime_genai", _genai),
    "ORTModelForCausalLM": ("onnxruntime", _optimum),
    "RotatedOnnxExporter": ("onnxruntime", _transformers_onnx),
    "OpenVINO": ("openvino", _openvino),
    "ExecuTorch": ("executorch", _executorch),
}


def _table(rows: list[Row], prompts: int) -> Table:
    table = Table("runtime", "answers equal", "tokens equal", title="Greedy tokens, rotated R1–R4, float32")
    for row in rows:
        told = (f"{row.answers} of {prompts}", f"{row.tokens} of {row.expected}")
        table.add_row(row.runtime, *((f"skipped: {row.skipped}", "") if row.skipped else told))
    table.caption = f"{prompts} prompts, up to {ANSWER_TOKENS} new tokens each"
    return table


if __name__ == "__main__":
    typer.run(main)
