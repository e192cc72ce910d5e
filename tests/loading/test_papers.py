"""The licence of a source, wherever it names one, and nothing that a stranger could smuggle in with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from spinpass.formats import is_for_people
from spinpass.loading import Papers, Source, papers, papers_of


def of(folder: Path, card: str = "", **files: str) -> Papers:
    folder.mkdir(exist_ok=True)
    if card:
        (folder / "README.md").write_text(card)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return papers_of(Source("transformers", str(folder)), transformers)


@pytest.mark.parametrize(
    ("card", "license", "name", "link"),
    [
        ("---\nlicense: mit\n---\n", "mit", "", ""),
        ("---\ntags:\n- a\nlicense:\n- apache-2.0\n---\n", "apache-2.0", "", ""),
        (
            "---\nlicense: 'other'\nlicense_name: \"their-own\"\nlicense_link: https://example.com/a/LICENSE\n---\n",
            "other",
            "their-own",
            "https://example.com/a/LICENSE",
        ),
        ("---\nlicense: other\nlicense_link: LICENSE.txt\n---\n", "other", "", "LICENSE.txt"),
        ("license: mit\n", "", "", ""),
        ("---\nlicense: mit\n", "", "", ""),
        ("# Text\n---\nlicense: mit\n---\n", "", "", ""),
        ("---\n  license: mit\n---\n", "", "", ""),
        ("---\nlicense: mit # or not\nlicense_link: javascript:alert(1)\n---\n", "", "", ""),
        ("---\nlicense: [a, b]\nlicense_name: a: b\n---\n", "", "", ""),
    ],
)
def test_the_front_matter_of_a_card(tmp_path: Path, card: str, license: str, name: str, link: str) -> None:
    assert of(tmp_path / "model", card) == Papers(license, name, link)


def test_texts_go_with_the_model_and_others_do_not(tmp_path: Path) -> None:
    found = of(
        tmp_path / "model",
        LICENSE="a",
        NOTICE__txt="b",
        license__md="c",
        LICENSE__json="{}",
        LICENSED="d",
        notes__md="e",
    )
    assert dict(found.texts) == {"LICENSE": b"a", "NOTICE.txt": b"b", "license.md": b"c"}
    big = tmp_path / "model" / "LICENSE"
    big.write_bytes(b"x" * (papers._LARGEST + 1))
    assert "LICENSE" not in of(tmp_path / "model").texts


def test_a_link_out_of_the_folder_is_not_followed_but_into_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "model" / "LICENSE")
    assert not of(tmp_path / "model").texts
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    (cache / "blobs" / "f00").write_text("theirs")
    os.symlink("../../blobs/f00", cache / "snapshots" / "1" / "LICENSE")
    assert dict(of(cache / "snapshots" / "1").texts) == {"LICENSE": b"theirs"}


def test_a_name_on_the_hub_is_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "NOTICE").write_text("n")

    def found(module: Any, location: str, name: str) -> Path | None:
        return path if location == "org/name" and (path := tmp_path / name).is_file() else None

    monkeypatch.setattr(papers, "find_file", found)
    told = papers_of(Source("transformers", "org/name"), transformers)
    assert told == Papers("mit", base_model="org/name", texts={"NOTICE": b"n"})


def test_what_a_gguf_file_says(tmp_path: Path) -> None:
    import gguf

    def written(name: str, **keys: str) -> Papers:
        path = tmp_path / name
        writer = gguf.GGUFWriter(str(path), "llama")
        for key, value in keys.items():
            writer.add_string(f"general.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return papers_of(Source("gguf", str(tmp_path), name), transformers)

    (tmp_path / "LICENSE").write_text("beside")
    url = "base_model.0.repo_url"
    told = written("a.gguf", license="apache-2.0", **{url: "https://huggingface.co/org/name"})
    assert told == Papers("apache-2.0", base_model="org/name", texts={"LICENSE": b"beside"})
    wrong = written("b.gguf", license="no: [word", **{url: "/home/me/model"})
    assert wrong == Papers(), "and LICENSE may be of the other model there"
    assert papers_of(Source("program", "x.pt2"), transformers) == Papers()


def test_what_is_for_people() -> None:
    mine = ("README.md", "LICENSE", "LICENCE.txt", "license-2.0.md", "NOTICE", "COPYING", "USE_POLICY.md")
    assert all(map(is_for_people, mine))
    assert not any(
        map(is_for_people, ("readme.txt", "LICENSE.json", "model.onnx", "NOTICE.onnx", "tokenizer.json", "LICENSED"))
    )
