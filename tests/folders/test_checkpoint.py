"""Checkpoints of transformers with rotations folded in: what transformers computes, bit for bit what transform folds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spinpass
from spinpass.cli.app import app
from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.folders import Result, checkpoint, layouts, rotate_checkpoint
from spinpass.folders.gptq import check_rotation
from spinpass.formats import write_shards
from spinpass.formats.safetensors_header import safetensors_header
from spinpass.graph import Handle, Held, values_of
from spinpass.loading import load_model, reloaded_logits, streamed
from tests.support import folders
from tests.support.sweeps import quick


@pytest.fixture
def always_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the weights of tiny models stay in their files as well."""
    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    monkeypatch.setattr(streamed, "_SMALL", 8)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_shards_hold_what_they_are_given(tmp_path: Path, shard_bytes: int) -> None:
    from safetensors.torch import load_file

    whole = {
        "a.weight": torch.randn(5, 3).bfloat16(),
        "b": torch.arange(4),
        "c": torch.randn(7, 9).t(),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    lazy = whole | {"a.weight": Handle(Held(whole["a.weight"], torch.float32))}
    files = write_shards(tmp_path, lazy, shard_bytes=shard_bytes)
    assert sorted(files) == sorted(tmp_path.iterdir())
    read = {name: t for file in files if file.suffix == ".safetensors" for name, t in load_file(file).items()}
    assert read.keys() == whole.keys()
    for name, tensor in lazy.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], values_of(tensor)), name
    if shard_bytes == 100:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == whole.keys() and len(files) > 2
        for name, file in index["weight_map"].items():
            assert name in safetensors_header(tmp_path / file)


def test_a_dtype_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="x: safetensors files are written of BOOL"):
        write_shards(tmp_path, {"x": torch.zeros(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


# -- streamed loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    quick(
        ["llama_tied", "qwen3", "gemma3_text", "phi3", "gpt2", "granite", "gpt_neox"],
        only=["llama_tied", "phi3", "gpt2"],
    ),
)
@pytest.mark.parametrize("stored, dtype", [(torch.bfloat16, "float32"), (torch.float32, "float32")])
def test_a_streamed_program_has_the_values_of_a_loaded_one(
    always_streamed: None, tmp_path: Path, name: str, stored: torch.dtype, dtype: str
) -> None:
    from tests.support import models

    model: Any = models.build(name)
    model.to(stored).save_pretrained(tmp_path)
    folders.tokenizer().save_pretrained(tmp_path)
    lazy, plain = (load_model(tmp_path, dtype=dtype, streamed=s).program for s in (True, False))
    assert any(isinstance(tensor, Handle) for tensor in lazy.state_dict.values())
    assert lazy.state_dict.keys() == plain.state_dict.keys() and lazy.constants.keys() == plain.constants.keys()
    for held in ("state_dict", "constants"):
        for key, tensor in getattr(plain, held).items():
            assert tensor.dtype == getattr(lazy, held)[key].dtype
            assert torch.equal(values_of(getattr(lazy, held)[key]), tensor), key
    assert [str(n) for n in lazy.graph.nodes] == [str(n) for n in plain.graph.nodes]


def test_small_models_and_other_files_are_loaded(tmp_path: Path) -> None:
    folders.model_folder(tmp_path)
    program = load_model(tmp_path, streamed=True).program
    assert not any(isinstance(tensor, Handle) for tensor in program.state_dict.values())
    assert not streamed.can_stream([tmp_path / "pytorch_model.bin"])


# -- checkpoint to checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", quick(["llama_tied", "qwen3"], only=["llama_tied"]))
def test_a_rotated_checkpoint_is_the_same_model(
    always_streamed: None, tmp_path: Path, name: str, stored: torch.dtype
) -> None:
    from tests.support import models

    model: Any = models.build(name)
    model.to(stored).save_pretrained(tmp_path / "in")
    folders.tokenizer().save_pretrained(tmp_path / "in")
    result, written = rotate_checkpoint(tmp_path / "in", tmp_path / "out")
    assert written.manifest["trials"][0]["tokens"] == 20 and result.certificate is not None
    ids = list(range(3, 23))
    before, after = reloaded_logits(tmp_path / "in", ids), reloaded_logits(tmp_path / "out", ids)
    assert (before - after).abs().max() < (1e-4 if stored == torch.float32 else 0.1) * before.abs().max()
    found, given = weights_in(tmp_path / "out"), weights_in(tmp_path / "in")
    assert found.keys() - {"lm_head.weight"} == given.keys() - {"lm_head.weight"}
    changed = [key for key in given if not torch.equal(found[key], given[key])]
    assert any("embed" in key for key in changed) and any("v_proj" in key for key in changed)
    in_memory = spinpass.transform(load_model(tmp_path / "in", dtype="auto", cache=False).program, checkpoint.FOLDED)
    for key, tensor in in_memory.state_dict.items():
        assert torch.equal(found[key], tensor) and tensor.dtype == stored, key


@pytest.mark.parametrize(("stored", "asked"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_weights_in_another_dtype_than_the_original(tmp_path: Path, stored: torch.dtype, asked: str) -> None:
    """It is compared with the original in that dtype: otherwise the roundings of a half type would be its error."""
    saved(tmp_path / "in", dtype=stored)
    rotate_checkpoint(tmp_path / "in", tmp_path / "out", dtype=asked)
    assert {str(tensor.dtype) for tensor in weights_in(tmp_path / "out").values()} == {f"torch.{asked}"}
    found = CliRunner().invoke(app, ["verify", str(tmp_path / "in"), str(tmp_path / "out")])
    assert found.exit_code == 0 and "are the original's in the 3 declared bases" in found.stdout, found.stderr


def test_what_a_checkpoint_cannot_hold(tmp_path: Path) -> None:
    folders.model_folder(tmp_path / "in")
    with pytest.raises(ConfigError, match="R4"):
        rotate_checkpoint(tmp_path / "in", tmp_path / "out", spinpass.RotationConfig())
    with pytest.raises(ConfigError, match="no file or folder"):
        rotate_checkpoint(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.model_folder(tmp_path / "in")

    def wrong(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
        return write_shards(folder, {k: t * 1.01 if "v_proj" in k else t for k, t in tensors.items()})

    monkeypatch.setattr(layouts, "write_shards", wrong)
    with pytest.raises(VerificationError, match="computes other logits from what was written"):
        rotate_checkpoint(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr(layouts, "write_shards", lambda f, t: write_shards(f, dict(list(t.items())[1:])))
    with pytest.raises(VerificationError, match="does not load what was written as it is; missing keys"):
        rotate_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", ["q_proj", "o_proj", "input_layernorm"])
def test_a_wrong_weight_is_noticed_before_it_is_written(
    always_streamed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    """There is one proof, of the graph and the weights that are written."""
    rotated = checkpoint.rotated

    def spoiled(*args: Any, **options: Any) -> Any:
        found = rotated(*args, **options)
        state = found.program.state_dict
        name = next(name for name in state if layer in name)
        wrong = values_of(state[name]) * 1.25
        state[name] = torch.nn.Parameter(wrong, requires_grad=False)
        exact = {key: (lambda: wrong) if layer in key else compute for key, compute in found.exact.items()}
        return replace(found, exact=exact)

    monkeypatch.setattr(checkpoint, "rotated", spoiled)
    with pytest.raises(VerificationError, match="is another function"):
        rotate_checkpoint(saved(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_space_to_blame_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the rotation is none of the architecture."""
    from spinpass.graph import constants

    def wrong(compute: Any) -> Any:
        return lambda self: compute(self) * (1.3 if "v_proj" in self.fqn and self.steps else 1)

    for name in ("compute", "compute_float64"):
        monkeypatch.setattr(constants.Constant, name, wrong(getattr(constants.Constant, name)))
    with pytest.raises(VerificationError, match="the space to blame is"):
        rotate_checkpoint(saved(tmp_path / "in"), tmp_path / "out")


class Shifted(torch.nn.Module):
    """A buffer that no file holds: a loader makes it itself."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.register_buffer("pos", size * torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pos


def test_what_no_file_holds_is_not_rotated() -> None:
    before, after = (torch.export.export(Shifted(size).eval(), (torch.randn(2, 4),)) for size in (1.0, 2.0))
    loaded: Any = SimpleNamespace(program=before)
    check_rotation(loaded, Result(before))
    with pytest.raises(ConfigError, match="changes pos, which the model of the configuration makes itself"):
        check_rotation(loaded, Result(after))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "compressed-tensors"}, "nothing is quantized, and nothing is rotated online"),
        ({"layout": "gptq"}, "holds integers"),
    ],
)
def test_what_options_alone_decide_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=message):
        rotate_checkpoint(tmp_path, tmp_path / "out", **options)


def test_matrices_that_stay_in_floats_are_named(tmp_path: Path) -> None:
    _, written = rotate_checkpoint(saved(tmp_path / "in"), tmp_path / "out", quantize="w4g16-rtn", certify=False)
    assert "MB stay in floats: " in written.report.left and "embed_tokens" in "".join(written.report.floats)
    _, written = rotate_checkpoint(saved(tmp_path / "in"), tmp_path / "plain", certify=False)
    assert written.report.left == ""


def test_the_command(tmp_path: Path) -> None:
    folders.model_folder(tmp_path / "in")
    arguments = ["rotate-checkpoint", str(tmp_path / "in"), str(tmp_path / "out")]
    made = CliRunner().invoke(app, [*arguments, "--json"])
    assert made.exit_code == 0, made.stderr
    data = json.loads(made.stdout)
    assert data["ok"] and "model.safetensors" in data["files"]
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A checkpoint of transformers in safetensors" in card and "GPTQ" not in card
    again = CliRunner().invoke(app, [*arguments, "--rotations", "R2"])
    assert again.exit_code == 0 and "checkpoint of" in again.stdout, again.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


# -- what an adversary found ------------------------------------------------------------------------------------------


def saved(folder: Path, name: str = "llama_tied", dtype: torch.dtype = torch.float32) -> Path:
    from tests.support import models

    models.build(name).to(dtype).save_pretrained(folder)
    folders.tokenizer().save_pretrained(folder)
    return folder


def test_examples_are_computed_with_the_weights(always_streamed: None, tmp_path: Path) -> None:
    """The certificate draws from what was traced with: memory that nobody has written to says nothing."""
    saved(tmp_path)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    torch.use_deterministic_algorithms(True)
    try:
        lazy, plain = (load_model(tmp_path, streamed=streaming).program for streaming in (True, False))
    finally:
        torch.use_deterministic_algorithms(False)
    flat = [torch.utils._pytree.tree_flatten(program.example_inputs)[0] for program in (lazy, plain)]
    for ours, theirs in zip(*flat, strict=True):
        assert not isinstance(ours, torch.Tensor) or torch.allclose(ours, theirs, atol=1e-6)


def test_a_head_of_its_own_although_it_is_tied_by_the_configuration(always_streamed: None, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    saved(tmp_path / "in")
    tensors = weights_in(tmp_path / "in")
    table = next(tensor for name, tensor in tensors.items() if "embed" in name)
    save_file(tensors | {"lm_head.weight": torch.randn_like(table)}, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    lazy, plain = (load_model(tmp_path / "in", streamed=s, cache=False).program.state_dict for s in (True, False))
    for name, tensor in plain.items():
        assert torch.equal(values_of(lazy[name]), tensor), name


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_are_not_rounded_on_the_way(always_streamed: None, tmp_path: Path, mixed: bool) -> None:
    """The configuration says bfloat16, and files hold float32: all of them, or some."""
    from safetensors.torch import save_file

    saved(tmp_path)
    tensors = {k: t.bfloat16() if mixed and "q_proj" not in k else t for k, t in weights_in(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    lazy, plain = (load_model(tmp_path, streamed=s, cache=False).program.state_dict for s in (True, False))
    for name, tensor in plain.items():
        assert torch.equal(values_of(lazy[name]), tensor), name


def test_files_of_an_older_checkpoint_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "in")
    saved(tmp_path / "out", "qwen3")
    monkeypatch.setattr(layouts, "write_shards", lambda f, t: write_shards(f, t, shard_bytes=20_000))
    rotate_checkpoint(tmp_path / "in", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    ids = list(range(3, 23))
    before, after = reloaded_logits(tmp_path / "in", ids), reloaded_logits(tmp_path / "out", ids)
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
    rotate_checkpoint(tmp_path / "in", tmp_path / "out")
    write_shards(tmp_path / "out", weights_in(tmp_path / "in"))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]


def test_another_model_than_the_one_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "in")
    real = checkpoint.load_model

    def other(*args: Any, **options: Any) -> Any:
        loaded = real(*args, **options)
        for name, tensor in loaded.program.state_dict.items():
            if "down_proj" in name:
                tensor.data.mul_(1.5)
        return loaded

    monkeypatch.setattr(checkpoint, "load_model", other)
    with pytest.raises(VerificationError, match="than .*in gives"):
        rotate_checkpoint(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(("error", "kept"), [(ConfigError("no such layout"), False), (ExportError("the disk is full"), True)])
def test_what_was_rounded_is_kept_where_another_try_may_end_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kept: bool
) -> None:
    """The advice of a refusal, other options, would be refused as another run of what is kept."""

    def refused(*args: object) -> None:
        raise error from (OSError(28, "No space left on device") if kept else None)

    model, out = saved(tmp_path / "in"), tmp_path / "out"
    write = checkpoint.write_layout
    monkeypatch.setattr(checkpoint, "write_layout", refused)
    with pytest.raises(type(error)):
        rotate_checkpoint(model, out, quantize="w4g16-rtn", certify=False)
    assert [path.name for path in tmp_path.iterdir() if path.name != "in"] == ([".out.spinpass"] if kept else [])
    monkeypatch.setattr(checkpoint, "write_layout", write)
    rotate_checkpoint(model, out, quantize="w4g16-rtn" if kept else "w8g16-rtn", certify=False)
    assert (out / "config.json").is_file() and not (tmp_path / ".out.spinpass").exists()
