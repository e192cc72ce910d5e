"""What is loaded is what was saved, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError, SpinpassError
from spinpass.loading import load_model
from spinpass.loading.tensors import listed
from tests.support import folders, models

State = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.model_folder(tmp_path / "model", "llama")


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without(part: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def plus(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(SpinpassError) as caught:
        load_model(folder, cache=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["lm_head", "layers.1.mlp", "model.norm", "layers.0.self_attn.q_proj", "embed_tokens"])
def test_a_tensor_that_is_missing(folder: Path, part: str) -> None:
    rewrite(folder, without(part))
    assert part in (said := refused(folder)) and "drawn at random" in said


def test_a_tensor_of_another_shape(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda state: state | {name: state[name][:-2].clone()})
    assert f"{name} is [" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(folder: Path, value: float) -> None:
    def spoil(state: State) -> State:
        state["model.layers.0.mlp.up_proj.weight"][3, 5] = value
        return state

    rewrite(folder, spoil)
    assert "model.layers.0.mlp.up_proj.weight" in (said := refused(folder)) and "finite" in said


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}",
        "module.{}",
        "base_model.model.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "base_model.model._orig_mod.{}",
    ],
)
def test_names_that_a_wrapper_changed(folder: Path, wrapped: str) -> None:
    plain = load_model(folder, cache=False).program.state_dict
    rewrite(folder, lambda state: {wrapped.format(name): tensor for name, tensor in state.items()})
    loaded = load_model(folder, cache=False)
    assert loaded.report.renamed and loaded.report.lines
    assert all(torch.equal(loaded.program.state_dict[name], tensor) for name, tensor in plain.items())


def test_layers_that_were_compiled_one_by_one(folder: Path) -> None:
    plain = load_model(folder, cache=False).program.state_dict
    rewrite(folder, lambda state: {n.replace("layers.0.", "layers.0._orig_mod."): t for n, t in state.items()})
    found = load_model(folder, cache=False).program.state_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_names_in_front_that_nobody_knows(folder: Path) -> None:
    rewrite(folder, lambda state: {f"teacher.{name}": tensor for name, tensor in state.items()})
    assert "lm_head.weight" in (said := refused(folder)) and "teacher." in said


def test_tensors_that_are_not_used_are_listed(folder: Path) -> None:
    assert not load_model(folder, cache=False).report.lines
    rewrite(folder, plus(mtp__layers__0__proj__weight=torch.ones(4, 4), value_head__weight=torch.ones(1, 4)))
    report = load_model(folder, cache=False).report
    assert report.unused == ("mtp.layers.0.proj.weight", "value_head.weight")
    assert "value_head.weight" in report.lines[0] and report.to_dict()["unused"] == list(report.unused)


def test_heads_that_transformers_drops_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    ignored = "_keys_to_ignore_on_load_unexpected"
    monkeypatch.setattr(LlamaForCausalLM, ignored, ["^mtp.*"])  # as those of Qwen 3 Next and DeepSeek V4 have it
    rewrite(folder, plus(mtp__fc__weight=torch.ones(4, 4)))
    assert load_model(folder, cache=False).report.unused == ("mtp.fc.weight",)
    assert getattr(LlamaForCausalLM, ignored) == ["^mtp.*"]


def test_a_tokenizer_with_more_tokens_than_rows(folder: Path) -> None:
    tokenizer = folders.tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    tokenizer.save_pretrained(folder)
    assert "221 tokens" in load_model(folder, cache=False).report.notes[0]


# -- adapters and quantization ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"])
def test_an_adapter_beside_the_weights(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert "merge" in (said := refused(folder)) and name in said


def test_an_adapter_among_the_weights(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    rewrite(folder, lambda state: state | {f"{name}.lora_A.default.weight": torch.ones(2, 4)})
    assert "merge" in (said := refused(folder)) and "lora_A" in said


def fp8(state: State) -> State:
    """Round the projections to 8-bit floats, with a scale each."""
    made: State = {}
    for name, tensor in state.items():
        if "proj" in name:
            scale = tensor.abs().amax() / 448
            made |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.reshape(1)}
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_algo": "FP8"},
        {"load_in_8bit": True},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
    ],
)
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantization_that_cannot_be_undone(folder: Path, entry: dict[str, Any], dequantize: bool) -> None:
    rewrite(folder, fp8)
    configure(folder, quantization_config=entry)
    said = refused(folder, dequantize=dequantize)
    assert "packed weights" in said and "before it was quantized" in said


def test_a_quantization_that_a_file_beside_speaks_of(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert "modelopt FP8" in refused(folder)


def test_codes_that_nobody_speaks_of(folder: Path) -> None:
    rewrite(folder, fp8)
    assert "proj.weight_scale" in (said := refused(folder)) and "scales" in said
    rewrite(folder, without("_scale"))
    assert "float8" in refused(folder) or "f8_e4m3" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_where_floats_are_computed_with(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda state: state | {name: (state[name] * 100).to(dtype)})
    assert name in refused(folder)


def blockwise(state: State) -> State:
    """Round the projections to 8-bit floats with a scale for each block of 16 by 16, as DeepSeek's are."""
    made: State = {}
    for name, tensor in state.items():
        if "proj" not in name:
            made[name] = tensor
            continue
        rows, columns = tensor.shape[0] // 16, tensor.shape[1] // 16
        blocks = tensor.reshape(rows, 16, columns, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        made |= {name: codes, f"{name}_scale_inv": scale}
    return made


def test_8_bit_floats_need_the_word_and_keep_their_values(folder: Path, tmp_path: Path) -> None:
    plain = load_model(folder, cache=False).program.state_dict
    rewrite(folder, blockwise)
    entry = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    configure(folder, quantization_config=entry)
    with pytest.raises(ConfigError, match=r"packed weights \(fp8\).*add --dequantize"):
        load_model(folder, cache=False)
    loaded = load_model(folder, cache=False, dequantize=True)
    assert loaded.report.dequantized == "fp8" and "fp8" in loaded.report.lines[0]
    for name, tensor in loaded.program.state_dict.items():
        assert tensor.dtype == torch.float32
        assert float((tensor - plain[name]).norm() / plain[name].norm()) < 0.05
    assert loaded.companions is not None
    loaded.companions.save(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForSequenceClassification", "score"),
        ("LlamaForTokenClassification", "score"),
        ("LlamaModel", "base"),
    ],
)
def test_another_class_than_a_language_model(tmp_path: Path, name: str, kind: str) -> None:
    import transformers

    config = models.build("llama").config
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    assert f"was saved as {name}" in refused(tmp_path)


def test_an_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert "BertForSequenceClassification" in refused(tmp_path)


def test_a_model_type_that_nobody_knows(folder: Path) -> None:
    configure(folder, model_type="from_the_future", architectures=["FutureForCausalLM"])
    assert "FutureForCausalLM" in (said := refused(folder)) and "newer version" in said


# -- code that comes with a model -------------------------------------------------------------------------------------


def with_code(folder: Path) -> None:
    configure(
        folder,
        model_type="my_llm",
        architectures=["MyLM"],
        auto_map={"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyLM"},
    )
    bomb = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    (folder / "configuration_my.py").write_text(
        f"{bomb}from transformers import LlamaConfig\nclass MyConfig(LlamaConfig):\n    model_type = 'my_llm'\n"
    )
    (folder / "modeling_my.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_my import MyConfig\n"
        "class MyLM(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )


def test_code_of_its_own_is_run_by_the_option_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(folder)
    assert "--trust-remote-code" in refused(folder)
    assert not (folder / "ran").exists()
    assert load_model(folder, cache=False, trust_remote_code=True).program.state_dict
    assert (folder / "ran").exists()


def test_code_that_transformers_has_as_well_is_not_run(folder: Path) -> None:
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_my.MyLM"})
    (folder / "modeling_my.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    load_model(folder, cache=False)
    assert not (folder / "ran").exists()


def test_listed() -> None:
    names = [f"model.layers.{i}.up.weight" for i in range(30)]
    assert listed(names) == "model.layers.0.up.weight (and 29 alike)"
    assert listed("abcdef") == "a, b, c, d, and 2 more"


def test_a_folder_that_lacks_nothing_is_not_refused(tmp_path: Path) -> None:
    for name in ("llama_tied", "gpt2", "gemma3_text"):
        load_model(folders.model_folder(tmp_path / name, name), cache=False)


def test_errors_are_of_their_kind(folder: Path) -> None:
    rewrite(folder, without("lm_head"))
    with pytest.raises(ExportError):
        load_model(folder)
