"""spinpass inside Olive, transformers and optimum, run as a user runs them:  ``python -m benchmarks.hosts``

Each host gets the same model folder and makes a 4-bit file of it: Olive by a workflow of ``SpinPass`` and
``SpinEvaluator``, optimum by its command line, both in a process of their own; transformers by its own exporter, to
nearest, and by spinpass's, rotated and by GPTQ. Every file is scored on the same windows of text beside the model
itself. Exits with 1 where a host fails, or a file scores far worse than the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from spinpass.cli.screen import Screen
from spinpass.evaluation import EvalRequest, library_docs, perplexity, token_ids, windows
from spinpass.exporters.transformers import MatMulNBitsQuantizer, RotatedOnnxExporter
from spinpass.progress import Silent

ROOT = Path(__file__).parents[1]
_LENGTH = 512
_CALIBRATING = 128  # tokens of a sample of GPTQ
_SAMPLES = 16
_WORSE = 1.5  # × the perplexity of the model: no file of four bits is further off
_NEAREST, _GPTQ = "w4g32-rtn-a8-head8-embed8", "w4g32-gptq-a8-head8-embed8"


@dataclass(frozen=True)
class Row:
    """What a host made: its size, how long that took, and its perplexity; or why there is none."""

    host: str
    megabytes: float = 0.0
    seconds: float = 0.0
    perplexity: float = 0.0
    failed: str = ""


@dataclass(frozen=True)
class Desk:
    """What every host works on: the model, a folder for what it writes, and how many windows are scored."""

    model: Path
    out: Path
    windows: int

    def run(self, *words: object) -> None:
        """Run Python as a user of the host would. Raises RuntimeError, with what was said last, where that fails."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        variables = os.environ | {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=self.out, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])

    def scored(self, model: Path) -> float:
        """Return the perplexity of a folder on Python's help texts."""
        return float(EvalRequest(str(model), windows=self.windows, length=_LENGTH).run(Silent()).main.value)


class _Prefill:
    """Scores with the prefill of what transformers' exporters export."""

    def __init__(self, exported: Any) -> None:
        self.runner, self.names = exported.runners["prefill"], exported.components["prefill"].metadata.kwargs
        self.cache = exported.config

    def logits(self, ids: Any) -> torch.Tensor:
        """Return the logits of every token, (tokens, vocabulary)."""
        from transformers import DynamicCache

        known = {
            "input_ids": torch.tensor([list(ids)]),
            "position_ids": torch.arange(len(ids))[None],
            "past_key_values": DynamicCache(config=self.cache),
        }
        found: torch.Tensor = self.runner(**{name: known[name] for name in self.names}).logits[0]
        return found


def main(
    hosts: Annotated[str, typer.Option(help="Of olive, transformers, optimum, separated by commas; all if none.")] = "",
    model: Annotated[
        Path | None, typer.Option(help="A model folder; a tiny model with random weights if none.")
    ] = None,
    windows: Annotated[int, typer.Option(help=f"Windows of {_LENGTH} tokens that are scored.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make a 4-bit file in every host and score it."""
    chosen = [name.strip() for name in hosts.split(",") if name.strip()] or list(_HOSTS)
    unknown = next((name for name in chosen if name not in _HOSTS), None)
    if unknown is not None:
        raise typer.BadParameter(f"{unknown!r} is not one of {', '.join(_HOSTS)}", param_hint="--hosts")
    screen = Screen(as_json=as_json)
    with TemporaryDirectory() as temporary:
        place = Path(temporary) / "a desk"  # whose name has a space
        place.mkdir()
        desk = Desk(model.resolve() if model else _tiny(place / "a model"), place, windows)
        rows = [Row("the model itself", perplexity=desk.scored(desk.model))]
        for name in chosen:
            for told, make in _HOSTS[name].items():
                rows.append(_row(told, make, desk))
                screen.note(f"{told}: {rows[-1].failed or 'done'}")
    bad = [row.host for row in rows if row.failed or row.perplexity > _WORSE * rows[0].perplexity]
    if as_json:
        screen.document({"rows": [asdict(row) for row in rows], "bad": bad})
    screen.show(_table(rows, windows))
    raise SystemExit(bool(bad))


def _row(host: str, make: Callable[[Desk], tuple[Path, float]], desk: Desk) -> Row:
    start = time.perf_counter()
    try:
        folder, found = make(desk)
    except Exception as error:  # whatever a host raises is what the table is about
        return Row(host, failed=f"{type(error).__name__}: {error}"[:300])
    size = sum(file.stat().st_size for file in folder.rglob("*.onnx*")) / 1e6
    return Row(host, round(size, 2), round(time.perf_counter() - start, 1), round(found, 2))


def _olive(desk: Desk) -> tuple[Path, float]:
    """Run a workflow; what its evaluator says of the model that goes in has to be what is said here."""
    scores = {"type": "SpinEvaluator", "user_script": "evaluator.py", "type_args": {"windows": desk.windows}}
    workflow = {
        "input_model": {"type": "HfModel", "model_path": str(desk.model)},
        "passes": {"spin": {"type": "SpinPass", "bits": 4, "recipe": "quick", "rotation": {"form": "online"}}},
        "evaluators": {"scores": scores},
        "evaluator": "scores",
        "evaluate_input_model": True,
        "output_dir": "olive out",
        "cache_dir": "olive cache",
    }
    (desk.out / "run.json").write_text(json.dumps(workflow), encoding="utf-8")
    (desk.out / "evaluator.py").write_text("import spinpass.hosts.olive\n", encoding="utf-8")
    desk.run("-m", "spinpass.hosts", "olive.json")
    desk.run("-m", "olive", "run", "--config", "run.json", "--package-config", "olive.json")
    folder = desk.out / "olive out"
    before, after = (
        json.loads((folder / name).read_text(encoding="utf-8"))["text-perplexity"]["value"]
        for name in ("input_model_metrics.json", "metrics.json")
    )
    if abs(before - desk.scored(desk.model)) > 1e-3 * before:
        raise RuntimeError(f"Olive's evaluator says {before} of the model itself")
    return folder, after


def _optimum(desk: Desk) -> tuple[Path, float]:
    start = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"
    given = ["-m", desk.model, "optimum out", "--bits", "4", "--recipe", "quick", "--form", "online"]
    desk.run("-c", start, "export", "spinpass", *given)
    folder = desk.out / "optimum out"
    return folder, desk.scored(folder)


def _transformers(exporter: Callable[[], Any], scheme: str, desk: Desk) -> tuple[Path, float]:
    """Export prefill and decode, save them, load them again, and score the prefill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.exporters import ExportedModel, OnnxConfig

    model = AutoModelForCausalLM.from_pretrained(desk.model, dtype=torch.float32).eval().requires_grad_(False)
    ids = token_ids(AutoTokenizer.from_pretrained(desk.model))(library_docs())
    calibrating = windows(ids[len(ids) // 2 :], _CALIBRATING, _SAMPLES)
    samples = [{"input_ids": torch.tensor([each])} for each in calibrating]
    config = OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=MatMulNBitsQuantizer(scheme, samples))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and transformers
        exported = exporter().export_for_generation(model, {"input_ids": torch.tensor([ids[:8], ids[8:16]])}, config)
    folder = desk.out / scheme
    exported.save_pretrained(folder)
    loaded = ExportedModel.from_pretrained(folder)
    return folder, perplexity(_Prefill(loaded), windows(ids, _LENGTH, desk.windows)).value


def _own_exporter() -> Any:
    from transformers.exporters import OnnxExporter

    return OnnxExporter()


_HOSTS: Mapping[str, Mapping[str, Callable[[Desk], tuple[Path, float]]]] = {
    "olive": {"Olive, SpinPass": _olive},
    "transformers": {
        f"transformers, RotatedOnnxExporter, {_GPTQ}": partial(_transformers, RotatedOnnxExporter, _GPTQ),
        f"transformers, OnnxExporter, {_NEAREST}": partial(_transformers, _own_exporter, _NEAREST),
    },
    "optimum": {"optimum-cli export spinpass": _optimum},
}
"""By name, what is made in a host and how."""


def _tiny(folder: Path) -> Path:
    from tests.support import folders

    return folders.model_folder(folder, hidden_size=64, intermediate_size=128, max_position_embeddings=_LENGTH)


def _table(rows: list[Row], count: int) -> Table:
    table = Table("host", "MB", "seconds", "perplexity", title="4-bit files made inside other tools")
    for row in rows:
        if row.failed:
            table.add_row(row.host, "", "", row.failed)
        else:
            table.add_row(
                row.host, *(f"{each:,.2f}" if each else "" for each in (row.megabytes, row.seconds, row.perplexity))
            )
    table.caption = f"{count} windows of {_LENGTH} tokens of Python's help texts"
    return table


if __name__ == "__main__":
    typer.run(main)
