"""What a release says of itself is one thing: version, citation, changelog, extras, forms, workflows, what is packed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import spinpass
from benchmarks.imports import ROOT

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="in Python since 3.11")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def script(name: str) -> Any:
    """A file of ``.ci``, as a module."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version() -> None:
    cited = read("CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"] and cited["authors"]
    assert str(cited["version"]) == spinpass.__version__
    assert cited["license"] == PROJECT["license"]
    assert all(each["title"] and each["authors"] and each["type"] for each in cited["references"])


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"(?m)^## (.+)$", text)
    assert sections[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", each) for each in sections[1:])
    assert set(re.findall(r"(?m)^### (.+)$", text)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_extra_is_told_and_checked() -> None:
    told = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert not [extra for extra in EXTRAS if not re.search(rf"(?m)^\|.*`{extra}`.*\|", told)]
    assert script("release").IMPORTS.keys() == EXTRAS.keys()


def test_all_leaves_out_what_users_do_not_need() -> None:
    (wanted,) = EXTRAS["all"]
    held = set(wanted[len("spinpass[") : -1].split(","))
    assert held == EXTRAS.keys() - {"all", "browser", "demo", "dev", "docs", "notebooks"}


def test_the_lowest_versions() -> None:
    lowest = script("lowest").lowest
    project = {"name": "p", "dependencies": ["a>=1"], "optional-dependencies": {"x": ["p[y]", "b-c>=2.0"], "y": ["a>=1.5"]}}
    assert lowest(project, ["x"]) == ["a==1", "b-c==2.0"]
    assert lowest(project, ["x", "y"]) == ["a==1.5", "b-c==2.0"]
    with pytest.raises(ValueError, match="d in pyproject.toml has no lower bound"):
        lowest({**project, "dependencies": ["d"]}, [])
    lowest(PROJECT, ["cli", "onnx", "transformers"])  # all of which have bounds


def test_what_is_packed_is_compared() -> None:
    assert script("release").misplaced({"a", "tests/b"}, {"a", "c"}) == ["+tests/b", "-c"]


def test_forms_ask_what_is_needed() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert {path.stem for path in forms} == {"config", "fault", "refusal", "wish"}
    for path in forms:
        form = read(str(path.relative_to(ROOT)))
        if path.stem == "config":
            continue
        assert form["name"] and form["description"]
        for part in form["body"]:
            assert part["type"] in ("input", "textarea") and part["attributes"]["label"], path.name
        assert any(part.get("validations", {}).get("required") for part in form["body"]), path.name
        named = [part["id"] for part in form["body"]]
        assert len(named) == len(set(named)), path.name


def test_workflows_run_what_is_run_here() -> None:
    flows = [read(str(path.relative_to(ROOT))) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))]
    steps = [step["run"] for flow in flows for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in steps
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in steps:
        found = re.fullmatch(r"\.ci/run|make ([a-z-]+)", step)
        assert found and (found[1] is None or re.search(rf"(?m)^{found[1]}:", makefile)), step


def test_links_of_the_papers_beside_the_code_lead_somewhere() -> None:
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        assert targets and not [target for target in targets if not (ROOT / target).exists()], name


def test_rows_of_packages_are_all_there_are() -> None:
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"`([\w.]+)`", re.search(r"(?s)\| row \| packages \|.*?\n\n", told).group()))  # type: ignore[union-attr]
    tracked = subprocess.run(["git", "ls-files", "spinpass"], cwd=ROOT, capture_output=True, text=True, check=True)
    parts = {Path(name).parts[1] for name in tracked.stdout.splitlines()}
    assert not parts - rows - {"__init__.py", "__main__.py", "py.typed"}
