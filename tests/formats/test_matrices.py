"""SpinQuant's R.bin: read without running anything, and what its authors' code makes of it, reproduced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import spinpass
from spinpass import RotationConfig
from spinpass.cli.app import app
from spinpass.errors import ConfigError, DamageError
from spinpass.folders import FOLDED, rotate_checkpoint
from spinpass.formats import read_matrices
from spinpass.loading import load_model
from tests.support import folders


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0].contiguous()


def saved(path: Path, hidden: int, head: int, layers: int) -> dict[str, Tensor]:
    """What ``optimize_rotation.py`` saves; layers in an order that is none, as a dict may have them."""
    given = {f"model.layers.{k}.self_attn.R2": orthogonal(head, k + 1) for k in reversed(range(layers))}
    torch.save({**given, "R1": orthogonal(hidden, 0)}, path)
    return {**given, "R1": orthogonal(hidden, 0)}


def as_spinquant_does(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its weights, by the formulas of its authors' eval_utils/rotation_utils.py after utils/fuse_norm_utils.py, without
    what is no rotation: the mean that they take off the embedding, and the Hadamard of R4."""
    found = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    layers = model.config.num_hidden_layers
    for k in range(layers):
        at = f"model.layers.{k}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj")),
        ):
            for name in readers:
                found[f"{at}{name}.weight"] *= found[f"{at}{norm}.weight"]
            found[f"{at}{norm}.weight"] = torch.ones_like(found[f"{at}{norm}.weight"])
    found["lm_head.weight"] *= found["model.norm.weight"]
    found["model.norm.weight"] = torch.ones_like(found["model.norm.weight"])
    r1 = given["R1"].double()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = found[name] @ r1
    for k in range(layers):
        at, r2 = f"model.layers.{k}.", given[f"model.layers.{k}.self_attn.R2"].double()
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"):
            found[f"{at}{name}.weight"] = found[f"{at}{name}.weight"] @ r1
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"{at}{name}.weight"] = r1.T @ found[f"{at}{name}.weight"]
        v, o = f"{at}self_attn.v_proj.weight", f"{at}self_attn.o_proj.weight"
        transposed = found[v].t()
        found[v] = (transposed.reshape(-1, transposed.shape[-1] // len(r2), len(r2)) @ r2).reshape(transposed.shape).t()
        found[o] = (found[o].reshape(-1, found[o].shape[-1] // len(r2), len(r2)) @ r2).reshape(found[o].shape)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import models

    folder = tmp_path_factory.mktemp("model")
    models.build("llama_tied").save_pretrained(folder)
    folders.tokenizer().save_pretrained(folder)
    return folder


def sizes(model: Path) -> tuple[Any, int, int, int]:
    import transformers

    made = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return made, made.config.hidden_size, made.config.head_dim, made.config.num_hidden_layers


def test_weights_are_those_of_spinquant(model: Path, tmp_path: Path) -> None:
    made, *about = sizes(model)
    given = saved(tmp_path / "R.bin", *about)
    config = RotationConfig(rotations="R1,R2", form="offline", tied="untie", matrices=read_matrices(tmp_path / "R.bin"))
    result = spinpass.rotate(load_model(model, cache=False).program, config)
    assert result.certificate is not None and result.certificate.ok
    expected = as_spinquant_does(made, given)
    for name, tensor in result.program.state_dict.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max())), name
        original = made.state_dict()[name].double()
        assert "proj" not in name or not torch.allclose(original, expected[name], atol=1e-2), name


def test_a_checkpoint_by_matrices_of_spinquant(model: Path, tmp_path: Path) -> None:
    made, *about = sizes(model)
    given = saved(tmp_path / "R.bin", *about)
    found = CliRunner().invoke(
        app, ["rotate-checkpoint", str(model), str(tmp_path / "out"), "--matrices", str(tmp_path / "R.bin"), "--json"]
    )
    assert found.exit_code == 0, found.output
    from safetensors.torch import load_file

    expected = as_spinquant_does(made, given)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max())), name
    command = ["verify", str(model), str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "matrices were given for R1, R2, and now for none" in refused.stderr
    proved = CliRunner().invoke(app, [*command, "--matrices", str(tmp_path / "R.bin")])
    assert proved.exit_code == 0 and "in the 3 declared bases, at worst 0 roundings off" in proved.stdout, proved.stderr


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r.pop("model.layers.1.self_attn.R2"), "there are 1 matrices for R2, and 2 spaces for it"),
        (lambda r: r.update({"model.layers.2.self_attn.R2": r["model.layers.0.self_attn.R2"]}), "there are 3 matrices for R2"),
        (lambda r: r.update(R1=torch.eye(24)), "R1:residual: the matrix is 24×24, the space has size"),
    ],
    ids=["fewer", "more", "shape"],
)  # fmt: skip
def test_matrices_of_another_model(model: Path, tmp_path: Path, change: Any, why: str) -> None:
    _, *about = sizes(model)
    given = saved(tmp_path / "R.bin", *about)
    change(given)
    torch.save(given, tmp_path / "R.bin")
    config = RotationConfig(
        rotations="R1,R2", form="offline", tied="untie", matrices=read_matrices(tmp_path / "R.bin")
    )
    with pytest.raises(ConfigError, match=why):
        spinpass.plan(load_model(model, cache=False).program, config)
    with pytest.raises(ConfigError, match=why):
        rotate_checkpoint(model, tmp_path / "out", config)
    assert not (tmp_path / "out").exists() and FOLDED.matrices == {}


@pytest.mark.parametrize(
    ("held", "why"),
    [
        ({"R1": torch.eye(4) * 1.01}, "R1: the matrix is not orthogonal: max"),
        ({"R1": torch.eye(4)[:3]}, "R1: a rotation matrix must be square"),
        ({"R1": torch.eye(4, dtype=torch.float16)}, "R1: a rotation matrix must be float32 or float64"),
        ({"R1": torch.eye(4), "lm_head.weight": torch.eye(4)}, "holds 'lm_head.weight', which is named after no rotation"),
        ({"a.1.R2": torch.eye(4), "b.1.R2": torch.eye(4)}, "and another R2 of the same place"),
        ({}, "holds no rotation matrix"),
        ([torch.eye(4)], "holds no matrices by name"),
        ({"R1": 3}, "holds no matrices by name"),
    ],
    ids=["scaled", "shape", "half", "name", "twice", "empty", "list", "number"],
)  # fmt: skip
def test_files_that_hold_something_else(tmp_path: Path, held: Any, why: str) -> None:
    torch.save(held, tmp_path / "R.bin")
    with pytest.raises(ConfigError, match=why):
        read_matrices(tmp_path / "R.bin")


class Runs:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_damaged_files_and_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "R.bin"
    with pytest.raises(ConfigError, match="there is no file"):
        read_matrices(path)
    torch.save({"R1": Runs()}, path)
    with pytest.raises(DamageError, match="without running code"):
        read_matrices(path)
    assert capsys.readouterr().out == ""
    torch.save({"R1": torch.eye(64)}, path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DamageError):
        read_matrices(path)
    path.write_bytes(b"no matrices")
    with pytest.raises(DamageError):
        read_matrices(path)


def test_what_cannot_be_read_is_told_without_the_advice_to_run_it(tmp_path: Path) -> None:
    (tmp_path / "R.bin").write_text("some text")
    with pytest.raises(DamageError, match="R.bin holds no matrices that can be read without running code: it is damaged") as told:
        read_matrices(tmp_path / "R.bin")
    assert "weights_only" not in str(told.value)
    (tmp_path / "bases.json").write_text('{"spinpass": ' + "[" * 100_000)
    with pytest.raises(DamageError, match="bases.json is nested too deeply"):
        read_matrices(tmp_path / "bases.json")


@pytest.mark.parametrize("matrix", [torch.eye(4).to_sparse(), torch.empty(4, 4, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_values_of_their_own_are_refused(tmp_path: Path, matrix: torch.Tensor) -> None:
    torch.save({"R1": matrix}, tmp_path / "R.bin")
    with pytest.raises(ConfigError, match="R1 is no plain tensor with its values"):
        read_matrices(tmp_path / "R.bin")
