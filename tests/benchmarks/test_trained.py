"""The decoder that is trained here: what is written is what was trained, and nothing that is scored was read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from gguf import GGUFReader

from benchmarks import corpus, offgrid, trained
from benchmarks.texts import scored_texts
from spinpass.evaluation import SHIPPED_TEXT, ProgramScorer, token_ids
from spinpass.loading import load_model

TINY = trained.Settings(hidden=64, inner=96, layers=2, heads=4, cached=2, vocabulary=320, context=32, steps=3)
DOCUMENTS = ("def add(a, b):\n    return a + b\n" * 40, "The sum of two numbers does not depend on their order.\n" * 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, object, Path]:
    """A decoder after three steps, its tokenizer and its file."""
    tokenizer = trained.trained_tokenizer(DOCUMENTS, TINY.vocabulary)
    model, done = trained.trained(trained.encoded(tokenizer, DOCUMENTS), TINY, 1.0, lambda done, total: None)
    assert done == TINY.steps
    out = tmp_path_factory.mktemp("trained") / "tiny.gguf"
    trained.write(model, tokenizer, TINY, out, "{}")
    return model, tokenizer, out


def equal(before: Path, after: Path) -> bool:
    """Whether two files have the same tensors."""
    mine, theirs = ({t.name: t.data for t in GGUFReader(path).tensors} for path in (before, after))
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_the_file_holds_the_decoder_and_its_tokenizer(made: tuple[torch.nn.Module, object, Path]) -> None:
    model, tokenizer, out = made
    loaded = load_model(str(out), cache=False)
    ids = token_ids(loaded.companions.tokenizer)(DOCUMENTS[0])[: TINY.context]
    assert ids == tokenizer.encode(DOCUMENTS[0]).ids[: TINY.context]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ProgramScorer(loaded.program).logits(ids), expected, rtol=1e-5, atol=1e-5)
    assert not list(out.parent.glob("*.tmp"))


def test_a_file_made_of_the_same_is_kept(made: tuple[torch.nn.Module, object, Path]) -> None:
    model, tokenizer, out = made
    about = trained.described(TINY, corpus.Corpus(DOCUMENTS, ()), 1.0)
    assert trained.kept(out, about) is None
    trained.write(model, tokenizer, TINY, out, json.dumps(about | {"loss": 1.0}))
    assert trained.kept(out, about) == about | {"loss": 1.0}
    assert trained.kept(out, about | {"minutes": 2.0}) is None
    assert trained.kept(out.with_name("none.gguf"), about) is None


def test_time_that_runs_out_fades_the_training_out(made: tuple[torch.nn.Module, object, Path]) -> None:
    ids = trained.encoded(made[1], DOCUMENTS)
    model, done = trained.trained(ids, TINY, 1e-6, lambda done, total: None)
    assert done <= 1
    assert not model.training


def test_a_decoder_of_the_family_is_put_off_the_grid(made: tuple[torch.nn.Module, object, Path]) -> None:
    out = made[2].with_name("off.gguf")
    offgrid.write(made[2], out, 0.8)
    assert not equal(made[2], out)
    before, after = (ProgramScorer(load_model(str(path), cache=False).program) for path in (made[2], out))
    ids = list(range(20))
    torch.testing.assert_close(after.logits(ids), before.logits(ids), rtol=1e-4, atol=1e-4)
    offgrid.write(made[2], out, 1.0)
    assert equal(made[2], out)


def test_what_is_learned_from_has_nothing_that_is_scored() -> None:
    found = corpus.read(400_000)
    scored = set(corpus.runs("\n\n".join(scored_texts().values())))
    documents = (*found.learned, *found.held_out)
    assert len(found.learned) > 10
    assert found.held_out
    assert all(scored.isdisjoint(corpus.runs(text)) for text in documents)
    assert not any("spinpass" in text for text in documents)
    paragraphs = [p for text in documents for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_texts_are_long_and_are_not_what_calibrates() -> None:
    def paragraphs(text: str) -> set[str]:
        return {" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if len(p.split()) > 3}

    found, calibrating = scored_texts(), SHIPPED_TEXT.read_text(encoding="utf-8")
    assert list(found) == ["help", "code", "prose", "german"]
    for name, text in found.items():
        assert len(text) > 20_000, name  # eight windows of 512 tokens, of five characters each
        assert paragraphs(text).isdisjoint(paragraphs(calibrating)), name
        assert set(corpus.runs(text)).isdisjoint(corpus.runs(calibrating)), name


def test_a_text_of_ones_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Some words.")
    assert scored_texts([f"own={tmp_path / 'own.txt'}"])["own"] == "Some words."
    with pytest.raises(typer.BadParameter, match="'own.txt' is not NAME=FILE"):
        scored_texts(["own.txt"])


@pytest.mark.parametrize("kind", [each for each in trained.SHAPES if each != trained.LLAMA])
def test_a_decoder_of_another_type_is_a_folder(kind: str, tmp_path: Path) -> None:
    settings = replace(TINY, type=kind, steps=1)
    tokenizer = trained.trained_tokenizer(DOCUMENTS, settings.vocabulary)
    model, _ = trained.trained(trained.encoded(tokenizer, DOCUMENTS), settings, 1.0, lambda done, total: None)
    out = tmp_path / "decoder"
    trained.write_folder(model, tokenizer, settings, out, json.dumps({"loss": 1.0}))
    assert trained.kept(out, {"loss": 1.0}) == {"loss": 1.0} and trained.kept(out, {"loss": 2.0}) is None
    loaded = load_model(str(out), cache=False)
    ids = token_ids(loaded.companions.tokenizer)(DOCUMENTS[0])[: settings.context]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ProgramScorer(loaded.program).logits(ids), expected, rtol=1e-4, atol=1e-4)
