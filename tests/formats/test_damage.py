"""Damage that a file shows by itself: every byte of archives, headers of the formats without checksums, hashes beside."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spinpass.errors import DamageError, VerificationError
from spinpass.formats import (
    GgufTensor,
    check_archive,
    check_checkpoint,
    check_companions,
    check_gguf,
    check_opened,
    check_recorded,
    check_safetensors,
    hashes,
    read_object,
    sealed,
)  # fmt: skip
from tests.support.damage import flips, members, saved, unnoticed, zipped

SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}


def refused(check: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(DamageError) as caught:
        check(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# -- archives ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive() -> bytes:
    return saved({"a": torch.arange(40.0), "b": {"c": torch.ones(3, dtype=torch.int8)}})


def test_each_byte_of_an_archive_counts_or_changes_nothing(archive: bytes, tmp_path: Path) -> None:
    path, whole, harmless = tmp_path / "x.bin", members(archive), 0
    path.write_bytes(archive)
    check_archive(path)
    value = torch.load(path, weights_only=True)
    for place, damaged, _ in unnoticed(path, archive, check_archive, len(archive)):
        harmless += 1
        assert members(damaged) == whole, place
        again = torch.load(path, weights_only=True)
        assert torch.equal(again["a"], value["a"]) and torch.equal(again["b"]["c"], value["b"]["c"]), place
    assert harmless < len(archive) // 2, "padding and times alone are harmless"


def test_an_archive_cut_short_or_with_more_behind(archive: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for wrong in (b"", archive[:10], archive[:-1], archive[: len(archive) // 2], archive + b"\0", b"#!" + archive):
        path.write_bytes(wrong)
        refused(check_archive, path)


def test_archives_as_python_writes_them_are_read(archive: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(members(archive)))
    check_archive(path)


def test_bombs_of_zip(archive: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(members(archive) | {"archive/data/9": bytes(1 << 24)}, zipfile.ZIP_DEFLATED))
    assert "compressed" in refused(check_archive, path)
    one = zipped({"a": bytes(1 << 16)})
    end = one.rindex(b"PK\5\6")
    entry = one[one.index(b"PK\1\2") : end]
    start = one.index(b"PK\1\2")  # the same bytes as three members
    many = b"".join(entry[:-1] + bytes([name]) for name in b"abc")
    path.write_bytes(one[:start] + many + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(many), start, 0))
    refused(check_archive, path)


# -- safetensors ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save_file({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(5, dtype=torch.float16)}, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_the_header_of_safetensors(tensors: bytes, tmp_path: Path) -> None:
    """A flip there is refused, or changes a name or the note of the writer alone; a changed name is a missing tensor."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensors)
    whole = check_safetensors(path)
    stop = 8 + int.from_bytes(tensors[:8], "little")
    for place, _, found in unnoticed(path, tensors, check_safetensors, stop, stop=stop):
        assert found == whole or found.keys() != whole.keys() or set(found.values()) != set(whole.values()), place
    for wrong in (tensors[:-1], tensors + b"\0", tensors[:4], b"\xff" * 8 + tensors[8:]):
        path.write_bytes(wrong)
        refused(check_safetensors, path)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', "twice"),
        ('{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}', "the file has 4"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "begins at"),
        ('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', "no size that fits"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', "no size that fits"),
        ('{"a":[]}', "no size that fits"),
        ("[]", "no table"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["twice", "huge", "overlap", "dtype", "negative", "entry", "list", "deep"],
)  # fmt: skip
def test_bombs_of_safetensors(header: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    assert why in refused(check_safetensors, path)


# -- GGUF -------------------------------------------------------------------------------------------------------------


def text(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def gguf(keys: list[bytes] | int = 0, tensors: list[bytes] | int = 0, data: bytes = b"") -> bytes:
    count = [part if isinstance(part, int) else len(part) for part in (tensors, keys)]
    body = b"".join(b"".join(part) for part in (keys, tensors) if not isinstance(part, int))
    head = b"GGUF" + struct.pack("<IQQ", 3, *count) + body
    return head + bytes(-len(head) % 32) + data


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


KEY = text("general.architecture") + struct.pack("<I", 8) + text("llama")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (gguf(tensors=1 << 60), "number of tensors claims"),
        (gguf(keys=1 << 60), "number of keys claims"),
        (gguf([struct.pack("<Q", 1 << 60)]), "claims"),
        (gguf([text("a") + struct.pack("<IIQ", 9, 8, 1 << 60)]), "claims"),
        (gguf([text("a") + struct.pack("<IIQ", 9, 12, 8)]), "in the middle of a"),
        (gguf([text("a") + struct.pack("<IIQ", 9, 9, 1)]), "array of type 9"),
        (gguf([text("a") + struct.pack("<I", 77)]), "value of type 77"),
        (gguf([KEY, KEY]), "twice"),
        (gguf([text("general.alignment") + struct.pack("<II", 4, 3)], [tensor("a", [1])], bytes(4)), "aligns"),
        (gguf([], [tensor("a", [1 << 40])], bytes(64)), "its tensors need"),
        (gguf([], [tensor("a", [8]), tensor("b", [8])], bytes(64)), "where 32 is expected"),
        (gguf([], [tensor("a", [8]), tensor("a", [8], offset=32)], bytes(64)), "stands there twice"),
        (gguf([], [tensor("a", [8], kind=99)], bytes(64)), "type 99"),
        (gguf([], [tensor("a", [8], kind=2)], bytes(64)), "blocks of 32"),
        (gguf([], [text("a") + struct.pack("<I", 1 << 30)], bytes(64)), "axes"),
        (b"GGUX" + bytes(64), "does not begin"),
        (b"GGUF" + bytes([9, 0, 0, 0]) + bytes(64), "version 9"),
        (b"GGUF", "in the middle"),
    ],
    ids=["tensors", "keys", "string", "array", "cut", "nested", "type", "twice", "align", "size", "gap", "name", "kind", "block",
         "axes", "magic", "version", "short"],
)  # fmt: skip
def test_bombs_of_gguf(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert why in refused(lambda p: check_gguf(p, SIZES), path)


def test_the_header_of_gguf(tmp_path: Path) -> None:
    """A flip there is refused, or is one of a name or a value; the padding counts for nothing."""
    path = tmp_path / "x.gguf"
    count = text("llama.block_count") + struct.pack("<II", 4, 2)
    data = gguf([KEY, count], [tensor("a", [8]), tensor("b", [4, 2], offset=32)], bytes(range(64)))
    path.write_bytes(data)
    whole = check_gguf(path, SIZES)
    assert whole.values == {"general.architecture": "llama", "llama.block_count": 2} and whole.little_endian
    first = data.index(bytes(range(64)))
    assert whole.tensors == {"a": GgufTensor(0, (8,), first, 32), "b": GgufTensor(0, (2, 4), first + 32, 32)}
    header = data.index(bytes(range(64)))
    undecided = 0
    for place, _, found in unnoticed(path, data, lambda p: check_gguf(p, SIZES), header, stop=header):
        named = found.values.keys() != whole.values.keys() or found.tensors.keys() != whole.tensors.keys()
        undecided += found == whole
        assert named or found != whole or place >= header - 32 or shape_alone(data, place), place
    assert undecided < 64
    path.write_bytes(data[:-1])
    refused(lambda p: check_gguf(p, SIZES), path)


def shape_alone(data: bytes, place: int) -> bool:
    """Say whether a place lies in the sizes of a tensor: of another shape, it is refused by the model's."""
    return place >= data.index(text("a"))


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[1]", "holds a list"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
    ],
    ids=["list", "nan", "twice", "deep", "utf8", "number", "empty"],
)
def test_bombs_of_json(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    assert why in refused(read_object, path)
    path.write_bytes(b'{"a": [Infinity, 1]}')
    assert read_object(path)["a"][1] == 1, "some configurations hold infinities"


# -- exported folders -------------------------------------------------------------------------------------------------


def exported(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """A folder with a manifest, and by member what opens it."""
    names = {"model.onnx": b"graph" * 40, "model.onnx.data": b"weights" * 99, "openvino_model.xml": b"<x/>", "openvino_model.bin": b"w" * 64,
             "model.pte": b"pte" * 50, "model.safetensors": b"st" * 40, "config.json": b"{}", "tokenizer.json": b'{"a": 1}'}  # fmt: skip
    for name, data in names.items():
        (folder / name).write_bytes(data)
    about = sealed({"model": "m", "files": hashes(folder, names), "error": float("nan"), "record": {"rotations": {}}})
    (folder / "spinpass.json").write_text(json.dumps(about, indent=2))
    opened = {"model.onnx": "model.onnx", "model.onnx.data": "model.onnx", "openvino_model.xml": "openvino_model.xml",
              "openvino_model.bin": "openvino_model.xml", "model.pte": "model.pte"}  # fmt: skip
    by_model = {name: (lambda f, m=model: check_opened(f / m)) for name, model in opened.items()}
    return by_model | {"model.safetensors": check_checkpoint, "config.json": check_companions, "tokenizer.json": check_companions}


def test_a_flip_in_each_member_of_an_exported_folder(tmp_path: Path) -> None:
    for name, opens in exported(tmp_path).items():
        opens(tmp_path)
        whole = (tmp_path / name).read_bytes()
        for place, damaged in flips(whole, 12):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(VerificationError, match=name):
                opens(tmp_path)
            with pytest.raises(VerificationError, match=name):
                check_checkpoint(tmp_path)
            assert place >= 0
        (tmp_path / name).unlink()
        with pytest.raises(VerificationError, match=f"lacks {name}"):
            opens(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_a_flip_in_the_manifest_itself(tmp_path: Path) -> None:
    exported(tmp_path)
    path = tmp_path / "spinpass.json"
    whole = path.read_bytes()
    told = json.loads(whole)
    for _, damaged, _ in unnoticed(path, whole, lambda _: check_checkpoint(tmp_path), len(whole)):
        assert json.loads(damaged) == told, "white space alone"


@pytest.mark.parametrize(
    "about",
    [{}, {"files": []}, {"files": {"a": 1}}, {"files": {"a": {"bytes": "1", "sha256": ""}}}, {"sha256": "00"}],
    ids=["empty", "list", "number", "strings", "digest"],
)  # fmt: skip
def test_a_manifest_that_is_none(about: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "spinpass.json"
    path.write_text(json.dumps(about))
    with pytest.raises(DamageError, match="spinpass.json"):
        check_checkpoint(tmp_path)
    if about.get("files"):
        path.write_text(json.dumps(sealed(about)))
        with pytest.raises(DamageError, match="no size and SHA-256"):
            check_checkpoint(tmp_path)


# -- hashes that others have recorded ---------------------------------------------------------------------------------


def git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def recorded(folder: Path, how: str, data: bytes) -> Path:
    """A file with a record of its hash, of one of the kinds that there are."""
    path, sha = folder / "model.safetensors", hashlib.sha256(data).hexdigest()
    if how.startswith("blob"):
        blob = folder / "blobs" / (sha if how == "blob" else git(data))
        blob.parent.mkdir()
        blob.write_bytes(data)
        path.symlink_to(blob)
        return path
    path.write_bytes(data)
    if how == "beside":
        (folder / "model.safetensors.sha256").write_text(f"{sha}\n")
    elif how == "sums":
        (folder / "SHA256SUMS").write_text(f"{'0' * 64}  other\n{sha}  ./model.safetensors\n")
    else:
        place = folder / ".cache/huggingface/download/model.safetensors.metadata"
        place.parent.mkdir(parents=True)
        place.write_text(f"{'a' * 40}\n{sha if how == 'download' else git(data)}\n{path.stat().st_mtime}\n")
    return path


@pytest.mark.parametrize("how", ["blob", "blob of git", "beside", "sums", "download", "download of git"])
def test_a_flip_anywhere_in_a_file_whose_hash_is_recorded(how: str, tmp_path: Path) -> None:
    data = bytes(range(200))
    path = recorded(tmp_path, how, data)
    assert check_recorded(path).sha256 == hashlib.sha256(data).hexdigest() and check_recorded(path).note is None
    when = path.stat().st_mtime
    for _, damaged in flips(data, 20):
        path.write_bytes(damaged)
        os.utime(path, (when, when))  # a disk does not write down what it breaks
        refused(check_recorded, path)


def test_a_file_that_was_written_after_its_download_is_noted(tmp_path: Path) -> None:
    path = recorded(tmp_path, "download", b"one")
    path.write_bytes(b"two")
    os.utime(path, (path.stat().st_mtime + 100,) * 2)
    assert "written since" in str(check_recorded(path).note)
    (tmp_path / ".cache/huggingface/download/model.safetensors.metadata").write_text("x")
    assert "cannot be read" in str(check_recorded(path).note)
