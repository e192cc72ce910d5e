"""How exact the rotated programs are: ``python benchmarks/exactness.py``.

The first table is about SmolLM2-135M (its package, or ``--model``), exported with its KV cache and rotated by R1–R4. It
shows the largest change of a logit in float64 and float32, in the program and in ONNX Runtime, greedy text, and the
size of the files. The second table takes every tiny random-weight model of ``tests/support/models.py`` and rotates it
in both forms of R1.

With ``--transforms random`` it takes random matrices of what each space admits in place of Hadamards: on tiny models,
and on a sample of the types of transformers that a file names (``--types FILE --sample N``). It fails above 1e-9.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spinpass
from spinpass.cli.screen import Screen
from spinpass.exporters import onnx
from spinpass.folders import packaged_model
from spinpass.loading import load_model
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import random_transforms
from benchmarks.zoo.export import NotExported
from benchmarks.zoo.variants import NotBuilt, export_variant
from tests.support import models

PROMPTS = (
    "The capital of France is",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):",
    "Once upon a time there was a small robot that",
    "Three things to remember about compilers:",
)
NEW_TOKENS = 64
ROLES = ("R1", "R2", "R3", "R4")


def main(
    out: Annotated[Path, typer.Argument(help="Where the ONNX folders go.")] = Path("out/exactness"),
    model: Annotated[str, typer.Option(help="Another model than the packaged one.")] = "",
    form: Annotated[str, typer.Option(help="The form of R1.")] = "auto",
    tiny: Annotated[bool, typer.Option(help="The table of tiny models as well.")] = True,
    transforms: Annotated[str, typer.Option(help="random: no real model, matrices drawn from what is admitted.")] = "",
    types: Annotated[Path | None, typer.Option(help="A file that names types of transformers.")] = None,
    sample: Annotated[int, typer.Option(help="How many of them.")] = 24,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure exactness."""
    screen = Screen(as_json=as_json)
    if transforms:
        with screen.steps() as steps:
            drawn = random_rows(types, sample, tiny, steps)
        screen.document({"random": drawn}) if as_json else screen.show(random_transforms.table(drawn))
        raise typer.Exit(0 if drawn and all(row["ok"] for row in drawn) else 1)
    with screen.steps() as steps:
        real = real_model(model or packaged_model(), out, form, steps)
        rows = [row for name in models.NAMES for row in tiny_model(name, steps)] if tiny else []
    if as_json:
        screen.document({"model": real, "tiny": rows})
        return
    screen.show(table("The real model", ("what", "measured"), [(k, str(v)) for k, v in real.items()]))
    if rows:
        screen.show(tiny_table(rows))


def real_model(name: str, out: Path, form: str, steps: Steps) -> dict[str, Any]:
    """Rotate, certify, export and generate; returns what is shown, by its label."""
    loaded = load_model(name, progress=steps.begin)
    steps.start("rotate and certify")
    config = spinpass.RotationConfig(form=form, tied="keep", verify=True)  # type: ignore[arg-type]
    found = spinpass.rotate(loaded.program, config)
    rotated, plan = found.program, found.plan
    assert found.certificate is not None
    certificate = found.certificate.to_dict()
    logits = certificate["outputs"][0]
    reports, texts = {}, {}
    for label, program in (("original", loaded.program), ("rotated", rotated)):
        steps.start(f"write {label}")
        reports[label] = onnx.export(program, out / label, verify=True)
        assert loaded.companions is not None
        loaded.companions.save(out / label)
        steps.start(f"generate {label}")
        decoder = OrtDecoder(out / label)
        texts[label] = [decoder.generate(decoder.tokenizer(p)["input_ids"], NEW_TOKENS, end=()).tokens for p in PROMPTS]
    ort = reports["rotated"].certificate
    assert ort is not None
    equal = sum(a == b for a, b in zip(texts["original"], texts["rotated"], strict=True))
    return {
        "rotations": {role: sum(s.role == role for s in plan.spaces) for role in ROLES},
        "max |Δlogit| float64, lifted": logits["float64"]["error"],
        "max |Δlogit| float32": logits["native"]["error"],
        "argmax agreement": logits["native"]["argmax"],
        "verdict": certificate["verdict"],
        "closed loop": certificate["closed_loop"],
        "ONNX Runtime against the program": ort.verdict,
        "max |Δlogit| ONNX Runtime": ort.outputs[0].difference.error,
        "prompts with identical greedy text": f"{equal} of {len(PROMPTS)} × {NEW_TOKENS} tokens",
        "file size, rotated ÷ original": reports["rotated"].bytes / reports["original"].bytes,
        "Hadamards in the graph": reports["rotated"].hadamards,
    }


def tiny_model(name: str, steps: Steps) -> list[dict[str, Any]]:
    """Rotate one tiny float64 model with R1 in both forms; returns a row for each."""
    tick = steps.start(f"tiny {name}")
    program = models.export_plain(models.build(name, dtype=torch.float64), models.sample_inputs(name))
    rows = []
    for form in ("offline", "online"):
        config = spinpass.RotationConfig(form=form, verify=False)  # type: ignore[arg-type]
        plan = spinpass.plan(program, config)
        certificate = spinpass.verify(program, spinpass.transform(program, plan=plan))
        rows.append(
            {
                "model": name,
                "form": form,
                "error": max(o.float64.relative for o in certificate.outputs),
                "ok": certificate.ok,
                "spaces": {role: sum(s.role == role for s in plan.spaces) for role in ROLES},
                "online": sum(len(s.online) for s in plan.spaces),
                "refused": [str(r) for r in plan.refusals],
            }
        )
    tick(1, 1)
    return rows


def random_rows(types: Path | None, sample: int, tiny: bool, steps: Steps) -> list[dict[str, Any]]:
    """Transform programs by random matrices of what they admit, in both forms of R1; returns a row for each."""
    rows: list[dict[str, Any]] = []
    for name in models.NAMES if tiny else ():
        steps.start(f"tiny {name}")
        program = models.export_plain(models.build(name, dtype=torch.float64), models.sample_inputs(name))
        rows += [random_transforms.measured(name, program, form) for form in ("offline", "online")]
    for name in random_transforms.types_of(types, sample) if types else ():
        steps.start(f"type {name}")
        try:
            program = export_variant(name, "prefill").program
        except (NotBuilt, NotExported):
            continue  # what transformers cannot make, or torch cannot export, shows nothing
        rows += [random_transforms.measured(name, program, form) for form in ("offline", "online")]
    return rows


def tiny_table(rows: list[dict[str, Any]]) -> Table:
    cells = [
        (
            r["model"],
            r["form"],
            " ".join(f"{k}×{v}" for k, v in r["spaces"].items() if v),
            str(r["online"]),
            f"{r['error']:.1e}" + ("" if r["ok"] else " FAIL"),
            "; ".join(r["refused"]) or "–",
        )
        for r in rows
    ]
    return table(
        "Tiny models, every parameter random, float64",
        ("model", "R1", "spaces", "online", "relative error", "refused"),
        cells,
    )


def table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    made = Table(*head, title=title, title_justify="left")
    for row in rows:
        made.add_row(*row)
    return made


if __name__ == "__main__":
    typer.run(main)
