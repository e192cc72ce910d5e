"""The face of the package: what it imports by itself, and what it imports when it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spinpass
from benchmarks.imports import ROOT, given_late, imports, reached

LATE = ("quantization", "learning", "learned", "formats", "folders", "loading", "exporters", "runtime", "evaluation", "cli")


def test_what_is_late_comes_when_it_is_asked_for() -> None:
    """Importing the package brings what rotates alone; asking it for a name brings the rest."""
    code = (
        "import sys, spinpass\n"
        f"print([m for m in {LATE} if 'spinpass.' + m in sys.modules])\n"
        "late = [n for n in spinpass.__all__ if n not in vars(spinpass)]\n"
        "assert all(n in dir(spinpass) for n in spinpass.__all__)\n"
        "assert all(getattr(spinpass, n) is getattr(spinpass, n) for n in late)\n"
        "print(sorted(late), 'spinpass.quantization' in sys.modules, all(n in vars(spinpass) for n in late))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == f"[]\n{sorted(given_late('spinpass'))} True True\n", done.stderr
    early = {name.split(".")[1] for name in reached("spinpass") if name.startswith("spinpass.")}
    assert not early & {*LATE}


def test_a_name_that_there_is_not_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'spinpass' has no attribute 'lern'"):
        spinpass.lern  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "code", ["from spinpass import learn\n", "import spinpass\n\n\ndef f():\n    spinpass.learn()\n", "import spinpass as s\ns.Learned\n"]
)
def test_who_asks_for_what_is_late_depends_on_it(tmp_path: Path, code: str) -> None:
    for name in ("__init__.py", "learned.py", "learning/__init__.py"):
        file = tmp_path / "spinpass" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((ROOT / "spinpass" / name).read_text(encoding="utf-8"), encoding="utf-8")
    asks, does_not = tmp_path / "benchmarks" / "asks.py", tmp_path / "benchmarks" / "does_not.py"
    asks.parent.mkdir()
    asks.write_text(code)
    does_not.write_text("import spinpass\nspinpass.plan\n")
    assert "spinpass.learned" in {made.module for made in imports(asks, tmp_path)}
    assert "spinpass.learned" in reached("benchmarks.asks", late=True, root=tmp_path)
    assert "spinpass.learned" not in reached("benchmarks.does_not", late=True, root=tmp_path)
