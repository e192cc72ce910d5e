"""The pass of Olive: ``olive run`` for real on a tiny model, and what the pass refuses."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, ExportError
from spinpass.formats import read_artefact
from tests.support import folders

pytest.importorskip("olive")
pytest.importorskip("onnxruntime")

from olive.hardware import DEFAULT_CPU_ACCELERATOR as CPU
from olive.hardware import AcceleratorSpec, Device
from olive.model import HfModelHandler, ONNXModelHandler

from spinpass.folders import export
from spinpass.hosts import __main__ as command
from spinpass.hosts import olive
from spinpass.runtime.decoder import OrtDecoder

ROOT = Path(__file__).parents[2]
RUN = {
    "input_model": {"type": "HfModel", "model_path": "model"},
    "data_configs": [
        {
            "name": "prompt",
            "type": "TransformersPromptDummyDataContainer",
            "load_dataset_config": {"params": {"seq_len": 8, "past_seq_len": 0, "max_seq_len": 64}},
        }
    ],
    "evaluators": {
        "scores": {
            "type": "SpinEvaluator",
            "user_script": "evaluator.py",
            "type_args": {"text": "text.txt", "windows": 2},
            "metrics": [
                {"name": "latency", "type": "latency", "data_config": "prompt", "sub_types": [{"name": "avg"}]}
            ],
        }
    },
    "passes": {"spin": {"type": "SpinPass", "bits": 4, "recipe": "plain", "rotation": {"form": "online"}}},
    "evaluator": "scores",
    "evaluate_input_model": False,
    "output_dir": "out",
    "cache_dir": "cache",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk with a model, a text, and the two files that Olive reads."""
    made = tmp_path_factory.mktemp("desk")
    folders.model_folder(made / "model", max_position_embeddings=512)
    (made / "text.txt").write_text(" ".join(folders.WORDS[i * i % len(folders.WORDS)] for i in range(1100)))
    (made / "evaluator.py").write_text("import spinpass.hosts.olive\n")
    (made / "run.json").write_text(json.dumps(RUN))
    assert command.write_for_olive([str(made / "olive.json")]) == 0
    return made


def test_olive_runs_the_pass_and_its_evaluator(folder: Path) -> None:
    variables = os.environ | {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    words = ["-m", "olive", "run", "--config", "run.json", "--package-config", "olive.json"]
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = folder / "out"
    handler = json.loads((out / "model_config.json").read_text())
    assert handler["type"].lower() == "onnxmodel"
    made = json.loads((out / "spinpass.json").read_text())
    assert {space["rotation"] for space in made["plan"]["spaces"]} >= {"R1", "R2", "R3", "R4"}
    assert made["packed"]["matmuls"] > 0 and made["plan"]["config"]["form"] == "online"
    assert read_artefact(out)
    # what the command line writes for these options, to the byte
    direct = export(folder / "model", folder / "direct", RotationConfig(form="online"), bits=4, recipe="plain")
    assert (out / "model.onnx").read_bytes() == (folder / "direct" / "model.onnx").read_bytes()
    assert {*direct.files} <= {path.name for path in out.iterdir()}
    assert len(OrtDecoder(out).generate([5, 6, 7], 4, end=()).tokens) == 4
    scores = json.loads((out / "metrics.json").read_text())
    assert scores["latency-avg"]["value"] > 0
    expected = olive.SpinEvaluator(str(folder / "text.txt"), 2).evaluate(_onnx(folder / "direct"), [])
    assert scores["text-perplexity"]["value"] == pytest.approx(expected.root["text-perplexity"].value)


def _onnx(folder: Path) -> Any:
    return ONNXModelHandler(str(folder), onnx_file_name="model.onnx")


def test_the_evaluator_scores_what_goes_in_and_sees_a_broken_model(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    evaluator = olive.SpinEvaluator(str(folder / "text.txt"), 2)
    before = evaluator.evaluate(HfModelHandler(str(folder / "model")), []).root["text-perplexity"].value
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.norm.weight.data.mul_(4.0)
    model.save_pretrained(tmp_path)
    folders.tokenizer().save_pretrained(tmp_path)
    broken = evaluator.evaluate(HfModelHandler(str(tmp_path)), []).root["text-perplexity"].value
    assert broken > 2 * before


def test_its_options_are_the_arguments_of_the_export() -> None:
    options = olive.SpinPass.default_config(CPU)
    arguments = inspect.signature(export).parameters
    assert arguments.keys() - options.keys() == {
        "model",
        "out",
        "config",
        "to",
        "trust_remote_code",
        "force",
        "steps",
        "team",
    }
    assert options.keys() - arguments.keys() == {"rotation"}
    for name in options.keys() - {"rotation", "device"}:
        assert options[name].default_value == arguments[name].default, name
    assert options["minutes"].description.startswith("the wall-clock time that learning may take")
    made = olive.SpinPass.generate_config(CPU, {"layers": [["*.down_proj.*", "w8"]], "keep": ["*o_proj*"]}, {}, True)
    assert made.layers == [("*.down_proj.*", "w8")] and made.bits is None and made.device == "cpu"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"bitz": 4}, "SpinPass has no option bitz: did you mean bits"),
        ({"nothing_like_it": 4}, "SpinPass has no option nothing_like_it: it has rotation, bits, recipe"),
    ],
)
def test_an_option_that_there_is_not(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        olive.SpinPass.generate_config(CPU, given, {}, True)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("some", "rotation='some': give the fields of a RotationConfig, or 'none'"),
        ({"kinds": "hadamard"}, "a rotation has no 'kinds': it has rotations, kind"),
        ({"kind": "any"}, "kind"),
    ],
)
def test_a_rotation_that_means_nothing(folder: Path, tmp_path: Path, given: Any, why: str) -> None:
    made = olive.SpinPass(CPU, olive.SpinPass.generate_config(CPU, {"rotation": given}, {}, True))
    with pytest.raises(ConfigError, match=why):
        made.run(HfModelHandler(str(folder / "model")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "OpenVINOExecutionProvider"])
def test_another_provider_is_refused_before_anything_is_read(provider: str) -> None:
    made = olive.SpinPass.generate_config(CPU, {}, {}, True)
    assert olive.SpinPass.validate_config(made, CPU)
    other = AcceleratorSpec(Device.GPU if provider.startswith("CUDA") else Device.CPU, provider)
    with pytest.raises(ConfigError, match=f"tries its file with CPUExecutionProvider, and Olive's target asks for {provider}"):
        olive.SpinPass.validate_config(made, other)


def test_rotations_as_json_has_them() -> None:
    assert olive._rotation_of("none") is None and olive._rotation_of({}) == RotationConfig()
    given = {
        "rotations": ["R1", "R2"],
        "overrides": {"R2": {"kind": "random-hadamard", "seed": 3}},
        "exclude": ["R2:*0*"],
    }
    made = olive._rotation_of(given)
    assert made is not None and made.rotations == ("R1", "R2") and made.exclude == ("R2:*0*",)
    assert made.overrides["R2"].seed == 3


def test_models_that_it_does_not_take(folder: Path, tmp_path: Path) -> None:
    made = olive.SpinPass(CPU, olive.SpinPass.generate_config(CPU, {}, {}, True))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match="SpinPass takes an HfModel, and this is an ONNXModel"):
        made._run_for_config(_onnx(tmp_path), made.config, str(tmp_path / "out"))
    adapted = HfModelHandler(str(folder / "model"), adapter_path=str(tmp_path))
    with pytest.raises(ConfigError, match="is an adapter beside the model: run MergeAdapterWeights first"):
        made._run_for_config(adapted, made.config, str(tmp_path / "out"))


def test_the_file_in_which_olive_finds_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads((folder / "olive.json").read_text())["passes"]
    assert listed["SpinPass"]["module_path"] == "spinpass.hosts.olive.SpinPass" and "OnnxConversion" in listed
    assert command.write_for_olive([]) == 2 and "usage: python -m spinpass.hosts FILE" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.write_for_olive([str(tmp_path / "file" / "olive.json")]) == 1
    assert capsys.readouterr().err.startswith("spinpass: ")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import spinpass.hosts

    monkeypatch.delitem(sys.modules, "spinpass.hosts.olive")
    monkeypatch.delattr(spinpass.hosts, "olive")
    monkeypatch.setitem(sys.modules, "olive.evaluator.metric_result", None)
    with pytest.raises(ExportError, match=r"the pass of Olive needs .*pip install 'spinpass\[olive\]'"):
        spinpass.hosts.SpinPass  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'SomePass'"):
        spinpass.hosts.SomePass  # noqa: B018
