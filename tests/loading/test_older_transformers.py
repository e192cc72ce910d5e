"""Configuration files that transformers 4 reads, and that say to transformers 5 what they said before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from spinpass.loading.models import Companions
from spinpass.loading.older_transformers import model_config, tokenizer_config
from tests.support import folders, models

SCALED = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}


def saved(folder: Path, config: Any, tokenizer: Any = None) -> dict[str, Any]:
    """config.json as it is written beside an exported model."""
    Companions(config, None, tokenizer).save(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def read(folder: Path) -> dict[str, Any]:
    """What transformers 5 makes of config.json."""
    return dict(transformers.AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": ""})


def config_of(name: str, **more: Any) -> Any:
    _, made, settings = models.MODELS[name]
    return getattr(transformers, made)(**settings, dtype="float32", **more)


@pytest.mark.parametrize("name", models.NAMES)
def test_nothing_changes_for_transformers_5(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    config.save_pretrained(tmp_path / "before")
    found = saved(tmp_path / "after", config)
    before, after = read(tmp_path / "before"), read(tmp_path / "after")
    assert {key: after.get(key) for key in before} == before
    more = {key: value for key, value in after.items() if key not in before}  # a few types keep words they do not read
    assert more == {key: before["rope_parameters"][key] for key in more}
    assert found["torch_dtype"] == found["dtype"] == "float32"


def test_scaled_rotary_embeddings(tmp_path: Path) -> None:
    config = config_of("llama", rope_parameters=dict(SCALED))
    config.save_pretrained(tmp_path / "before")
    found = saved(tmp_path / "after", config)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {key: value for key, value in SCALED.items() if key != "rope_theta"}
    assert read(tmp_path / "after") == read(tmp_path / "before")
    assert read(tmp_path / "after")["rope_parameters"] == SCALED


def test_words_that_the_older_one_reads() -> None:
    partial = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    found = model_config({"rope_parameters": partial, "dtype": "bfloat16"})
    assert (found["rope_theta"], found["partial_rotary_factor"], found["torch_dtype"]) == (1e4, 0.5, "bfloat16")
    assert "rope_scaling" not in found
    inner = {"model_type": "x", "rope_parameters": {"rope_theta": 7.0}}
    assert model_config({"text_config": inner})["text_config"]["rope_theta"] == 7.0
    kept = {"rope_theta": 3.0, "rope_parameters": {"rope_theta": 3.0}}
    assert model_config(kept) == kept  # as it came
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert model_config(nested) == nested  # no older words for these


def test_the_tokenizer_has_a_class_that_both_know(tmp_path: Path) -> None:
    tokenizer = folders.letters_tokenizer()
    saved(tmp_path, config_of("llama"), tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    text = "what is the weather like"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.eos_token == "</s>"
    assert tokenizer_config({"tokenizer_class": "OtherTokenizer"}) == {"tokenizer_class": "OtherTokenizer"}
    assert tokenizer_config({}) == {}
