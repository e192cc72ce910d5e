"""The last step of an export: every runtime that a folder is for opens it, and a folder that does wrong never appears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch.export import ExportedProgram

from spinpass import RotationConfig
from spinpass.errors import ExportError, VerificationError
from spinpass.folders import export
from spinpass.folders import onnx as folders_onnx
from spinpass.folders.judge import KERNEL_BOUND
from spinpass.folders.trial import try_folder
from spinpass.loading import LoadedModel, load_model
from spinpass.progress import Silent
from spinpass.runtime import GENAI_CONFIG, elsewhere
from tests.support.folders import model_folder, program_folder
from tests.support.sweeps import quick

GENAI = find_spec("onnxruntime_genai") is not None
WINDOW = 12
CASES = {"prompt": 4, "padded batch": 12, "next turn": 8, f"past {WINDOW} tokens": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), "mistral", sliding_window=WINDOW, eos_token_id=2, pad_token_id=0)


@pytest.fixture(scope="module")
def loaded(source: Path) -> LoadedModel:
    return load_model(source)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    export(source, out, None, bits=16)
    return out


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to be broken, without the manifest, which would say that it is."""
    shutil.copytree(written, tmp_path / "out")
    (tmp_path / "out" / "spinpass.json").unlink()
    return tmp_path / "out"


def tried(loaded: LoadedModel, folder: Path, program: ExportedProgram | None = None) -> list[Any]:
    return try_folder(loaded, program or loaded.program, folder, Silent())


def trials(out: Path) -> list[dict[str, Any]]:
    """All but what GenAI's tokenizer makes of words: it cannot read a tokenizer of whole words."""
    found: list[dict[str, Any]] = json.loads((out / "spinpass.json").read_text())["trials"]
    return [each for each in found if each["case"] != "its own tokenizer"]


def test_every_runtime_and_case_is_recorded(written: Path) -> None:
    found = trials(written)
    runtimes = ["onnxruntime", "OrtModel", *(["genai"] if GENAI else [])]
    judged = {(t["runtime"], t["case"]): t for t in found if not t["reason"]}
    assert set(judged) == {(runtime, case) for runtime in runtimes for case in CASES}
    for (_, case), each in judged.items():
        assert each["tokens"] == CASES[case] and each["error"] < 1e-5 < each["bound"]


@pytest.mark.skipif(not GENAI, reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("answer", ["", "1 2 3"], ids=["cannot", "otherwise"])
def test_a_tokenizer_that_genai_reads_otherwise_is_named(
    loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Not an error: GenAI may be given tokens."""
    if answer:
        monkeypatch.setattr("spinpass.runtime.genai_session._TOKENS", f"print({answer!r})")
    (found,) = [each for each in tried(loaded, folder) if each.case == "its own tokenizer"]
    assert ("makes other tokens" if answer else "cannot read this kind of tokenizer") in found.reason


def test_a_runtime_that_is_not_installed_is_recorded(
    loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinpass.folders.trial.find_spec", lambda name: None if "genai" in name else find_spec(name))
    found = [each for each in tried(loaded, folder) if each.reason]
    assert [(each.runtime, each.reason) for each in found] == [("genai", "onnxruntime_genai is not installed")]


def changed(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name.endswith(name))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize("name", ["o_proj.MatMul.weight", "norm.weight", "embed_tokens.weight"])
def test_a_wrong_weight_is_seen(loaded: LoadedModel, folder: Path, name: str) -> None:
    changed(folder, name, lambda array: array[::-1].copy() if array.ndim > 1 else array * np.float32(1.01))
    with pytest.raises(VerificationError, match=r"does not (compute|generate) what the program does \(onnxruntime, prompt\)"):
        tried(loaded, folder)


def test_not_a_number_is_seen(loaded: LoadedModel, folder: Path) -> None:
    changed(folder, "norm.weight", lambda array: array * np.float32("nan"))
    with pytest.raises(VerificationError, match="its logits are nan away"):
        tried(loaded, folder)


def test_a_mask_that_is_not_read_is_seen(loaded: LoadedModel, folder: Path) -> None:
    """Every single text is right: only the padded batch tells."""
    model = onnx.load(folder / "model.onnx")
    mask = next(i.name for i in model.graph.input if i.name == "attention_mask")
    open_mask = onnx.helper.make_node("Max", [mask, "one"], ["open"], "open_mask")
    one = numpy_helper.from_array(np.array(1, np.int64), "one")
    for node in model.graph.node:
        node.input[:] = ["open" if given == mask else given for given in node.input]
    model.graph.node.insert(0, open_mask)
    model.graph.initializer.append(one)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(VerificationError, match=r"\(onnxruntime, padded batch, row \d\)"):
        tried(loaded, folder)


def test_a_window_that_is_not_kept_is_seen(loaded: LoadedModel, source: Path, folder: Path, tmp_path: Path) -> None:
    """The folder of a model without a window: only the text that goes past it tells."""
    config = json.loads((source / "config.json").read_text())
    shutil.copytree(source, tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    export(tmp_path / "wide", tmp_path / "other", None, bits=16)
    with pytest.raises(VerificationError, match=rf"\(onnxruntime, (next turn|past {WINDOW} tokens)\)"):
        tried(loaded, tmp_path / "other")


@pytest.mark.skipif(not GENAI, reason="onnxruntime-genai is not installed")
def test_what_only_genai_reads_is_seen(loaded: LoadedModel, folder: Path) -> None:
    config = json.loads((folder / GENAI_CONFIG).read_text())
    config["model"]["decoder"]["inputs"]["past_key_names"] = "past.%d.key"
    (folder / GENAI_CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="ONNX Runtime GenAI .* cannot"):
        tried(loaded, folder)


def test_a_file_that_does_not_open_is_an_error(loaded: LoadedModel, folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match="cannot load"):
        tried(loaded, folder)


@pytest.mark.cold
def test_a_runtime_that_dies_is_an_error(loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "_CHILD", "import os, sys; print('the last words', file=sys.stderr, flush=True); os.abort()")
    with pytest.raises(ExportError, match=r"died \(signal 6\): the last words"):
        tried(loaded, folder)


def test_a_failed_trial_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise VerificationError("the written folder does not compute what the program does")

    out = tmp_path / "out"
    monkeypatch.setattr(folders_onnx, "try_folder", broken)
    with pytest.raises(VerificationError, match="written folder"):
        export(source, out, RotationConfig(), certify=False, bits=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cold
def test_without_a_certificate_the_folder_is_run_all_the_same(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", None, certify=False, bits=16)
    found = trials(tmp_path / "out")
    assert {t["reason"] for t in found} == {"switched off"} and all(t["tokens"] for t in found)


def test_a_program_without_a_cache_is_called_once(tmp_path: Path) -> None:
    export(program_folder(tmp_path) / "model.pt2", tmp_path / "out", None, bits=16)
    (found,) = trials(tmp_path / "out")
    assert (found["runtime"], found["case"], found["reason"]) == ("onnxruntime", "one call", "")
    assert found["error"] < found["bound"]


@pytest.mark.parametrize("scheme", quick(["w4g16-rtn", "w8-rtn-a8-head8-embed8", "w4-rtn-a4-kv4"], only=["w4-rtn-a4-kv4"]))
def test_integers_are_judged_by_the_simulated_program(source: Path, tmp_path: Path, scheme: str) -> None:
    export(source, tmp_path / "out", RotationConfig(), quantize=scheme)
    found = trials(tmp_path / "out")
    assert all(t["error"] < 1e-3 for t in found if t["runtime"] == "onnxruntime")


@pytest.mark.parametrize(
    ("scheme", "why"),
    [("w4g16-rtn", "does not compute what the program computes"), ("w4g16-rtn-a8", "stand for other values")],
    ids=["the file is compared", "its integers are"],
)
def test_integers_of_another_weight_never_appear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, why: str
) -> None:
    from spinpass.exporters.onnx.integers import weights

    packed_bits = weights.packed_bits
    monkeypatch.setattr(weights, "packed_bits", lambda q, bits: packed_bits(q, bits) ^ 16)
    with pytest.raises(VerificationError, match=why):
        export(source, tmp_path / "out", None, quantize=scheme)
    assert not (tmp_path / "out").exists()


def test_the_last_logits_are_those_of_the_last_token(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", None, last_logits=True, bits=16)
    found = trials(tmp_path / "out")
    assert all(not t["reason"] and t["error"] < 1e-3 for t in found)


# -- models whose texts are not those of others -----------------------------------------------------------------------


@pytest.mark.parametrize("positions", [8, 20])
def test_a_short_model_is_tried_with_what_it_holds(source: Path, tmp_path: Path, positions: int) -> None:
    """And each case that does not fit is named."""
    shutil.copytree(source, tmp_path / "model")
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": positions}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "out", None, bits=16)
    judged = {t["case"] for t in trials(tmp_path / "out") if not t["reason"]}
    left = {t["case"]: t["reason"] for t in trials(tmp_path / "out") if t["reason"]}
    assert judged | set(left) == set(CASES) and "prompt" in judged and "next turn" in left
    assert set(left.values()) == {f"the model ends at {positions} tokens"}


def test_positions_that_are_rows_of_a_table_are_no_tokens(tmp_path: Path) -> None:
    export(model_folder(tmp_path / "model", "gpt2"), tmp_path / "out", RotationConfig(), bits=16)
    found = trials(tmp_path / "out")
    assert {"prompt", "padded batch", "next turn"} <= {t["case"] for t in found if t["tokens"]}
    assert all(t["error"] < 1e-5 for t in found)


@pytest.mark.skipif(not GENAI, reason="onnxruntime-genai is not installed")
def test_an_end_token_that_no_logit_stands_for_keeps_genai_out(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((source / name).read_text()) | {"eos_token_id": [2, 1000]}
        (tmp_path / "model" / name).write_text(json.dumps(values))
    export(tmp_path / "model", tmp_path / "out", None, bits=16)
    about = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert about["genai"]["file"] is None and "token 1000" in about["genai"]["reason"]
    assert {t["runtime"] for t in about["trials"]} == {"onnxruntime", "OrtModel"}


def test_a_rounded_file_without_a_cache_is_judged(tmp_path: Path) -> None:
    source = program_folder(tmp_path) / "model.pt2"
    export(source, tmp_path / "out", None, quantize="w8-rtn-a8")
    (found,) = trials(tmp_path / "out")
    assert found["error"] < 0.05 and found["bound"] > found["error"]
    (tmp_path / "out" / "spinpass.json").unlink()
    changed(tmp_path / "out", "norm.weight", lambda array: array[::-1] * np.float32(3))
    loaded = load_model(source)
    with pytest.raises(VerificationError, match="an output is .* away"):
        try_folder(loaded, loaded.program, tmp_path / "out", Silent(), bound=KERNEL_BOUND)


@pytest.mark.parametrize("options", [{"quantize": "w4g16-rtn-a8"}, {"bits": 16, "kv_cache": "int8"}], ids=["a8", "cache"])
def test_what_only_a_run_proves_is_not_certified_without_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("spinpass.folders.room.free_memory", lambda: 1000)
    export(source, tmp_path / "out", RotationConfig(), **options)
    about = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert about["onnx"]["certificate"] is None and "it was not run: ONNX Runtime takes" in about["onnx"]["uncertified"]
