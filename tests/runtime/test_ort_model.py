"""``OrtModel.generate`` beside transformers' own, token by token, with everything that it takes; refusals by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.folders import export
from spinpass.runtime import GeneratedTokens, ModelFolder, OrtModel, StopText
from spinpass.runtime.search import SearchOptions
from tests.support import folders

NEW = 12
ROWS = ([5, 9, 17, 4, 13, 12], [5, 9, 17, 5, 9, 11], [14, 11, 7, 8, 8, 8])
TEXT = "what is the weather like"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("original"), "llama")  # whose heads the kernels take


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ort") / "out"
    export(original, out, bits=16)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> OrtModel:
    return OrtModel.from_pretrained(folder, threads=1)


@pytest.fixture(scope="module")
def theirs(original: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(original).eval()


def batch(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens padded in front, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


GREEDY: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[88], [57], [3, 4], [60, 61]]},
    {"min_new_tokens": 8},
    {"min_length": 14},
    {"max_length": 11, "max_new_tokens": None},
    {"renormalize_logits": True, "use_cache": False, "num_beams": 1, "length_penalty": 2.0},
]


@pytest.mark.parametrize("options", GREEDY, ids=lambda options: ",".join(options) or "plain")
def test_the_likeliest_tokens_are_theirs(model: OrtModel, theirs: Any, options: dict[str, Any]) -> None:
    ids = torch.tensor(ROWS)
    plain = theirs.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[:, ids.shape[1] :]
    ends = sorted({int(plain[0, 3]), int(plain[1, 5])})  # so that rows end, each at its own time
    asked = {"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0} | options
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **asked)
    assert torch.equal(model.generate(ids, **asked), expected)


@pytest.mark.parametrize("options", GREEDY[1:-2], ids=",".join)
def test_each_of_these_changes_tokens(model: OrtModel, options: dict[str, Any]) -> None:
    ids = torch.tensor(ROWS)
    ends = int(model.generate(ids, max_new_tokens=2, eos_token_id=[])[0, -1])
    plain, changed = (model.generate(ids, max_new_tokens=50, eos_token_id=ends, **each) for each in ({}, options))
    assert not torch.equal(plain, changed)


def test_rows_of_a_padded_batch_are_penalised_as_each_alone(model: OrtModel, theirs: Any) -> None:
    options: dict[str, Any] = dict(max_new_tokens=NEW, repetition_penalty=1.5, no_repeat_ngram_size=2, eos_token_id=[])
    rows = ([5, 9, 17, 4, 13, 12], [6], [14, 11, 7])
    ids, mask = batch(*rows)
    found = model.generate(ids, mask, **options)[:, ids.shape[1] :]
    options["eos_token_id"] = None
    alone = [theirs.generate(torch.tensor([row]), do_sample=False, **options)[0, len(row) :] for row in rows]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 3.0},
        {"temperature": 3.0, "top_k": 5},
        {"temperature": 3.0, "top_k": None, "top_p": 0.7},
        {"temperature": 3.0, "top_k": None, "min_p": 0.3, "repetition_penalty": 1.2},
        {"temperature": 3.0, "num_return_sequences": 4},
    ],
)
def test_draws_are_theirs_by_the_seed(model: OrtModel, theirs: Any, options: dict[str, Any]) -> None:
    ids = torch.tensor(ROWS)
    asked = {"max_new_tokens": NEW, "do_sample": True} | options
    torch.manual_seed(11)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **asked)
    before = torch.get_rng_state()
    assert torch.equal(model.generate(ids, eos_token_id=[], seed=11, **asked), expected)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    assert len(expected) == 3 * options.get("num_return_sequences", 1) and len({*map(tuple, expected.tolist())}) > 2


def test_a_configuration_counts_less_than_the_call_and_more_than_the_folder(folder: Path, theirs: Any) -> None:
    from transformers import GenerationConfig

    ids, mask = torch.tensor(ROWS), torch.ones(3, 6)
    told = {"do_sample": True, "temperature": 3.0, "top_k": 7, "repetition_penalty": 1.4, "max_new_tokens": 5}
    model = OrtModel.from_pretrained(folder, threads=1, generation_config=told)
    assert torch.equal(model.generate(ids, mask, seed=3), _drawn(theirs, ids, 3, **told))
    config = GenerationConfig(max_new_tokens=7, top_k=3)
    assert torch.equal(
        model.generate(ids, mask, generation_config=config, seed=3),
        _drawn(theirs, ids, 3, **told | {"max_new_tokens": 7, "top_k": 3}),
    )
    greedy = theirs.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    neutral = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids, mask, generation_config=config, **neutral), greedy)
    assert torch.equal(model.generate(ids, mask, do_sample=False, repetition_penalty=None, max_new_tokens=4), greedy)
    assert model.generate(ids, mask, generation_config={"max_length": 9}).shape[1] == 9
    assert model.generate(ids, mask, generation_config={"max_length": 9}, max_new_tokens=2).shape[1] == 8


def _drawn(theirs: Any, ids: Tensor, seed: int, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    found: Tensor = theirs.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
    return found


def beside(folder: Path, target: Path, **defaults: Any) -> OrtModel:
    """The same model with another generation_config.json, and no hashes of it."""
    shutil.copytree(folder, target)
    (target / "spinpass.json").unlink()
    (target / "generation_config.json").write_text(json.dumps(defaults))
    return OrtModel.from_pretrained(target, threads=1)


def test_search_defaults_of_the_folder_count_as_they_do_there(folder: Path, theirs: Any, tmp_path: Path) -> None:
    ids = torch.tensor(ROWS)
    told = {"do_sample": True, "temperature": 2.5, "top_k": 9, "repetition_penalty": 1.2}
    model = beside(
        folder, tmp_path / "a", **told, chat_format="mine", cache_implementation="hybrid", max_new_tokens=500
    )
    found = model.generate(ids, max_new_tokens=NEW, eos_token_id=[])
    assert torch.equal(found, _drawn(theirs, ids, 0, max_new_tokens=NEW, **told))
    assert model.generate(ids[:1], eos_token_id=[]).shape[1] == 64, (
        "what the folder says ends with the model's positions"
    )
    plain = OrtModel(model.graph, model.folder, generation_config={})
    assert torch.equal(
        plain.generate(ids, max_new_tokens=NEW),
        theirs.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None),
    )
    beams = beside(folder, tmp_path / "b", num_beams=4)
    with pytest.raises(
        ConfigError, match="num_beams=4 of generation_config.json is not done here: .*; give num_beams=1 to go"
    ):
        beams.generate(ids)
    assert torch.equal(beams.generate(ids, num_beams=1), theirs.generate(ids, do_sample=False, eos_token_id=None))


def test_what_a_tokenizer_returns_is_taken_as_it_is(model: OrtModel) -> None:
    text = model.tokenizer([TEXT, "it is"], padding=True, padding_side="left", return_tensors="pt")
    assert {*text} >= {"input_ids", "attention_mask"}
    found = model.generate(**text, max_new_tokens=20, repetition_penalty=1.1)
    assert found.shape[0] == 2 and torch.equal(found[:, : text["input_ids"].shape[1]], text["input_ids"])
    zeros = torch.zeros_like(text["input_ids"])
    assert torch.equal(
        model.generate(**{**text, "token_type_ids": zeros}, max_new_tokens=20, repetition_penalty=1.1), found
    )
    assert torch.equal(
        model.generate(inputs=text["input_ids"], attention_mask=text["attention_mask"]), model.generate(**text)
    )
    with pytest.raises(ConfigError, match="token_type_ids tell sentences apart"):
        model.generate(**{**text, "token_type_ids": zeros + 1})
    with pytest.raises(ConfigError, match='input_ids is a list: give a tensor, .*return_tensors="pt"'):
        model.generate(**model.tokenizer([TEXT]))


def test_a_text_that_stops(model: OrtModel, theirs: Any) -> None:
    tokenizer, ids = folders.letters_tokenizer(), torch.tensor(ROWS)
    unspoken = [[token] for token in (*range(3), *range(len(tokenizer), 96))]
    options: dict[str, Any] = dict(
        max_new_tokens=40, bad_words_ids=unspoken, pad_token_id=0, eos_token_id=1, min_new_tokens=40
    )  # theirs pads where there is an end token
    plain = model.generate(ids, **options)
    stops = [tokenizer.decode(plain[row, 9:11]) for row in (0, 1)]
    options["stop_strings"] = stops
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, tokenizer=tokenizer, **options
    )
    found = model.generate(ids, tokenizer=tokenizer, **options)
    assert torch.equal(found, expected) and found[0, 11:].tolist() == [0] * (found.shape[1] - 11)
    alone = model.generate(ids[:1], tokenizer=tokenizer, **options | {"stop_strings": stops[0]})
    assert torch.equal(alone, plain[:1, :11])
    with pytest.raises(ExportError, match="cannot be looked for with a .* give eos_token_id"):
        model.generate(ids, stop_strings="what")  # of whole words: transformers finds none in it either


def test_criteria_and_processors_of_others(model: OrtModel) -> None:
    ids = torch.tensor(ROWS)
    plain = model.generate(ids, max_new_tokens=NEW, eos_token_id=[])
    seen: list[int] = []

    def after_three(tokens: Tensor, scores: Any) -> Tensor:
        seen.append(tokens.shape[1])
        return torch.tensor([tokens.shape[1] >= 9, True, False])

    found = model.generate(ids, max_new_tokens=NEW, eos_token_id=[], pad_token_id=77, stopping_criteria=[after_three])
    assert seen == list(range(7, 7 + NEW)) and torch.equal(found[2], plain[2])
    assert found[0, 9:].tolist() == [77] * 9 and found[1, 7:].tolist() == [77] * 11
    only = model.generate(ids, max_new_tokens=3, eos_token_id=[], logits_processor=[lambda _, scores: -scores])
    assert not torch.equal(only, plain[:, :9])


def test_a_cache_goes_on_where_it_stopped(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []
    step = type(model.graph).step

    def counted(graph: Any, ids: Tensor, *rest: Any) -> Tensor:
        read.append(tuple(ids.shape))
        return step(graph, ids, *rest)

    monkeypatch.setattr(type(model.graph), "step", counted)
    for rows in (ROWS[:1], ROWS):
        options: dict[str, Any] = dict(max_new_tokens=4, eos_token_id=[], repetition_penalty=1.3)
        first = model.generate(torch.tensor(rows), return_dict_in_generate=True, **options)
        assert isinstance(first, GeneratedTokens) and torch.equal(
            first.sequences, model.generate(torch.tensor(rows), **options)
        )
        longer = torch.cat([first.sequences, torch.tensor([[15, 6]] * len(rows))], 1)
        other = torch.cat([first.sequences[:, :8], torch.tensor([[15, 6]] * len(rows))], 1)
        for ids, kept in ((longer, 9), (other, 8), (longer, 9), (torch.tensor(rows) + 1, 0)):  # as often as one likes
            expected = model.generate(ids, **options)
            read.clear()
            found = model.generate(ids, past_key_values=first.past_key_values, **options)
            assert torch.equal(found, expected)
            prompt = sum(columns for _, columns in read[: len(read) - 3])
            assert prompt == ids.shape[1] - kept, read


def test_rows_that_end_and_padding_go_on_too(model: OrtModel) -> None:
    ids, mask = batch([5, 9, 17, 4], [6], [14, 11])
    first = model.generate(ids, mask, max_new_tokens=3, eos_token_id=[], return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[8], [9], [10]])], 1)
    marks = torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1)
    found = model.generate(more, marks, max_new_tokens=5, eos_token_id=[], past_key_values=first.past_key_values)
    assert torch.equal(found, model.generate(more, marks, max_new_tokens=5, eos_token_id=[]))
    fewer = model.generate(more[:1], max_new_tokens=5, eos_token_id=[], past_key_values=first.past_key_values)
    assert torch.equal(fewer, model.generate(more[:1], max_new_tokens=5, eos_token_id=[])), "another batch reads anew"
    for wrong in (object(), (1, 2)):
        with pytest.raises(ConfigError, match="past_key_values is a .* of another model"):
            model.generate(ids, past_key_values=wrong)  # type: ignore[call-overload]
    twin = OrtModel.from_pretrained(model.folder.path, threads=1)
    with pytest.raises(ConfigError, match="past_key_values is a Past of another model"):
        twin.generate(ids, past_key_values=first.past_key_values)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 4}, "num_beams=4 is not done here: one sequence is followed at a time"),
    ({"typical_p": 0.9}, "typical_p=0.9 is not done here: give its LogitsProcessor in logits_processor"),
    ({"max_time": 2.0}, "max_time=2.0 is not done here: give a criterion in stopping_criteria"),
    ({"output_scores": True}, "output_scores=True is not done here: OrtDecoder.logits"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized' is not done here: .*--kv-cache"),
    ({"assistant_model": object()}, "assistant_model=<object .* is not done here"),
    ({"inputs_embeds": torch.ones(1, 2)}, "inputs_embeds=tensor.* the file takes token ids"),
    ({"repetition_penality": 1.1}, "generate takes no repetition_penality; the nearest is 'repetition_penalty'"),
    ({"generation_config": {"temprature": 1.1}}, "generate takes no temprature; the nearest is 'temperature'"),
    ({"generation_config": {"suppress_tokens": [5]}}, r"suppress_tokens=\[5\] is not done here"),
    ({"generation_config": 5}, "generation_config=5 is no configuration: give a GenerationConfig"),
    ({"temperature": 0.7}, "temperature=0.7 is of draws, and the likeliest token is taken: add do_sample=True"),
    ({"do_sample": True, "temperature": 0.0}, "temperature 0 draws nothing: leave out do_sample"),
    ({"num_return_sequences": 2}, "num_return_sequences 2: the likeliest continuation is one"),
    ({"num_return_sequences": 2, "do_sample": True, "streamer": object()}, "a streamer takes one sequence, not 2"),
    ({"max_length": 2}, "max_length 2 leaves no room behind 2 tokens"),
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is no whole number"),
    ({"top_p": "a"}, "top_p='a' is no number"),
    ({"min_new_tokens": 9, "max_new_tokens": 3}, "at least 9 new tokens are asked for, and at most 3"),
    ({"inputs": torch.tensor([[5, 6]])}, "inputs and input_ids are two names of one thing"),
    ({"attention_mask": {"top_k": 5}}, "attention_mask is a dict: give a tensor"),
    ({"input_ids": None}, "there are no input_ids to continue"),
]


@pytest.mark.parametrize(
    ("options", "why"), REFUSALS, ids=lambda each: "+".join(each) if isinstance(each, dict) else ""
)
def test_what_is_not_done_is_refused_by_name(model: OrtModel, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        model.generate(**{"input_ids": torch.tensor([[5, 6]])} | options)


def test_everything_that_transformers_takes_is_known() -> None:
    """Their next release may take more, which is then told as unknown; here it is found out."""
    from transformers import GenerationConfig

    from spinpass.runtime.refused import HARMLESS, REFUSED

    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names <= {*SearchOptions.__annotations__, "return_dict_in_generate", *HARMLESS, *REFUSED}
    assert not HARMLESS & REFUSED.keys() and not SearchOptions.__annotations__.keys() & {*HARMLESS, *REFUSED}


def test_their_own_defaults_ask_for_nothing(model: OrtModel) -> None:
    from transformers import GenerationConfig

    ids = torch.tensor(ROWS)
    every = GenerationConfig._get_default_generation_params()
    every.pop("max_length")
    assert torch.equal(model.generate(ids, generation_config=every), model.generate(ids))
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig()), model.generate(ids))


def test_stop_strings_without_transformers(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers.generation.stopping_criteria", None)
    with pytest.raises(ExportError, match="stop_strings needs the package transformers"):
        model.generate(torch.tensor(ROWS), stop_strings="a")


class Letters:
    """Pieces that are what they are told, a letter to a token."""

    def add(self, token: int) -> Iterator[str]:
        yield chr(token)

    def rest(self) -> Iterator[str]:
        yield "!"


@pytest.mark.parametrize(
    ("text", "stop", "shown", "ended"),
    [
        ("one two", ("t",), ["one ", ""], True),
        ("aab aac", ("aac",), ["aab ", ""], True),
        ("aaab", ("aab", "b"), ["a", ""], True),
        ("abab", ("abc",), ["abab", "!"], False),
        ("ab", ("abc",), ["", "ab!"], False),
        ("abc", (), ["abc", "!"], False),
    ],
)
def test_text_is_shown_up_to_where_it_stops(text: str, stop: tuple[str, ...], shown: list[str], ended: bool) -> None:
    pieces: Any = StopText(Letters(), stop)  # type: ignore[arg-type]
    found = "".join(piece for letter in text for piece in pieces.add(ord(letter)))
    whole = found + "".join(pieces.rest())
    assert whole == "".join(shown) and pieces.ended == ended
    assert not any(each in whole for each in stop)
    assert [*pieces.add(ord("x"))] == ([] if ended else ["x"])


def test_a_stream_stops_at_a_text_too(model: OrtModel) -> None:
    known = [[token] for token in range(len(model.tokenizer), 96)]
    whole = "".join(model.stream(TEXT, max_new_tokens=NEW, bad_words_ids=known, eos_token_id=[]))
    stop = whole.split()[4]
    found = "".join(model.stream(TEXT, max_new_tokens=NEW, bad_words_ids=known, eos_token_id=[], stop_strings=stop))
    assert found == whole[: whole.index(stop)] != whole
    with pytest.raises(ConfigError, match="a text to stop at is empty"):
        next(model.stream(TEXT, stop_strings=[""]))
    with pytest.raises(ConfigError, match="one text is streamed at a time"):
        next(model.stream(TEXT, do_sample=True, num_return_sequences=2))


def test_search_defaults_without_the_tokens(tmp_path: Path) -> None:
    assert ModelFolder(tmp_path).search_defaults == {}
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "pad_token_id": 0, "top_k": 5, "top_p": None})
    )
    assert ModelFolder(tmp_path).search_defaults == {"top_k": 5}
