"""The sweep's own logic, without a model: staleness, failures, the table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.zoo import coverage, records, states, sweep, worker
from benchmarks.zoo.export import NotExported
from benchmarks.zoo.measure import status_of
from benchmarks.zoo.targets import targets
from benchmarks.zoo.worker import Job
from tests.support.zoo_workers import record_of


def run(status: str = states.SAME, **more: Any) -> dict[str, Any]:
    return {
        "status": status,
        "dtype": "float64",
        "error": 2e-15,
        "seconds": 0.25,
        "streams": [{"form": "offline", "parts": 0}],
        "covered": {"R2": 2, "R3": 1, "R4": 2},
        "refusals": [],
    } | more


def record(name: str = "llama", status: str = states.SAME, variant: str = "prefill", **runs: Any) -> dict[str, Any]:
    made = {"default": run(status), "untie": run(), "online": run()} | runs
    return {
        "type": name, "variant": variant, "status": status, "sources": records.sources(), "runs": made,
        "places": {"R2": 2, "R3": 2, "R4": 2},
    }  # fmt: skip


def unexported(name: str) -> dict[str, Any]:
    return {"type": name, "variant": "prefill", "status": states.NOT_EXPORTED, "why": "torch: it branches"}


def keep(out: Path, *found: dict[str, Any]) -> None:
    for made in found:
        records.write(made, records.record_path(made["type"], made["variant"], out))


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_is_written_whole_and_read_back(tmp_path: Path) -> None:
    keep(tmp_path, record("gpt2"), record("bert", variant="decode"))
    assert list(records.read_all("prefill", tmp_path)) == ["gpt2"]
    assert records.read(records.record_path("bert", "decode", tmp_path)) == record("bert", variant="decode")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    path = records.record_path("gpt2", "prefill", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text('{"type": ')
    assert records.read(path) is None and not records.is_fresh(None)


@pytest.mark.parametrize("changed", ["pass", "measuring", "building"])
def test_a_record_of_other_sources_is_stale(changed: str) -> None:
    fresh = record()
    assert records.is_fresh(fresh)
    assert not records.is_fresh(fresh | {"sources": fresh["sources"] | {changed: "0"}})
    assert not records.is_fresh(fresh | {"status": states.RUNNING})


@pytest.mark.parametrize("status", [states.CHANGED, states.UNTYPED, states.BROKEN, states.DIED])
def test_what_counts_as_a_failure(status: str) -> None:
    assert records.is_failure(record(status=status), known=())


def test_a_type_that_is_known_not_to_export_is_no_failure() -> None:
    assert not records.is_failure(record(status=states.REFUSED), known=())
    assert not records.is_failure(unexported("dbrx"), known=("dbrx",))
    assert records.is_failure(unexported("llama"), known=("dbrx",))
    assert not records.is_failure(unexported("llama") | {"variant": "decode"}, known=())


def test_the_worst_configuration_decides() -> None:
    assert status_of({"default": run(), "online": run(states.REFUSED)}) == states.SAME
    assert status_of({"default": run(states.REFUSED), "online": run()}) == states.REFUSED
    assert status_of({"default": run(), "online": run(states.CHANGED)}) == states.CHANGED
    assert status_of({"default": run(states.UNTYPED), "online": run(states.CHANGED)}) == states.CHANGED


# -- the sweep -------------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command("sweep")(sweep.main)
app.command("coverage")(coverage.main)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_fresh_records_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, record("llama"), record("gpt2") | {"sources": {"pass": "old"}})
    jobs: list[list[Job]] = []
    monkeypatch.setattr(sweep, "run", lambda todo, *_: jobs.append(todo))
    common = ("sweep", "--only", "llama,gpt2,bert", "--out", tmp_path)
    for flags in ((), ("--force",), ("--remeasure",)):
        invoke(*common, *flags)
    assert [[job.arch for job in todo] for todo in jobs] == [["gpt2", "bert"], *[["llama", "gpt2", "bert"]] * 2]
    assert (jobs[1][0].export, jobs[2][0].remeasure) == (True, True)


def test_a_changed_output_ends_the_sweep_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "run", lambda *_: None)
    keep(tmp_path, record("llama"))
    assert invoke("sweep", "--only", "llama", "--out", tmp_path).exit_code == 0
    why = "VerificationError: the programs are not equivalent"
    keep(tmp_path, record("gpt2", states.CHANGED, online=run(states.CHANGED, why=why)))
    ended = invoke("sweep", "--only", "llama,gpt2", "--out", tmp_path)
    assert ended.exit_code == 1
    assert "FAILED gpt2" in ended.output and "not equivalent" in ended.output
    document = json.loads(invoke("sweep", "--only", "llama,gpt2", "--out", tmp_path, "--json").stdout)
    assert document["ok"] is False and len(document["records"]) == 2


def test_unknown_types_and_variants_are_bad_usage(tmp_path: Path) -> None:
    assert "no type lama" in invoke("sweep", "--only", "lama", "--out", tmp_path).output
    assert invoke("sweep", "--variant", "eager", "--out", tmp_path).exit_code == 2


def test_workers_leave_records_whatever_becomes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(job: Job) -> None:
        keep(tmp_path, record(job.arch, states.RUNNING) | {"stage": "measure"})
        if job.arch == "bert":
            os.kill(os.getpid(), 9)
        keep(tmp_path, record(job.arch))

    monkeypatch.setattr(sweep, "work", work)
    monkeypatch.setattr(sweep, "warm_up", lambda: None)
    found: list[dict[str, Any]] = []
    sweep.run([Job(n, "prefill", tmp_path) for n in ("llama", "bert", "gpt2")], 2, lambda r, done: found.append(r))
    assert {r["type"]: r["status"] for r in found} == {
        "llama": states.SAME, "bert": states.DIED, "gpt2": states.SAME,
    }  # fmt: skip
    died = records.read(records.record_path("bert", "prefill", tmp_path))
    assert died is not None and died["why"] == "measure: signal SIGKILL"


def test_a_type_that_does_not_export_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arch: str, variant: str) -> None:
        raise NotExported(f"torch: {arch} branches")

    monkeypatch.setattr(worker, "export_variant", refuse)
    found = record_of(Job("dbrx", "prefill", tmp_path), monkeypatch)
    assert (found["status"], found["why"]) == (states.NOT_EXPORTED, "torch: dbrx branches")
    assert records.is_fresh(found)


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_summary_counts_types_not_switches() -> None:
    refused = record("bloom", states.REFUSED, default=run(states.REFUSED, streams=[], covered={}))
    found = {r["type"]: r for r in (record("llama"), record("llama@tied"), refused, unexported("dbrx"))}
    by_name = {t.what: t.measured for t in targets(found, {"gpt2": record("gpt2", variant="decode")})}
    assert by_name["same function"] == "1 of 3"
    assert by_name["R1 in place"] == "1 of 3"
    assert by_name["types with R2 at every attention whose value path has no barrier"] == "1 of 2 (50.0%)"
    assert by_name["types with R3 at every attention"] == "0 of 2 (0.0%)"
    assert by_name["decoding: same function"] == "1 of 1"
    assert by_name["transform, median"] == "0.25 s"


def test_purely_offline_is_judged_with_an_untied_table() -> None:
    kept = [{"form": "offline", "parts": 2}]
    tied = record("gpt2", default=run(streams=kept))
    assert coverage.stream(tied) == "offline + 2, untied: offline"
    assert coverage.stream(record("gpt2", default=run(streams=kept), untie=run(streams=kept))) == "offline + 2"
    online = [{"form": "online", "parts": 1}] * 5
    assert coverage.stream(record("olmo2", default=run(streams=online), untie=run(streams=online))) == "online 5"


def test_the_document_has_a_line_for_every_type(tmp_path: Path) -> None:
    refusal = {"what": "R3 at softmax_1", "why": "mul_19 multiplies channel by channel"}
    nothing = {"what": "R4", "why": "the program has no linear layer that reads a nonlinearity"}
    found = record("llama", default=run(refusals=[refusal, refusal | {"what": "R3 at softmax_2"}, nothing]))
    keep(tmp_path, found | {"places": {"R2": 2, "R3": 2, "R4": 0}}, record("llama@tied"), unexported("dbrx"))
    keep(tmp_path, record("gpt2", variant="decode", default=run(greedy={"tokens_equal": True})))
    to = tmp_path / "COVERAGE.md"
    assert invoke("coverage", "--out", tmp_path, "--to", to).exit_code == 0
    lines = to.read_text().splitlines()
    row = "| llama | offline | 2/2 | 1/2 | – | R3: … multiplies channel by channel (2×) | 2.0e-15 | float64 | 0.25 |"
    assert row in lines
    assert any(line.startswith("| llama@tied | offline |") for line in lines)
    assert "| dbrx | a Python loop over the experts that were hit |" in lines
    assert any("1 programs, 1 of the same function" in line and "equal in 1 of 1 runs" in line for line in lines)
    assert "## Failures" not in lines


def test_a_changed_output_stands_in_the_document_and_in_the_exit_code(tmp_path: Path) -> None:
    why = "VerificationError: not equivalent"
    keep(tmp_path, record("gpt2", states.CHANGED, default=run(states.CHANGED, why=why)))
    to = tmp_path / "COVERAGE.md"
    ended = invoke("coverage", "--out", tmp_path, "--to", to)
    assert ended.exit_code == 1 and "FAILED gpt2 (prefill): changed output" in ended.output
    text = to.read_text()
    assert "- gpt2 (prefill): changed output" in text
    assert "| gpt2 | **changed output** | 0/2 | 0/2 | 0/2 | VerificationError: not equivalent |" in text


def test_old_records_are_announced(tmp_path: Path) -> None:
    keep(tmp_path, record("llama") | {"sources": {"pass": "old"}}, record("gpt2"))
    assert "**1 of 2 records were measured with other sources" in coverage.document(
        {"prefill": records.read_all("prefill", tmp_path)}
    )


def test_without_records_there_is_nothing_to_write(tmp_path: Path) -> None:
    ended = invoke("coverage", "--out", tmp_path, "--to", tmp_path / "COVERAGE.md")
    assert ended.exit_code == 2 and not (tmp_path / "COVERAGE.md").exists()


@pytest.mark.parametrize(
    ("why", "shown"),
    [
        (
            "the residual stream needs 6 online parts (the first at mul_19: it multiplies channel by channel); "
            "rotated online at the linears' inputs instead",
            "6 online parts, it multiplies channel by channel",
        ),
        ("softmax_3 does not commute | with a rotation", "… does not commute \\| with a rotation"),
    ],
)
def test_reasons_are_shortened(why: str, shown: str) -> None:
    assert coverage.short(why) == shown
