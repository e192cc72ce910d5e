"""Several turns on one cache say what a fresh reading of the same tokens says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinpass.errors import ConfigError
from spinpass.folders import export
from spinpass.runtime import Conversation, OrtDecoder, Penalties, Sampling
from tests.support import folders
from tests.support.commands import run

NEW = 5
TURNS = ("what is the", "weather like", "if it is on")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    export(folders.model_folder(root / "model"), root / "out", bits=16)
    return root / "out"


def fresh(decoder: OrtDecoder, talk: Conversation) -> str:
    """The answer to the last turn by a decoder that has read nothing before."""
    ids = decoder.tokenizer.apply_chat_template(talk.turns[:-1], add_generation_prompt=True, return_dict=False)
    made = [token for token in decoder.generate(ids, NEW).tokens if token not in decoder.end_tokens]
    return str(decoder.tokenizer.decode(made, skip_special_tokens=True))


def test_turns_are_what_a_fresh_reading_says(folder: Path) -> None:
    decoder = OrtDecoder(folder, threads=1)
    talk, kept = Conversation(decoder, max_new_tokens=NEW), []
    for text in TURNS:
        said = "".join(talk.answer(text))
        assert said == fresh(decoder, talk) == talk.turns[-1]["content"]
        kept.append(talk.read)
    assert kept[0] == 0 < kept[1] < kept[2], "the cache is kept"
    talk.clear()
    assert talk.turns == [] and "".join(talk.answer(TURNS[0])) == fresh(decoder, talk) and talk.read == 0


def test_an_answer_that_is_stopped_is_a_turn(folder: Path) -> None:
    decoder = OrtDecoder(folder, threads=1)
    talk = Conversation(decoder, system="it is on", max_new_tokens=NEW)
    seen: list[str] = []
    for piece in talk.answer(TURNS[0], lambda: len(seen) == 2):
        seen.append(piece)
    assert len(seen) == 2 and talk.turns[-1] == {"role": "assistant", "content": "".join(seen)}
    assert talk.turns[0] == {"role": "system", "content": "it is on"}
    assert "".join(talk.answer(TURNS[1])) == fresh(decoder, talk)


def test_a_conversation_that_is_too_long_is_left_as_it_was(folder: Path) -> None:
    talk = Conversation(OrtDecoder(folder, threads=1), max_new_tokens=NEW)
    "".join(talk.answer(TURNS[0]))
    before = list(talk.turns)
    with pytest.raises(ConfigError, match="more than the 64 positions"):
        "".join(talk.answer("what is the weather like if it is on " * 9))
    assert talk.turns == before and "".join(talk.answer(TURNS[1]))
    with pytest.raises(ConfigError, match="max_new_tokens 0 is less than 1"):
        Conversation(OrtDecoder(folder), max_new_tokens=0)


def test_the_command_reads_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([*TURNS, "", "what is it on " * 30, "/clear", TURNS[0], "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    told = json.loads(run("chat", folder, "--max-new-tokens", NEW, "--json").stdout)["turns"]
    assert [turn["user"].split()[0] for turn in told] == ["what", "weather", "if", "what", "what"]
    assert "positions" in told[3]["error"] and told[4]["tokens_in_cache"] == 0 < told[1]["tokens_in_cache"]
    assert told[4]["answer"] == told[0]["answer"]


def test_an_answer_ends_at_a_text_and_repeats_less(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = OrtDecoder(folder, threads=1)
    answers = {text: "".join(Conversation(decoder, max_new_tokens=50).answer(text)) for text in folders.WORDS}
    text, whole = max(answers.items(), key=lambda pair: len(set(pair[1].split())))  # most tokens are no words
    stop = whole.split()[1]
    talk = Conversation(decoder, max_new_tokens=50, stop=(stop,))
    assert "".join(talk.answer(text)) == whole[: whole.index(stop)] == talk.turns[-1]["content"]
    lines = iter([text, "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    told = json.loads(run("chat", folder, "--max-new-tokens", 50, "--stop", stop, "--json").stdout)
    assert told["turns"][0]["answer"] == talk.turns[-1]["content"]
    penalised = Sampling(penalties=Penalties(repetition=1.8))
    talk = Conversation(decoder, max_new_tokens=9, sampling=penalised)
    for text in TURNS:  # what stands in the cache has been said, too
        said = "".join(talk.answer(text))
        ids = decoder.tokenizer.apply_chat_template(talk.turns[:-1], add_generation_prompt=True, return_dict=False)
        made = decoder.generate(ids, 9, sampling=penalised).tokens
        kept = [token for token in made if token not in decoder.end_tokens]
        assert said == decoder.tokenizer.decode(kept, skip_special_tokens=True)
