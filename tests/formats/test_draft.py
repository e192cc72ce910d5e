"""A folder that is written whole: killed runs, two at once, links, folders that cannot change places."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spinpass.errors import ExportError
from spinpass.formats import PREFIX, drafted, finish
from spinpass.formats import draft as drafts
from tests.support import kills

ROOT = Path(__file__).parents[2]


def killed_runs(folder: Path, mode: str, repeats: int = 0, calls: str = "all") -> Any:
    command = [sys.executable, "-m", "tests.support.kills", str(folder), mode, str(repeats), calls]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_modes(found: dict[str, Any], least: int) -> None:
    assert found.keys() == set(kills.MODES)
    for mode, runs in found.items():
        assert runs["killed"] >= least and runs["wrong"] == [], mode


def test_a_run_killed_at_a_rename_or_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    found = killed_runs(tmp_path / "runs", ",".join((*kills.MODES, "random")), 3, calls="renames")
    assert found.pop("random") == {"killed": 3, "wrong": []}
    check_modes(found, 10)


@pytest.mark.slow
def test_runs_killed_at_every_call_that_changes_the_disk(tmp_path: Path) -> None:
    check_modes(killed_runs(tmp_path / "runs", ",".join(kills.MODES)), 60)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["random", "real"])
def test_runs_killed_at_twenty_random_moments(tmp_path: Path, mode: str) -> None:
    assert killed_runs(tmp_path / "runs", mode, 20)[mode] == {"killed": 20, "wrong": []}


def test_without_the_rest_of_the_renames_a_mixture_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runs above would find if nobody finished what a killed run has begun."""
    out = kills.prepared(tmp_path / "runs", "force")
    half_moved(out, monkeypatch)
    assert not (out / "model.pte").exists() and (out / "config.json").read_text() == "new config.json"
    assert kills.found(out) == "new"


def half_moved(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run into ``out`` that stops, as if killed, in front of the last rename of its files."""

    class Killed(BaseException):
        pass

    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == out / "model.pte":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace)
        kills.export(out, "new")


def test_whoever_may_not_write_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = kills.prepared(tmp_path / "runs", "force")
    half_moved(out, monkeypatch)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(ExportError, match="cut short while its files were moved there"):
        patch.setattr(os, "replace", refuse)
        finish(out)
    assert kills.found(out) == "new", "nothing was lost by trying"


def test_a_second_run_is_refused_while_one_is_at_work(tmp_path: Path) -> None:
    out = kills.prepared(tmp_path, "exchange")
    with drafted(out) as draft:
        (draft.folder / "a").write_text("a")
        with pytest.raises(ExportError, match=r"another run of spinpass is writing .*out: wait for it, or name another"):
            kills.export(out, "new")
    assert os.listdir(out) == ["a"] and os.listdir(tmp_path) == ["out"]


def many(out: Path, text: str) -> None:
    for number in range(8):
        try:
            kills.export(out, f"{text}{number}", pause=0.001)
        except ExportError as error:
            assert "another run" in str(error)


def test_runs_at_once_leave_one_of_them_whole(tmp_path: Path) -> None:
    out = kills.prepared(tmp_path / "work", "exchange")
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=many, args=(out, text)) for text in ("one", "two", "three")]
    for run in runs:
        run.start()
    while any(run.is_alive() for run in runs):
        folder = out.stat().st_ino
        here = {name for name in os.listdir(out) if not name.startswith(PREFIX)}
        changed = out.stat().st_ino != folder  # the old one, opened before and listed after, may be half deleted
        assert here == kills.NAMES or changed, "at every moment"
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert kills.found(out)[:3] in ("one", "two", "thr")
    assert os.listdir(out.parent) == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    out = kills.prepared(tmp_path / "far", "exchange")
    link = tmp_path / "link"
    link.symlink_to(out)
    kills.export(link, "new")
    assert link.is_symlink() and kills.found(out) == "new" and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("name", [".", "../out", "new/folder"])
def test_names_from_where_the_process_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out = kills.prepared(tmp_path, "exchange")
    monkeypatch.chdir(out)
    kills.export(Path(name), "new")
    assert kills.found(Path(name)) == "new"
    assert os.path.samefile(".", out), "whoever stands there still does"


def test_permissions_stay(tmp_path: Path) -> None:
    out = kills.prepared(tmp_path, "exchange")
    out.chmod(0o751)
    kills.export(out, "new")
    assert out.stat().st_mode & 0o777 == 0o751
    kills.export(tmp_path / "fresh", "new")
    os.umask(mask := os.umask(0))
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("reason", ["parent", "mount"])
def test_a_folder_beside_which_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    out = kills.prepared(tmp_path, "exchange")
    real = drafts.occupy

    def refuse(path: Path, **options: Any) -> Any:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    if reason == "parent":
        monkeypatch.setattr(drafts, "occupy", refuse)
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    before = out.stat().st_ino
    kills.export(out, "new")
    assert kills.found(out) == "new" and out.stat().st_ino == before
    assert set(os.listdir(out)) == kills.NAMES and os.listdir(tmp_path) == ["out"]


def test_what_an_earlier_version_left_is_removed(tmp_path: Path) -> None:
    out = kills.prepared(tmp_path, "exchange")
    (out / ".spinpass-ab12" / "replaced").mkdir(parents=True)
    (out / ".spinpass-ab12" / "model.pte").write_text("old")
    kills.export(out, "new")
    assert set(os.listdir(out)) == kills.NAMES


def test_a_body_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    out = kills.prepared(tmp_path, "exchange")
    for where in (out, tmp_path / "a" / "b"):
        with pytest.raises(ZeroDivisionError), drafted(where) as draft:
            (draft.folder / "model.pte").write_text("new")
            raise ZeroDivisionError
    assert kills.found(out) == "old" and os.listdir(tmp_path) == ["out"]


def test_messages_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as raised, drafted(tmp_path / "out") as draft:
        raise ExportError(f"{draft.folder / 'model.onnx'} is too large")
    assert str(raised.value) == f"{tmp_path / 'out' / 'model.onnx'} is too large"


@pytest.mark.parametrize("inner", ["new", "old", "commit", "lock"])
def test_links_in_what_looks_left_over_are_not_followed(tmp_path: Path, inner: str) -> None:
    out = kills.prepared(tmp_path / "work", "exchange")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("[]")
    left = out / ".spinpass-evil"
    for name in ("new", "old"):
        (left / name).mkdir(parents=True)
    (left / "commit").write_text('["../../elsewhere/secret", "config.json"]')
    if (left / inner).is_dir():
        (left / inner).rmdir()
    (left / inner).unlink(missing_ok=True)
    (left / inner).symlink_to(elsewhere if inner in ("new", "old") else elsewhere / "secret")
    with pytest.raises(ExportError, match="cut short"):
        finish(out)
    assert (elsewhere / "secret").read_text() == "[]" and os.listdir(elsewhere) == ["secret"]
