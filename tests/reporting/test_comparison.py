"""Two reports beside each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinpass.errors import ConfigError
from spinpass.reporting import ComparedReports, Report, SavedReport, compare_reports, write_comparison
from spinpass.reporting.comparison import render_comparison
from tests.support import reports


def saved(folder: Path, name: str, report: Report) -> Path:
    path = folder / name
    path.write_text(json.dumps({"ok": True, "out": "report.html"} | report.to_dict()), encoding="utf-8")
    return path


def compared(folder: Path, change: Callable[[Report], Report]) -> ComparedReports:
    paths = saved(folder, "a.json", reports.deep()), saved(folder, "b.json", change(reports.deep()))
    return compare_reports(*map(SavedReport.read, paths))


def better(report: Report) -> Report:
    schemes = dict(report.schemes) | {"w4-rtn-a8": reports.scheme(1.9, 1.05)}
    del schemes["kv4"]
    return replace(report, schemes=schemes, origin=replace(report.origin, command="spinpass report tiny --form online"))


def test_what_is_read_is_what_was_measured(tmp_path: Path) -> None:
    report, found = reports.deep(), SavedReport.read(saved(tmp_path, "a.json", reports.deep()))
    assert found.ratio(("w4-rtn-a8", "rotated")) == pytest.approx(1.29) and found.ratio(
        ("int4", "file")
    ) == pytest.approx(1.04)
    assert found.scored["int4", "file"].speed == 31 and found.scored["w4-rtn-a8", "original"].bytes == 92_000_000
    assert found.errors["w4-rtn-a8"] == report.schemes["w4-rtn-a8"].rotated.errors and found.errors["kv4"] == {}


def test_the_better_one_is_named(tmp_path: Path) -> None:
    found = compared(tmp_path, better)
    assert found.verdict() == "w4-rtn-a8: b.json is better, with 1.05 × perplexity against 1.29 of a.json, at 92 MB."
    row = next(row for row in found.to_dict()["compared"] if (row["name"], row["program"]) == ("w4-rtn-a8", "rotated"))
    assert row["second_over_first"] == pytest.approx(1.05 / 1.29) and row["standard_error"] < 1e-3
    assert found.to_dict()["only"] == [[["kv4", "original"], ["kv4", "rotated"]], []]
    assert [each["what"] for each in found.to_dict()["differing"]] == ["command"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_page_has_both(tmp_path: Path) -> None:
    found = compared(tmp_path, better)
    write_comparison(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == render_comparison(found) and f"<h1>{found.verdict()}</h1>" in page
    assert "w4-rtn-a8, a.json: 1.29 × perplexity, 92 MB" in page and "w4-rtn-a8, b.json: 1.05 × perplexity" in page
    assert "Only in a.json: kv4." in page and "spinpass report tiny --form online" in page and "nan" not in page
    assert "<h3>w4g32-asym-gptq-a8-distill, rotated</h3>" in page


def test_equal_reports_are_not_told_apart(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda report: report)
    assert "3 windows do not tell the two apart: a.json has" in found.verdict() and found.differing() == []
    assert "What differs" not in render_comparison(found), "a section without a part is left out"


def test_other_texts_are_not_paired(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda r: replace(better(r), origin=replace(r.origin, text="another")))
    assert found.verdict().endswith("they scored different texts.") and found.change(found.common[0]) is None
    assert "second_over_first" not in found.to_dict()["compared"][0] and "scored different texts" in render_comparison(
        found
    )


def test_nothing_in_common(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda report: replace(report, schemes={}, files={}))
    assert found.verdict() == "The two reports have no scheme in common." and render_comparison(found)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    paths = saved(tmp_path, "a.json", reports.report()), saved(tmp_path / "new", "a.json", reports.report())
    assert compare_reports(*map(SavedReport.read, paths)).names == (str(paths[0]), str(paths[1]))
    with pytest.raises(ConfigError, match="is named twice: name two reports"):
        compare_reports(SavedReport.read(paths[0]), SavedReport.read(paths[0]))


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(reports.report().to_dict()))
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(spinpass="plan"), "a.json: this is no report of spinpass, but says that it is 'plan'"),
        (lambda d: d.update(version=2), "the report is of version 2, and this one reads 1: update spinpass"),
        (lambda d: d["origin"].pop("text"), "report.origin has no 'text'"),
        (
            lambda d: d["unquantized"]["before"].update(losses=["x"]),
            "report.unquantized.before.losses is not a list of numbers",
        ),
        (
            lambda d: d["unquantized"]["before"].update(losses=[1.0]),
            "report: unquantized, rotated has 3 windows, the original 1",
        ),
    ],
)
def test_what_is_no_report_is_refused(change: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(broken(change)), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        SavedReport.read(path)
    assert reason in str(refused.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="there is no file none.json: name what spinpass report --save wrote"):
        SavedReport.read(Path("none.json"))


def test_one_window_has_no_standard_error(tmp_path: Path) -> None:
    def cut(document: dict[str, Any]) -> None:
        for side in (
            document["unquantized"],
            *(s for x in document["schemes"].values() for s in (x["original"], x["rotated"])),
        ):
            for name in ("before", "after"):
                if name in side:
                    side[name]["losses"] = side[name]["losses"][:1]

    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(broken(cut)), encoding="utf-8")
    found = compare_reports(SavedReport.read(tmp_path / "a.json"), SavedReport.read(tmp_path / "b.json"))
    assert all(row["standard_error"] is None for row in found.to_dict()["compared"])
    assert "1 window do" in found.verdict() and not math.isnan(found.first.ratio(found.common[0]))
