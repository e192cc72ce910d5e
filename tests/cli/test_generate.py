"""``OrtModel`` beside transformers' ``generate`` on the model it was exported from, and ``spinpass generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spinpass.cli.app import app
from spinpass.errors import ConfigError, ExportError
from spinpass.runtime.ort_model import OrtModel
from tests.support import folders

NEW = 6
PROMPTS = ([5, 9, 17, 4, 13, 12], [6], [14, 11, 7, 8])
TEXT = "what is the weather like"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("original"), "llama")  # whose heads the kernels take


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotated and fused."""
    out = tmp_path_factory.mktemp("out")
    result = run("export", original, out, "--bits", 16)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> OrtModel:
    return OrtModel.from_pretrained(folder, threads=1)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def theirs(original: Path, prompt: list[int]) -> list[int]:
    """What transformers continues it with, greedily, no end token counting."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(original).eval()
    out = loaded.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return list(out[0, len(prompt) :].tolist())


def padded(side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, PROMPTS))
    rows = [([0] * (longest - len(p)), p, [1] * len(p)) for p in PROMPTS]
    if side == "left":
        return torch.tensor([pad + p for pad, p, _ in rows]), torch.tensor([pad + ones for pad, _, ones in rows])
    return torch.tensor([p + pad for pad, p, _ in rows]), torch.tensor([ones + pad for pad, _, ones in rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_with_padding_are_continued_as_each_sequence_alone(original: Path, model: OrtModel, side: str) -> None:
    ids, mask = padded(side)
    out = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=[])
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert out[:, ids.shape[1] :].tolist() == [theirs(original, prompt) for prompt in PROMPTS]


def test_an_end_token_ends_its_sequence_alone(model: OrtModel) -> None:
    ids, mask = padded("left")
    whole = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=[])[:, ids.shape[1] :]
    end = int(whole[0, 1])
    out = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=end, pad_token_id=77)[:, ids.shape[1] :]
    for found, expected in zip(out.tolist(), whole.tolist(), strict=True):
        stop = expected.index(end) + 1 if end in expected else NEW
        assert found == (expected[:stop] + [77] * NEW)[: out.shape[1]]


def test_drawing_follows_the_seed_and_stays_within_top_k(model: OrtModel) -> None:
    ids = torch.tensor([PROMPTS[0]] * 2)
    options: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=True, temperature=5.0, eos_token_id=[])
    first, again, other = (model.generate(ids, **options, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    likeliest = model.generate(ids, max_new_tokens=NEW, eos_token_id=[])
    assert torch.equal(model.generate(ids, **options, top_k=1), likeliest)


def test_a_streamer_sees_the_prompt_and_every_token(model: OrtModel) -> None:
    class Seen:
        def __init__(self) -> None:
            self.put_: list[list[int]] = []
            self.ended = False

        def put(self, ids: Tensor) -> None:
            self.put_.append(ids.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    seen, ids = Seen(), torch.tensor([PROMPTS[2]])
    out = model.generate(ids, max_new_tokens=NEW, eos_token_id=[], streamer=seen)
    assert seen.ended and seen.put_ == [PROMPTS[2], *([token] for token in out[0, len(PROMPTS[2]) :].tolist())]


def test_text_comes_in_pieces_that_make_up_the_whole(model: OrtModel) -> None:
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]])
    out = model.generate(ids, max_new_tokens=NEW)[0, ids.shape[1] :]
    assert "".join(model.stream(TEXT, max_new_tokens=NEW)) == model.tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("ids", "options", "why"),
    [
        ([[]], {}, "with tokens is expected"),
        ([5, 6], {}, "with tokens is expected"),
        ([[5, 6]], {"max_new_tokens": 0}, "less than 1"),
        ([[5, 6]], {"max_new_tokens": 9999}, "more than the 64 positions"),
        ([[5, 6], [7, 8]], {"streamer": object()}, "takes one sequence, not 2"),
        ([[5, 6, 7]], {"attention_mask": torch.tensor([[1, 0, 1]])}, "row 0 of attention_mask has holes"),
        ([[5, 6]], {"attention_mask": torch.tensor([[0, 0]])}, "row 0 of attention_mask has no token"),
        ([[5, 6]], {"attention_mask": torch.ones(1, 3)}, "beside input_ids of"),
        ([[5, 6]], {"do_sample": True, "top_p": 0.0}, "top_p 0.0 is not in"),
    ],
)
def test_requests_that_mean_nothing(model: OrtModel, ids: list[Any], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        model.generate(torch.tensor(ids, dtype=torch.int64), **options)


def test_the_command_line_writes_the_answer_and_the_rates(folder: Path, model: OrtModel) -> None:
    expected = "".join(model.stream(TEXT, max_new_tokens=NEW))
    shown = run("generate", folder, TEXT, "--raw", "--max-new-tokens", NEW, "--threads", 1)
    assert shown.exit_code == 0, shown.stderr
    assert expected in shown.stdout and "tokens/s" in shown.stdout + shown.stderr
    told = json.loads(run("generate", folder, TEXT, "--raw", "--max-new-tokens", NEW, "--json").stdout)
    assert told["text"] == expected and 0 < told["new_tokens"] <= NEW and told["decode_tokens_per_second"] >= 0
    chat = json.loads(run("generate", folder, TEXT, "--max-new-tokens", NEW, "--json").stdout)
    assert chat["prompt_tokens"] == len(TEXT.split())  # the template of the tiny tokenizer adds nothing


def test_an_answer_that_stops_at_a_text_and_does_not_repeat(folder: Path, model: OrtModel) -> None:
    def said(*options: object) -> dict[str, Any]:
        shown = run("generate", folder, TEXT, "--raw", "--max-new-tokens", 30, "--threads", 1, "--json", *options)
        assert shown.exit_code == 0, shown.stderr
        return dict(json.loads(shown.stdout))

    plain = said()
    changed = said("--repetition-penalty", 1.8)
    assert changed["text"] == "".join(model.stream(TEXT, max_new_tokens=30, repetition_penalty=1.8)) != plain["text"]
    words = plain["text"].split()
    stopped = said("--stop", words[2], "--stop", "never said")
    assert stopped["text"] == plain["text"][: plain["text"].index(words[2])] and stopped["finished"]
    assert stopped["new_tokens"] < plain["new_tokens"]
    drawn = said("--temperature", 3, "--min-p", 0.8, "--seed", 4)
    options: dict[str, Any] = dict(max_new_tokens=30, do_sample=True, temperature=3, top_k=0, min_p=0.8, seed=4)
    assert drawn["text"] == "".join(model.stream(TEXT, **options)) != "".join(model.stream(TEXT, **options | {"min_p": 0}))


@pytest.mark.parametrize("command", [("generate", TEXT), ("chat",)])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--seed", 0), "--seed 0 is of draws, and temperature 0 draws nothing"),
        (("--min-p", 0.5), "min_p 0.5 is of draws"),
        (("--min-p", 7, "--temperature", 1), "min_p 7.0 is not in [0, 1]"),
        (("--repetition-penalty", 0), "repetition_penalty 0.0 is not above 0"),
        (("--stop", ""), "--stop '' would end every answer before it begins"),
        (("--threads", 0), "--threads 0: choose 1 or more"),
        (("--provider", "NoSuchProvider"), "no provider 'NoSuchProvider' here"),
    ],
)
def test_both_commands_refuse_alike(folder: Path, command: tuple[str, ...], options: tuple[object, ...], why: str) -> None:
    refused = run(command[0], folder, *command[1:], "--max-new-tokens", 5, *options)
    assert refused.exit_code == 2 and why in refused.stderr


def test_both_commands_name_what_is_to_be_exported_first(original: Path, tmp_path: Path) -> None:
    for command in (("generate", original, TEXT), ("chat", original)):
        refused = run(*command)
        assert refused.exit_code == 2 and "is a model of transformers" in refused.stderr
    refused = run("chat", tmp_path)
    assert refused.exit_code == 2 and "there is no model at" in refused.stderr


def test_folders_that_cannot_generate_say_why(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.glob("model.onnx*"):
        (bare / file.name).write_bytes(file.read_bytes())
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "nothing", TEXT), 2, "there is no model at"),
        ((bare, TEXT), 1, "holds no tokenizer"),
        ((folder, TEXT, "--max-new-tokens", 9999), 2, "more than the 64 positions"),
        ((folder, TEXT, "--provider", "NoSuchProvider", "--max-new-tokens", NEW), 2, "NoSuchProvider"),
        ((folder, TEXT, "--temperature", -1), 2, "is negative"),
    ]
    for arguments, code, why in cases:
        result = run("generate", *arguments)
        assert result.exit_code == code and why in result.stderr, result.stderr


def test_a_cache_of_integers_on_the_command_line(original: Path, model: OrtModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(f"{TEXT} if it is on " * 80)
    out = tmp_path / "out"
    made = run("export", original, out, "--bits", 16, "--kv-cache", "int8", "--calibration", text)
    assert made.exit_code == 0, made.stderr
    assert json.loads((out / "spinpass.json").read_text())["cache"]["bits"] == 8
    quantized = OrtModel.from_pretrained(out, threads=1)
    assert {slot.dtype for slot in quantized.graph.cache} == {torch.int8}
    ids = torch.tensor([PROMPTS[0]])
    a, b = (m.generate(ids, max_new_tokens=NEW, eos_token_id=[]) for m in (model, quantized))
    assert (a == b).float().mean() > 0.5  # eight bits change little of a tiny random model's text
    for options, why in ((("--no-fuse",), "leave out --no-fuse"), (("--no-cache",), "leave out --no-fuse and")):
        refused = run("export", original, tmp_path / "no", "--bits", 16, "--kv-cache", "int8", "--calibration", text, *options)
        assert refused.exit_code == 2 and why in refused.stderr
    odd = folders.model_folder(tmp_path / "odd", "llama_tied")
    refused = run("export", odd, tmp_path / "no", "--bits", 16, "--kv-cache", "int8", "--calibration", text)
    assert refused.exit_code == 1 and "and this is not it: " in refused.stderr and "12" in refused.stderr


def test_packed_weights_generate(original: Path, tmp_path: Path) -> None:
    made = run("export", original, tmp_path / "out", "--int4", "--json")
    assert made.exit_code == 0, made.stderr
    assert any("seldom gain" in note for note in json.loads(made.stdout)["notes"])
    out = OrtModel.from_pretrained(tmp_path / "out").generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=NEW, eos_token_id=[]
    )
    assert out.shape == (1, len(PROMPTS[0]) + NEW)


def test_the_logits_of_the_last_token_alone(original: Path, model: OrtModel, tmp_path: Path) -> None:
    made = run("export", original, tmp_path / "out", "--bits", 16, "--last-logits")
    assert made.exit_code == 0 and "equivalent" in made.stdout, made.stderr
    short = OrtModel.from_pretrained(tmp_path / "out", threads=1)
    ids, mask = padded("left")
    a, b = (m.generate(ids, mask, max_new_tokens=NEW, eos_token_id=[]) for m in (model, short))
    assert torch.equal(a, b)
    assert short.graph.step(ids[:1], short.graph.start(1)).shape[1] == 1
    score = ["eval", original, "--file", tmp_path / "out", "--windows", 2, "--length", 8, "--json"]
    scored = json.loads(run(*score).stdout)["files"][str(tmp_path / "out")]
    assert scored["kl"] < 1e-6 and scored["agreement"] == 1
    refused = run("export", original, tmp_path / "no", "--last-logits", "--to", "gptq", "--quantize", "w8-rtn")
    assert refused.exit_code == 2 and "a checkpoint has no logits" in refused.stderr


def test_a_folder_without_a_model() -> None:
    with pytest.raises(ExportError, match="there is no model at"):
        OrtModel.from_pretrained("no/such/folder")
