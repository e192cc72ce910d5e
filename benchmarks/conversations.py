"""Batches and conversations: are they what transformers says of each row?  ``python -m benchmarks.conversations``

The demo's model and tiny ones of every kind of attention are rotated R1–R4 in float32 and exported as a user does. Each
runtime then continues five prompts: each alone, all in one padded batch (on the side that the runtime pads), and
in two turns. What transformers generates greedily with the original model, one row at a time and without a cache kept
between turns, is what is expected, token for token. Exits with 1 where one differs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.consumers.expected import original_model
from benchmarks.tiny_models import KINDS, save_tiny_model
from spinpass.cli.screen import Screen
from spinpass.folders import PROMPTS, export, packaged_model
from spinpass.progress import Steps
from spinpass.runtime import GENAI_CONFIG, Turns, continued

REAL = "SmolLM2-135M-Instruct"
_CONSUMER = Path(__file__).parent / "consumers" / "optimum_turns.py"
_LENGTHS = (3, 11, 7, 19, 5)  # of the prompts of tiny models
_RUNTIMES = ("onnxruntime", "OrtModel", "genai", "ORTModelForCausalLM")

Rows = list[list[int]]


@dataclass(frozen=True)
class Row:
    """How many tokens of a runtime are those expected, by kind of case; or why it was skipped."""

    model: str
    runtime: str
    alone: str = ""
    batch: str = ""
    turns: str = ""
    skipped: str = ""
    ok: bool = True


def main(
    models: Annotated[str, typer.Option(help=f"Separated by commas: {REAL}, {', '.join(KINDS)}; all if none.")] = "",
    new: Annotated[int, typer.Option(help="Tokens that follow each turn.")] = 32,
    consumer: Annotated[Path | None, typer.Option(help="Interpreter of an environment with optimum-onnx.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Generate with every runtime and compare."""
    torch.set_num_threads(1)
    chosen = [name.strip() for name in models.split(",") if name.strip()] or [*KINDS, REAL]
    unknown = sorted(set(chosen) - {REAL, *KINDS})
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {REAL}, {', '.join(KINDS)}", param_hint="--models")
    screen = Screen(as_json=as_json)
    rows: list[Row] = []
    with screen.steps() as steps:
        for name in chosen:
            with TemporaryDirectory() as temporary:
                rows += _rows(name, Path(temporary), new, consumer, steps)
    if as_json:
        screen.document({"new": new, "rows": [asdict(row) for row in rows]})
    screen.show(_table(rows, new))
    raise SystemExit(not all(row.ok for row in rows))


def _rows(name: str, place: Path, new: int, consumer: Path | None, steps: Steps) -> list[Row]:
    """Export a model and compare what every runtime makes of it."""
    steps.start(f"{name}: transformers")
    model, source, prompts = _model(name, place / "model")
    cases = _cases(prompts)
    expected = {case: _expected(model, turns, new, []) for case, turns in cases.items()}
    steps.start(f"{name}: export")
    folder = place / "folder"
    export(source, folder, bits=16)
    rows = []
    for runtime in _RUNTIMES:
        steps.start(f"{name}: {runtime}")
        skipped = _skipped(runtime, folder, consumer)
        if skipped:
            rows.append(Row(name, runtime, skipped=skipped))
            continue
        wanted = expected
        if runtime == "genai":  # which is kept from choosing end tokens, so that it goes on
            ends = model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            wanted = {case: _expected(model, turns, new, ends) for case, turns in cases.items()}
        rows.append(_row(name, runtime, wanted, _found(runtime, folder, cases, new, consumer), cases))
    return rows


def _model(name: str, folder: Path) -> tuple[Any, str, Rows]:
    """Return a model as transformers has it, what ``spinpass export`` is given, and the prompts."""
    if name == REAL:
        model, tokenizer = original_model(packaged_model())
        chats = ([{"role": "user", "content": prompt}] for prompt in PROMPTS)
        ids = [list(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats]
        return model, packaged_model(), ids
    model = save_tiny_model(name, folder)
    generator = torch.Generator().manual_seed(1)
    rows = model.config.get_text_config().vocab_size
    return model, str(folder), [torch.randint(3, rows, (n,), generator=generator).tolist() for n in _LENGTHS]


def _cases(prompts: Rows) -> dict[str, Turns]:
    alone: dict[str, Turns] = {f"alone {i}": [[prompt]] for i, prompt in enumerate(prompts)}
    turns: dict[str, Turns] = {
        f"turns {i}": [[prompt], [after]] for i, (prompt, after) in enumerate(pairwise(prompts))
    }
    return {**alone, "batch": [prompts], **turns}


def _expected(model: Any, turns: Turns, new: int, without: list[int]) -> Rows:
    """What transformers generates of every row alone, never choosing a token of ``without``."""
    rows: Rows = [[] for _ in turns[0]]
    for turn in turns:
        rows = [[*row, *more] for row, more in zip(rows, turn)]
        for index, row in enumerate(rows):
            with torch.inference_mode():
                made = model.generate(
                    torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64), do_sample=False,
                    max_new_tokens=new, eos_token_id=[-1], pad_token_id=0, suppress_tokens=without or None,
                )  # fmt: skip
            rows[index] = made[0].tolist()
    return rows


def _skipped(runtime: str, folder: Path, consumer: Path | None) -> str:
    if runtime == "ORTModelForCausalLM":
        return "" if consumer is not None else "no environment: --consumer names its interpreter"
    if runtime == "genai" and not (folder / GENAI_CONFIG).is_file():
        why = json.loads((folder / "spinpass.json").read_text(encoding="utf-8"))["genai"]
        return str(why["reason"])
    if runtime == "genai" and find_spec("onnxruntime_genai") is None:
        return "onnxruntime_genai is not installed"
    return ""


def _found(runtime: str, folder: Path, cases: Mapping[str, Turns], new: int, consumer: Path | None) -> dict[str, Rows]:
    if runtime != "ORTModelForCausalLM":
        answers = continued(folder, {runtime: cases}, new, 1)[runtime]
        return {case: answer.tokens for case, answer in answers.items()}
    stated = folder.parent / "cases.json"
    stated.write_text(json.dumps({"new": new, "cases": cases}), encoding="utf-8")
    command = [str(consumer), str(_CONSUMER), str(folder), str(stated)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Rows] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(
    name: str, runtime: str, expected: Mapping[str, Rows], found: Mapping[str, Rows], cases: Mapping[str, Turns]
) -> Row:
    """Count the equal tokens behind the prompts, by kind of case."""
    told: dict[str, str] = {}
    ok = True
    for kind in ("alone", "batch", "turns"):
        same = wanted = 0
        for case in (case for case in cases if case.startswith(kind)):
            for row, tokens in enumerate(expected[case]):
                prompt = len(cases[case][0][row])
                same += sum(a == b for a, b in zip(tokens[prompt:], found[case][row][prompt:]))
                wanted += len(tokens) - prompt
                ok = ok and tokens == found[case][row]
        told[kind] = f"{same} of {wanted}"
    return Row(name, runtime, **told, ok=ok)


def _table(rows: list[Row], new: int) -> Table:
    table = Table("model", "runtime", "alone", "padded batch", "two turns", title="Greedy tokens equal, float32")
    for row in rows:
        counts = (row.alone, row.batch, row.turns)
        table.add_row(row.model, row.runtime, *((row.skipped, "", "") if row.skipped else counts))
    table.caption = f"5 prompts, {new} tokens after each turn; GenAI pads on the right, the others on the left"
    return table


if __name__ == "__main__":
    typer.run(main)
