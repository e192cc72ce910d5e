"""The way of a user through the zoo: what is recorded of a folder, and what COVERAGE.md says of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

import typer

from benchmarks.zoo import coverage, decoding, folder, folders, records, states
from benchmarks.zoo.models import build, model_types
from benchmarks.zoo.worker import Job
from spinpass.errors import ExportError, VerificationError
from tests.support.zoo_workers import record_of

WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size",
    "local_attention_window_len", "keep_window_size", "rel_extent", "index_block_size", "local_attention",
)  # fmt: skip


def made(name: str, status: str = states.GENERATES, **more: Any) -> dict[str, Any]:
    how_far = [states.WRITTEN, states.OPENS, states.GENERATES]
    reached = how_far[: how_far.index(status) + 1] if status in how_far else []
    return {
        "type": name, "variant": "folder", "status": status, "sources": records.sources(variant="folder"),
        **dict.fromkeys(reached, True), **more,
    }  # fmt: skip


def by_type(*found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["type"]: record for record in found}


WHY = "ExportError: out/zoo/folders/xlm/model keeps no cache from call to call: add --no-cache"
FOUND = by_type(
    made("llama"), made("llama@tied"), made("doge", states.OPENS, why="ExportError: TopK"),
    made("zaya", states.WRITTEN, why="no tokens"), made("xlm", states.REFUSED, why=WHY, left=[]),
)  # fmt: skip
DECODE = by_type(*({"type": n, "status": states.SAME} for n in ("llama", "doge", "xlm", "gpt2")))


# -- one type --------------------------------------------------------------------------------------------------------


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any) -> dict[str, Any]:
    monkeypatch.setattr(folder, "export", export)
    return folder.measure("llama", tmp_path, lambda step: None)


@pytest.mark.parametrize(("step", "status"), [("compare", states.REFUSED), ("onnx: translate", states.LATE)])
def test_a_refusal_counts_by_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, status: str
) -> None:
    def refuse(model: Path, out: Path, *, bits: int, steps: Any) -> None:
        steps.begin("load")
        steps.begin(step)
        raise ExportError("it has no operator")

    found = measured(tmp_path, monkeypatch, refuse)
    assert (found["status"], found["at"], found["left"]) == (status, step, [])
    assert found["why"] == "ExportError: it has no operator"


def test_what_a_refusal_leaves_on_the_disk_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(model: Path, out: Path, *, bits: int, steps: Any) -> None:
        out.mkdir()
        raise VerificationError("not equivalent")

    found = measured(tmp_path, monkeypatch, leave)
    assert found["left"] == ["folder"]
    assert records.is_failure({"variant": "folder", **found}, known=())
    assert not records.is_failure({"variant": "folder", **found, "left": []}, known=())


def test_another_error_is_one_that_nobody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Path, out: Path, *, bits: int, steps: Any) -> None:
        raise KeyError("position_ids")

    found = measured(tmp_path, monkeypatch, fail)
    assert found["status"] == states.UNTYPED and "KeyError" in found["why"] and "fail" in found["traceback"]


def test_wrong_logits_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: Path, out: Path, *, bits: int, steps: Any) -> None:
        changed = build("llama")[0]
        with torch.no_grad():
            changed.model.layers[1].mlp.down_proj.weight.mul_(1.2)
        changed.save_pretrained(tmp_path / "changed")
        real(tmp_path / "changed", out, bits=bits, certify=False)

    real = folder.export
    found = measured(tmp_path, monkeypatch, other)
    assert found["status"] == states.OPENS and found["opens"] and not found["generates"]
    assert "logits differ by" in found["why"]
    assert records.is_failure({"variant": "folder", **found}, known=())


def test_a_windowed_type_generates_past_its_window(tmp_path: Path) -> None:
    steps: list[str] = []
    found = folder.measure("mistral", tmp_path, steps.append)
    assert found["status"] == states.GENERATES, found
    assert found["written"] and found["opens"] and found["generates"]
    assert found["error"] < 1e-4 and found["judges"] == ["cache"]
    assert [s.split(" in ")[0] for s in steps if ":" not in s] == [
        "load", "export", "compare", "plan", "rotate", "certify", "try", "check the weights again", "open", "generate",
    ]  # fmt: skip


def test_the_worker_keeps_a_record_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(arch: str, place: Path, begin: Any) -> dict[str, Any]:
        (place / "model").mkdir()
        begin("load")
        return {"status": states.GENERATES}

    monkeypatch.setattr(folder, "measure", measure)
    job = Job("llama", "folder", tmp_path)
    found = record_of(job, monkeypatch)
    assert found["status"] == states.GENERATES and set(found["stages"]) == {"save", "load"}
    assert records.is_fresh(found) and not records.is_fresh(found | {"variant": "prefill"})
    assert not job.folder.exists()


def test_texts_begin_below_every_window_and_end_beyond() -> None:
    """Of the folders as of the loops of the programs."""
    begin, ends = folder.TEXTS[0][1], [length + new for _, length, new in folder.TEXTS]
    for name in model_types(switches=False):
        try:
            config = build(name)[0].config.get_text_config()
        except Exception:  # those that are not built
            continue
        sizes = [size for window in WINDOWS if isinstance(size := getattr(config, window, None), int) and size > 0]
        assert all(begin < size <= folder.LONGEST_WINDOW for size in sizes), name
    assert min(ends) > folder.LONGEST_WINDOW and decoding.PROMPT + decoding.STEPS > folder.LONGEST_WINDOW


# -- all of them -----------------------------------------------------------------------------------------------------


def test_the_counts_are_of_types_and_of_how_far_they_come() -> None:
    assert folders.counts(FOUND) == {"written": 3, "opens": 2, "generates": 1}
    assert folders.settled(FOUND, DECODE) == (2, 4)  # llama runs, xlm is refused, doge runs wrongly, gpt2 is missing
    assert folders.settled(FOUND | by_type(made("xlm", states.REFUSED, left=["folder"])), DECODE) == (1, 4)


def test_the_document_names_each_type_that_stops_and_why(tmp_path: Path) -> None:
    text = "\n".join(coverage.folder_section(FOUND, DECODE))
    assert "Of 4 types: 3 written, 2 opened, 1 generating past its window." in text
    assert "4 decode as a program; 2 of these run as a folder or are refused at once." in text
    assert "| xlm | refused | the model keeps no cache from call to call: add --no-cache |" in text
    assert "| zaya | written | no tokens |" in text and "| llama |" not in text
    assert "**1 of 1 records" in "\n".join(coverage.folder_section(by_type(made("gpt2", sources={})), {}))


def test_coverage_prints_the_counts(tmp_path: Path) -> None:
    for record in (*FOUND.values(), {**made("llama"), "variant": "prefill", "status": states.REFUSED, "runs": {}}):
        records.write(record, records.record_path(record["type"], record["variant"], tmp_path))
    app = typer.Typer()
    app.command()(coverage.main)
    to = tmp_path / "COVERAGE.md"
    ended = CliRunner().invoke(app, ["--out", str(tmp_path), "--to", str(to)])
    assert "3 written, 2 opened, 1 generating past its window" in ended.output.replace("\n", " ")
    assert ended.exit_code == 1 and "FAILED doge (folder): opens" in ended.output
    assert "## Folders" in to.read_text()
