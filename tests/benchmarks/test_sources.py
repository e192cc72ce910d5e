"""Keys of kept results: they change with the code that a result depends on, and with no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.grid import key
from benchmarks.imports import ROOT, modules
from benchmarks.sources import depended_on, digest
from benchmarks.zoo import records

ADDED = "\nADDED = 1\n"
TOPS = ("spinpass", "benchmarks")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy to change."""
    for top in TOPS:
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def append(tree: Path, code: str, *files: str) -> None:
    for file in files:
        with (tree / file).open("a") as opened:
            opened.write(code)


def changed(tree: Path) -> set[str]:
    """The keys that are other ones than those of the original tree."""
    now, before = ({**records.sources(root=r), "accuracy": of_accuracy(r)} for r in (tree, ROOT))
    return {name for name in now if now[name] != before[name]}


def of_accuracy(root: Path) -> str:
    return key(SimpleNamespace(state_dict={}), [[1, 2]], root=root)  # type: ignore[arg-type]


def test_what_measures_nothing_changes_no_key(tree: Path) -> None:
    append(
        tree, ADDED, "spinpass/cli/app.py", "spinpass/cli/new.py", "spinpass/folders/export.py", "spinpass/__main__.py"
    )
    append(tree, ADDED, "spinpass/reporting/page.py", "benchmarks/accuracy.py", "benchmarks/zoo/sweep.py")
    assert changed(tree) == set()


def test_the_pass_changes_the_keys_of_both(tree: Path) -> None:
    append(tree, ADDED, "spinpass/passes/center.py")
    assert changed(tree) == {"pass", "accuracy"}


def test_a_module_that_the_pass_begins_to_import_counts(tree: Path) -> None:
    append(tree, ADDED, "spinpass/passes/new.py")
    append(tree, "\n\ndef late() -> None:\n    from .new import ADDED\n", "spinpass/passes/center.py")
    for module in ("benchmarks.zoo.measure", "benchmarks.grid"):
        assert tree / "spinpass" / "passes" / "new.py" in depended_on(module, TOPS, tree)


def test_words_about_the_code_change_no_key(tree: Path) -> None:
    file = tree / "spinpass" / "passes" / "center.py"
    text = file.read_text()
    assert text.startswith('"""Center')
    file.write_text(text.replace('"""Center', '"""Said otherwise: Center', 1) + "\n# a comment\n")
    assert changed(tree) == set()


ZOO = {"analysis", "certificate", "execution", "graph", "operators", "passes", "planning", "rotations",
       "config", "errors", "pipeline", "progress", "record", "values", "version"}  # fmt: skip
ACCURACY = ZOO | {"evaluation", "exporters", "formats", "learned", "learning", "loading", "quantization", "runtime", "tuning", "workers"}


@pytest.mark.parametrize(("module", "parts"), [("benchmarks.zoo.measure", ZOO), ("benchmarks.grid", ACCURACY)])
def test_a_key_has_the_parts_below_what_measures_and_no_other(module: str, parts: set[str]) -> None:
    files = {f.relative_to(ROOT / "spinpass") for f in depended_on(module, ("spinpass",))} - {Path("__init__.py")}
    assert {f.with_suffix("").parts[0] for f in files} == parts


def test_what_is_measured_how_and_on_what_are_apart() -> None:
    zoo = {name.removeprefix("benchmarks.zoo."): file for name, file in modules().items() if ".zoo." in name}
    measuring = {zoo[n] for n in ("decoding", "measure", "states", "structure")}
    assert measuring < set(depended_on("benchmarks.zoo.measure", ("benchmarks",)))
    building = {
        f for n, f in zoo.items() if n.startswith(("vision", "models", "overrides", "shrink", "export", "variants"))
    }
    assert building < set(depended_on("benchmarks.zoo.variants", ("benchmarks",)))
    assert not measuring & set(depended_on("benchmarks.zoo.variants", ("benchmarks",)))


def test_more_than_the_code_may_be_in_a_key() -> None:
    assert (
        len({digest("benchmarks.sources"), digest("benchmarks.sources", "1"), digest("benchmarks.sources", "2")}) == 3
    )
