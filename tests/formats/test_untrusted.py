"""Nothing in a .pt2 file runs when it is read, and no damage passes."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spinpass.errors import ExportError
from spinpass.formats import load_program, save_program
from spinpass.formats.untrusted import _is_expression, _is_guard, check_members
from tests.support import programs
from tests.support.commands import run

RAN: list[str] = []


def ran(where: str) -> tuple[()]:
    RAN.append(where)
    return ()


class Bomb:
    def __reduce__(self) -> Any:
        return ran, ("pickle",)


class Touch:
    """The classic: a call of the operating system."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "plain.pt2"
    sizes = {"x": {0: torch.export.Dim("n", min=3, max=64)}}
    save_program(torch.export.export(Sized(), (torch.randn(4, 8),), dynamic_shapes=sizes), path)
    return path


class Sized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(torch.cat([x, x]))
        return y.reshape(2 * x.shape[0] * 8)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(source: Path, target: Path, changed: dict[str, bytes]) -> Path:
    """Write the archive anew, with other members in place of those whose names end so, or beside them."""
    found = members(source)
    for end, data in changed.items():
        name = next((n for n in found if n.endswith(end)), next(iter(found)).split("/")[0] + "/" + end)
        found[name] = data
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in found.items():
            archive.writestr(name, data)
    return target


def saved(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def refused(path: Path) -> str:
    RAN.clear()
    with pytest.raises(ExportError) as caught:
        load_program(path)
    assert not RAN and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_torch_writes_is_read(plain: Path, tmp_path: Path) -> None:
    assert check_members(plain) == []
    assert load_program(rewritten(plain, tmp_path / "same.pt2", {})).state_dict
    save_program(programs.program("llama_tied", "cache"), tmp_path / "cache.pt2")
    assert {each.__name__ for each in check_members(tmp_path / "cache.pt2")} == {"DynamicCache", "DynamicLayer"}


@pytest.mark.parametrize("bomb", [Bomb(), Touch(), ((Bomb(),), {}), {"a": [Touch()]}], ids=["one", "system", "nested", "keyed"])
def test_a_bomb_among_the_example_inputs(plain: Path, tmp_path: Path, bomb: object) -> None:
    path = rewritten(plain, tmp_path / "x.pt2", {"sample_inputs/model.pt": saved(bomb)})
    assert "sample_inputs/model.pt" in (said := refused(path)) and "can run code when it is read" in said
    result = run("plan", path)
    assert result.exit_code != 0 and not RAN


def test_a_pickle_that_is_no_checkpoint(plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "x.pt2", {"sample_inputs/model.pt": pickle.dumps(Bomb())})
    assert "is no checkpoint of torch" in refused(path)


def test_a_name_that_looks_like_a_cache(plain: Path, tmp_path: Path) -> None:
    for code in (
        b"\x80\x04\x8c\x18transformers.cache_utils\x8c\x0ftorch.os.system\x93\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c\x04true\x85R.",
        b"ctransformers.utils\ncached_file\n(S'x'\nS'y'\ntR.",
    ):
        sink = io.BytesIO()
        torch.save((), sink)
        inner = {n.replace("archive/", ""): d for n, d in members_of(sink.getvalue()).items()}
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, data in inner.items():
                archive.writestr(f"archive/{name}", code if name == "data.pkl" else data)
        path = rewritten(plain, tmp_path / "x.pt2", {"sample_inputs/model.pt": made.getvalue()})
        refused(path)


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_a_bomb_in_place_of_a_weight(plain: Path, tmp_path: Path, kind: str) -> None:
    end = f"{kind}/model_{kind}_config.json"
    config = json.loads(next(data for name, data in members(plain).items() if name.endswith(end)))
    config["config"]["evil"] = {"path_name": "tensor_9", "is_param": False, "use_pickle": True, "tensor_meta": None}
    changed = {end: json.dumps(config).encode(), f"data/{kind}/tensor_9": saved(Bomb())}
    assert f"data/{kind}/tensor_9" in refused(rewritten(plain, tmp_path / "x.pt2", changed))


@pytest.mark.parametrize("name", ["data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/x.so"])
def test_objects_and_libraries(plain: Path, tmp_path: Path, name: str) -> None:
    assert name in refused(rewritten(plain, tmp_path / "x.pt2", {name: pickle.dumps(Bomb())}))


def with_expression(plain: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    end = "models/model.json"
    document = json.loads(next(data for name, data in members(plain).items() if name.endswith(end)))
    edit(document)
    return rewritten(plain, target, {end: json.dumps(document).encode()})


def sizes_of(document: Any) -> list[dict[str, Any]]:
    found, todo = [], [document]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            found += [value] if "expr_str" in value else []
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return found


EVIL = [
    "__import__('os').system('true')",
    "eval(chr(95)+chr(95))",
    "Integer(1).__class__",
    "lambdify((), 'import os')",
    "Add('__import__(1)')",
    "sympify('x')",
    "(lambda: 1)()",
    "[x for x in (1,)]",
    "Symbol('a b')",
    "open(3)",
    "breakpoint()",
    "Integer",
    "1 +",
]


@pytest.mark.parametrize("text", [e for e in EVIL if e != "Integer"])
def test_a_size_that_is_code(plain: Path, tmp_path: Path, text: str) -> None:
    assert not _is_expression(text)

    def edit(document: Any) -> None:
        sizes = sizes_of(document)
        assert sizes
        sizes[0]["expr_str"] = text

    assert "for a size, which can run code" in refused(with_expression(plain, tmp_path / "x.pt2", edit))


@pytest.mark.parametrize(
    "text",
    ["s0", "2*s0 + 1", "Mul(Integer(2), Symbol('s1', positive=True, integer=True))", "FloorDiv(s0, 2)", "Max(1, s0)", "-s0", "s0 <= 4"],
)
def test_a_size_that_is_one(text: str) -> None:
    assert _is_expression(text)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("L['x'].size()[0] == L['y'][0].size()[1]", True),
        ("L['x'].size()[0] <= 64", True),
        ("torch.sym_max(L['x'].size()[0], 2) > 1", True),
        ("__import__('os').system('true')", False),
        ("torch.os.system('true')", False),
        ("L['x'].__class__", False),
        ("exec('1')", False),
        ("[y for y in L['x']]", False),
        ("1 if", False),
    ],
)
def test_guards(text: str, fine: bool, plain: Path, tmp_path: Path) -> None:
    assert _is_guard(text) is fine
    if not fine:
        path = with_expression(plain, tmp_path / "x.pt2", lambda document: document.update(guards_code=[text]))
        assert "for a guard, which can run code" in refused(path)


def test_a_flipped_byte_in_each_member(plain: Path, tmp_path: Path) -> None:
    whole = plain.read_bytes()
    with zipfile.ZipFile(plain) as archive:
        found = [(info.filename, info.header_offset, info.file_size) for info in archive.infolist()]
    assert any("weights" in name for name, *_ in found)
    for name, at, size in found:
        extra = int.from_bytes(whole[at + 26 : at + 28], "little") + int.from_bytes(whole[at + 28 : at + 30], "little")
        start = at + 30 + extra
        damaged = bytearray(whole)
        damaged[start + size // 2] ^= 0x10
        (tmp_path / "x.pt2").write_bytes(damaged)
        assert "is damaged" in refused(tmp_path / "x.pt2"), name


def test_a_member_that_stands_there_twice(plain: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in members(plain).items():
            archive.writestr(name, data)
            if name.endswith("sample_inputs/model.pt"):
                archive.writestr(name, saved(Bomb()))
    assert "twice" in refused(tmp_path / "x.pt2")
