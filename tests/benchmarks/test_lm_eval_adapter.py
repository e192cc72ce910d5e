"""A folder in lm-eval: likelihoods and texts are those of the model, and a task of one's own needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import folders
from tests.support.commands import document, run

adapter = pytest.importorskip("benchmarks.lm_eval_adapter", reason="lm-eval has an environment of its own", exc_type=ImportError)

CONTEXT, FOLLOWING = "what is the weather", " like if it is on"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model as transformers has it, and as an ONNX folder that keeps its values and returns the logits of the last token."""
    source = folders.model_folder(tmp_path_factory.mktemp("lm") / "model")
    out = source.with_name("out")
    assert document(run("export", str(source), str(out), "--bits", "16", "--last-logits", "--json"))["ok"]
    return source, out


def asked(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=args)]


def reference(source: Path, context: list[int], following: list[int]) -> tuple[float, bool]:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(source)(torch.tensor([[*context, *following]])).logits[0]
    likelihoods = logits[len(context) - 1 : -1].log_softmax(-1)
    return float(likelihoods[range(len(following)), following].sum()), likelihoods.argmax(-1).tolist() == following


def test_likelihoods_are_those_of_the_model(exported: tuple[Path, Path]) -> None:
    source, out = exported
    model = adapter.OrtLanguageModel(str(out), threads=1)
    ids = model.tok_encode(CONTEXT), model.tok_encode(FOLLOWING)
    (found,) = model.loglikelihood(asked(CONTEXT, FOLLOWING), disable_tqdm=True)
    assert found == (pytest.approx(reference(source, *ids)[0], abs=1e-3), reference(source, *ids)[1])
    likeliest = model.model.generate(torch.tensor([ids[0]]), max_new_tokens=3, eos_token_id=())[0, len(ids[0]) :].tolist()
    assert model._loglikelihood_tokens([(None, ids[0], likeliest)])[0][1]


def test_choices_that_share_a_context_and_texts_without_one(exported: tuple[Path, Path]) -> None:
    source, out = exported
    model = adapter.OrtLanguageModel(str(out), threads=1)
    context = model.tok_encode(CONTEXT)
    pairs = [(None, context, [choice]) for choice in (5, 6, 7)]
    expected = [reference(source, context, [choice])[0] for choice in (5, 6, 7)]
    assert [value for value, _ in model._loglikelihood_tokens(pairs)] == pytest.approx(expected, abs=1e-3)
    (found,) = model.loglikelihood_rolling(asked(CONTEXT))
    assert found == pytest.approx(reference(source, [model.eot_token_id], context)[0], abs=1e-3)
    short = adapter.OrtLanguageModel(str(out), threads=1, max_length=3)  # windows of two: the second begins anew
    parts = [([model.eot_token_id], context[:2]), (context[1:2], context[2:])]
    assert short.loglikelihood_rolling(asked(CONTEXT)) == [pytest.approx(sum(reference(source, *part)[0] for part in parts), abs=1e-3)]
    with pytest.raises(adapter.ExportError, match="3 tokens are more than the 3 that the model takes"):
        short._loglikelihood_tokens([(None, [1], [5, 6, 7])])


def test_texts_end_where_the_task_says(exported: tuple[Path, Path]) -> None:
    model = adapter.OrtLanguageModel(str(exported[1]), threads=1)
    whole = "".join(model.model.stream(CONTEXT, max_new_tokens=8))
    assert model.generate_until(asked(CONTEXT, {"until": [], "max_gen_toks": 8})) == [whole]
    word = whole.split()[1]
    assert model.generate_until(asked(CONTEXT, {"until": word, "max_gen_toks": 8})) == [whole[: whole.find(word)]]
    drawn = [model.generate_until(asked(CONTEXT, {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8})) for _ in range(2)]
    assert drawn[0] == drawn[1]  # seeded


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 1.0}, {"do_sample": False}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True, "temperature": 1.0}),
    ],
)
def test_tokens_are_drawn_where_a_task_says_so(asked: dict[str, Any], drawn: dict[str, Any]) -> None:
    assert adapter._drawn(asked) == drawn


def test_a_task_of_ones_own(exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lines = [{"question": "what is it", "choices": ["the weather", "not"], "answer": n % 2} for n in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter.main(exported[1], questions=tmp_path / "own.jsonl", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["own"]["acc,none"] == 0.5 and found["own"]["sample_len"] == 4


def test_the_questions_have_one_answer_each() -> None:
    lines = [json.loads(line) for line in adapter.QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 20 and len({line["question"] for line in lines}) == len(lines)
    for line in lines:
        assert line.keys() == {"question", "choices", "answer"} and len(set(line["choices"])) == 4
        assert line["answer"] in range(4)
    assert len({line["answer"] for line in lines}) == 4
