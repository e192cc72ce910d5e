"""Models that read padding, though a mask closes it: their rows are run one by one, and the folder says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spinpass.folders import export
from spinpass.loading import load_model
from spinpass.runtime import OrtModel
from tests.support.folders import model_folder

WHY = "padding changes what the model makes of a text"


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose windows are counted in places, padding included."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["local"], 2]], window_size=4,
        max_position_embeddings=64, intermediate_size=48, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    model = GPTNeoForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_rows_are_run_one_by_one(counting: Path, tmp_path: Path) -> None:
    assert load_model(counting).reads_padding
    export(counting, tmp_path / "out", None, bits=16)
    about = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert any(WHY in note for note in about["loading"]["notes"])
    batch = {t["runtime"]: t for t in about["trials"] if t["case"] == "padded batch"}
    assert batch["OrtModel"]["tokens"] and not batch["OrtModel"]["reason"]
    assert WHY in batch["onnxruntime"]["reason"]
    model = OrtModel.from_pretrained(tmp_path / "out")
    assert not model.graph.takes_padding
    ids = torch.tensor([[0, 0, 0, 5, 9, 11], [7, 3, 21, 33, 8, 40]])
    mask = (torch.arange(6) >= torch.tensor([[3], [0]])).long()
    together = model.generate(ids, mask, max_new_tokens=5, eos_token_id=())
    alone = model.generate(ids[:1, 3:], max_new_tokens=5, eos_token_id=())
    assert together[0, -5:].tolist() == alone[0, -5:].tolist()


def test_a_model_that_masks_padding_takes_batches(tmp_path: Path) -> None:
    assert not load_model(model_folder(tmp_path / "model", "llama_tied")).reads_padding
