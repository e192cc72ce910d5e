"""Bombs and flipped bytes in every file that a model is loaded from: nothing runs, nothing is allocated, no damage passes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spinpass.errors import SpinpassError
from spinpass.loading import load_model, models
from tests.support import folders
from tests.support.damage import Bomb, copied, flips, members, saved, zipped


class LoadedError(Exception):
    """The model as it was loaded, in place of its export, which takes seconds."""


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(model: Any, *rest: object) -> None:
        raise LoadedError(model)

    monkeypatch.setattr(models, "_exported", stop)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def pickled(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its weights in pytorch_model.bin."""
    from safetensors.torch import load_file

    folder = copied(plain, tmp_path_factory.mktemp("pickled") / "m")
    (folder / "pytorch_model.bin").write_bytes(saved(load_file(folder / "model.safetensors")))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.gguf_file(tmp_path_factory.mktemp("gguf") / "x.gguf").parent


def loaded(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors of the model that would be exported."""
    with pytest.raises(LoadedError) as caught:
        load_model(folder, **options)
    state: dict[str, torch.Tensor] = caught.value.args[0].state_dict()
    return state


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(SpinpassError) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def passes(folder: Path, name: str, whole: dict[str, torch.Tensor]) -> bool:
    """Load a damaged folder. Say whether it was; then its tensors are those of the undamaged one."""
    try:
        load_model(folder)
    except SpinpassError as error:
        assert "\n" not in str(error)
        return False
    except LoadedError as found:
        assert same(found.args[0].state_dict(), whole), name
        return True
    raise AssertionError("neither loaded nor refused")


# -- flips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "pickled", "gguf"])
def test_a_flip_in_each_member_whose_hash_is_recorded(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = copied(request.getfixturevalue(kind), tmp_path / "m")
    names = sorted(path.name for path in folder.iterdir())
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (folder / "SHA256SUMS").write_text("\n".join(sums))
    loaded(folder)
    for name in names:
        whole = (folder / name).read_bytes()
        for place, damaged in flips(whole, 8):
            (folder / name).write_bytes(damaged)
            assert name in refused(folder), place
        (folder / name).write_bytes(whole)


def test_a_flip_in_a_pickled_checkpoint(pickled: Path, tmp_path: Path) -> None:
    folder = copied(pickled, tmp_path / "m")
    whole, state = (folder / "pytorch_model.bin").read_bytes(), loaded(folder)
    passed = 0
    for place, damaged in flips(whole, 60):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        passed += passes(folder, f"byte {place}", state)
    assert passed < 12, "padding alone"


@pytest.mark.parametrize(("kind", "file"), [("plain", "model.safetensors"), ("gguf", "x.gguf")], ids=["safetensors", "gguf"])
def test_a_flip_in_a_header(kind: str, file: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = copied(request.getfixturevalue(kind), tmp_path / "m")
    whole, state = (folder / file).read_bytes(), loaded(folder)
    stop = 8 + int.from_bytes(whole[:8], "little") if file.endswith("safetensors") else whole.index(b"token_embd.weight") + 40
    for place, damaged in flips(whole, 40, stop=stop):
        (folder / file).write_bytes(damaged)
        passes(folder, f"byte {place}", state)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_letter_of_a_key(name: str, plain: Path, tmp_path: Path) -> None:
    """A known key with one letter changed is refused: it would be dropped, and a default taken."""
    folder = copied(plain, tmp_path / "m")
    text = (folder / name).read_text()
    for key in ("hidden_size", "rms_norm_eps", "num_key_value_heads") if name == "config.json" else ("eos_token_id",):
        for place in (0, len(key) // 2, len(key) - 1):
            (folder / name).write_text(text.replace(f'"{key}"', f'"{key[:place]}#{key[place + 1 :]}"'))
            assert f"'{key}' is meant" in refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_cut_short(name: str, plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "m")
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    assert name in refused(folder)


def test_a_tokenizer_that_cannot_be_made(plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "m")
    about = json.loads((folder / "tokenizer.json").read_text())
    about["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}
    (folder / "tokenizer.json").write_text(json.dumps(about))
    assert "its tokenizer cannot be loaded" in refused(folder)


# -- bombs ------------------------------------------------------------------------------------------------------------


def claimed(data: bytes, mark: Path) -> bytes:
    """A checkpoint whose pickle was exchanged for one that runs code."""
    import pickle

    found = members(data)
    name = next(name for name in found if name.endswith("data.pkl"))
    return zipped(found | {name: pickle.dumps({"a": Bomb(mark)}, 2)})


WEIGHTS: dict[str, Callable[[bytes, Path], bytes]] = {
    "pickle": lambda data, mark: saved({"a": Bomb(mark)}),
    "pickle in an archive": claimed,
    "older than archives": lambda data, mark: saved({"a": Bomb(mark)}, _use_new_zipfile_serialization=False),
    "bare pickle": lambda data, mark: __import__("pickle").dumps(Bomb(mark)),
    "compressed": lambda data, mark: zipped(members(data) | {"archive/data/x": bytes(1 << 22)}, zipfile.ZIP_DEFLATED),
    "no dictionary": lambda data, mark: saved([torch.ones(1)]),
    "expanded": lambda data, mark: saved({"a": torch.ones(1).expand(1 << 40)}),
    "empty": lambda data, mark: b"",
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_bomb_in_pickled_weights(kind: str, pickled: Path, tmp_path: Path) -> None:
    folder, mark = copied(pickled, tmp_path / "m"), tmp_path / "ran"
    path = folder / "pytorch_model.bin"
    path.write_bytes(WEIGHTS[kind](path.read_bytes(), mark))
    assert "pytorch_model.bin" in refused(folder) and not mark.exists()


CONFIG: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "table": {"vocab_size": 1 << 40},
    "width": {"intermediate_size": 1 << 40},
    "code": {"model_type": "own", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    "kernel": {"attn_implementation": "someone/kernel"},
    "kernel within": {"text_config": {"_attn_implementation": "someone/kernel"}},
    "weights": {"transformers_weights": "../evil.safetensors"},
}


@pytest.mark.parametrize("kind", CONFIG)
def test_a_bomb_in_config_json(kind: str, plain: Path, tmp_path: Path) -> None:
    folder, mark = copied(plain, tmp_path / "m"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CONFIG[kind]))
    refused(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", ["[1]", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a":' * 100_000], ids=["list", "nan", "twice", "deep"])
def test_a_bomb_of_json(name: str, data: str, plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "m")
    (folder / name).write_text(data)
    assert name in refused(folder)


def test_a_tokenizer_with_code_of_its_own(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not run, and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    folder, mark = copied(plain, tmp_path / "m"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nT = None\n")
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with contextlib.suppress(SpinpassError, LoadedError):
        load_model(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../../x.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "missing.safetensors"}},
        {"weight_map": ["a"]},
        {"weight_map": {"a": 1}},
        {},
    ],
    ids=["above", "absolute", "missing", "list", "number", "none"],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_leads_elsewhere(name: str, index: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / name).write_text(json.dumps(index))
    said = refused(folder)
    assert name in said


def test_a_gguf_file_that_claims_more_layers_than_it_holds(gguf: Path, tmp_path: Path) -> None:
    folder = copied(gguf, tmp_path / "m")
    data, key = bytearray((folder / "x.gguf").read_bytes()), b"llama.block_count"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = struct.pack("<I", 1 << 30)
    (folder / "x.gguf").write_bytes(data)
    assert "holds 20 tensors" in refused(folder)
    data[at : at + 4] = struct.pack("<I", 2)
    (folder / "x.gguf").write_bytes(bytes(data).replace(b"llama.rope.freq_base", b"llama.rope.freq_bash"))
    assert "llama.rope.freq_base' is meant" in refused(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(folder)
