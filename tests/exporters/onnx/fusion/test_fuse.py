"""Fused ONNX graphs: what is fused in which decoder, what is not and why, and that it computes the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass.errors import ExportError
from spinpass.exporters.onnx import writer as exporter
from spinpass.quantization import quantize
from spinpass.runtime.onnx_session import open_session, run_session, to_ort
from tests.support import models

GQA, ROTARY = "GroupQueryAttention", "RotaryEmbedding"


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return models.export_hf_cache(models.build("llama"))


@pytest.mark.parametrize("form", ["offline", "online"])
def test_a_rotated_decoder(program: ExportedProgram, tmp_path: Path, form: Any) -> None:
    rotated = spinpass.transform(program, spinpass.RotationConfig(form=form))
    plain = exporter.export(rotated, tmp_path / "plain.onnx")
    report = exporter.export(rotated, tmp_path / "fused.onnx", fuse=True)
    assert report.fused is not None and report.certificate is not None and report.certificate.ok
    assert report.fused.to_dict() == {"attention": 2, "rotary": 4, "norms": 1, "skip_norms": 4, "kept": [], "caches": False}
    assert report.hadamards == plain.hadamards  # R3 between rotary and attention, R4, R1
    found = ops(report.path)
    assert found["Softmax"] == found["Transpose"] == found["Pow"] == 0
    assert sum(count for op, count in found.items() if op.startswith("Hadamard")) == report.hadamards
    metadata = open_session(report.path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["spinpass.fused"])["attention"] == 2
    assert plain.fused is None and "spinpass.fused" not in open_session(plain.path).get_modelmeta().custom_metadata_map


CASES = {
    "qwen3": Counter({GQA: 2, ROTARY: 4, "SkipSimplifiedLayerNormalization": 4}),  # norms of the heads before RoPE
    "gemma2": Counter({GQA: 2, ROTARY: 4}),  # capped scores, a window in every other layer, norms of (1 + w)
    "granite": Counter({GQA: 0, ROTARY: 4}),  # heads of 12
    "gptj": Counter({GQA: 0, ROTARY: 0}),
    "stablelm": Counter({GQA: 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_other_decoders(tmp_path: Path, name: str) -> None:
    program = models.export_hf_cache(models.build(name))
    report = exporter.export(program, tmp_path, fuse=True)
    found = ops(report.path)
    assert report.fused is not None and report.certificate is not None and report.certificate.ok
    assert {op: found[op] for op in CASES[name]} == CASES[name]
    assert len(report.fused.kept) == found["Softmax"] == 2 - CASES[name][GQA]


def attributes(path: Path) -> list[dict[str, Any]]:
    graph = ir.load(path).graph
    return [{k: a.value for k, a in n.attributes.items()} for n in graph if n.op_type == GQA]


def test_window_cap_and_scale_are_those_of_the_graph(tmp_path: Path) -> None:
    model = models.build("gemma2", query_pre_attn_scalar=25, attn_logit_softcapping=7.5, sliding_window=11)
    report = exporter.export(models.export_hf_cache(model), tmp_path, fuse=True)
    first, second = attributes(report.path)
    assert first["local_window_size"] == 11 and "local_window_size" not in second
    assert first["softcap"] == 7.5 and first["scale"] == pytest.approx(0.2)


def test_a_window_is_seen_beyond_its_length(tmp_path: Path) -> None:
    """More keys than the window holds, which the certificate's own inputs need not have."""
    program = models.export_hf_cache(models.build("gemma2", sliding_window=11))
    files = [exporter.export(program, tmp_path / f"{fuse}.onnx", fuse=fuse).path for fuse in (False, True)]
    results = [run_session(session, feed(session, 1, 3, 40)) for session in map(open_session, files)]
    assert all(size != "2" for given in open_session(files[0]).get_inputs() for size in given.shape)
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(torch.from_numpy(fused.numpy()), torch.from_numpy(plain.numpy()), atol=1e-4, rtol=0)


def feed(session: Any, batch: int, tokens: int, past: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for given in session.get_inputs():
        if len(given.shape) == 4:
            made[given.name] = torch.randn(batch, given.shape[1], past, given.shape[3], generator=generator)
        elif given.name == "position_ids":
            made[given.name] = torch.arange(past, past + tokens).expand(batch, -1)
        elif len(given.shape) == 2:
            made[given.name] = torch.randint(3, 90, (batch, tokens), generator=generator)
        else:
            made[given.name] = torch.tensor(past)
    return {name: to_ort(value) for name, value in made.items()}


def test_several_tokens_on_a_cache_are_for_one_sequence(program: ExportedProgram, tmp_path: Path) -> None:
    session = open_session(exporter.export(program, tmp_path, fuse=True).path)
    for batch, tokens, past in ((2, 3, 0), (2, 1, 5), (1, 3, 5)):
        run_session(session, feed(session, batch, tokens, past))
    with pytest.raises(ExportError, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        run_session(session, feed(session, 2, 3, 5))


def test_a_quantized_cache_program_stays_what_it_is(program: ExportedProgram, tmp_path: Path) -> None:
    """Roundings of keys and values are opaque nodes in front of the attention."""
    rotated = spinpass.transform(program, spinpass.RotationConfig(form="online"))
    made = quantize(rotated, "a8-kv4", []).program
    results = []
    for fuse in (False, True):
        report = exporter.export(made, tmp_path / f"{fuse}.onnx", fuse=fuse, verify=False)
        session = open_session(report.path)
        results.append([torch.from_numpy(value.numpy()) for value in run_session(session, feed(session, 2, 6, 0))])
        assert ops(report.path)[GQA] == (2 if fuse else 0)
        assert sum(n for op, n in ops(report.path).items() if op.startswith("RoundTokens")) > 4
    # what lies at a tie may be rounded either way, and one step of four bits is large
    agreeing = [(a - b).abs().lt(1e-4).float().mean() for a, b in zip(*results, strict=True)]
    assert min(agreeing[1:]) > 0.99


# -- graphs made for the purpose --------------------------------------------------------------------------------------

HEADS, KV, SIZE = 4, 2, 16


class Attention(nn.Module):
    """One attention with a cache; `mask` (tokens, past, padding) -> what scaled_dot_product_attention takes."""

    def __init__(self, mask: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.mask = mask
        self.table = nn.Embedding(96, (HEADS + 2 * KV) * SIZE)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: Tensor, padding: Tensor, past_k: Tensor, past_v: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        batch, tokens, _ = x.shape
        torch._check(padding.shape[1] == tokens + past_k.shape[2])
        q, k, v = (
            part.transpose(1, 2) for part in x.view(batch, tokens, HEADS + 2 * KV, SIZE).split([HEADS, KV, KV], 2)
        )
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        rows = torch.arange(tokens)[:, None] + past_k.shape[2]
        mask = self.mask(rows, torch.arange(tokens + past_k.shape[2])[None], padding)
        wide = [y[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).reshape(batch, HEADS, -1, SIZE) for y in (k, v)]
        y = nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask)
        return {"y": y.transpose(1, 2).reshape(batch, tokens, HEADS * SIZE), "k": k, "v": v}


def exported(mask: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> ExportedProgram:
    batch, tokens, past = 2, 3, 5
    args = (
        torch.randint(0, 96, (batch, tokens)), torch.ones(batch, tokens + past, dtype=torch.long),
        torch.randn(batch, KV, past, SIZE), torch.randn(batch, KV, past, SIZE),
    )  # fmt: skip
    size = Dim.DYNAMIC
    shapes = ({0: size, 1: size}, {0: size, 1: size}, {0: size, 2: size}, {0: size, 2: size})
    return torch.export.export(Attention(mask), args, dynamic_shapes=shapes)


def causal(rows: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
    return (keys <= rows)[None, None]


def padded(rows: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
    return (keys <= rows) & padding[:, None, None].bool()


def sloped(rows: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
    return torch.where(keys <= rows, -0.1 * (rows - keys), -3.4e38)[None, None]


@pytest.mark.parametrize(("mask", "with_bias"), [(causal, False), (padded, True), (sloped, True)])
def test_masks_that_look_back_only(tmp_path: Path, mask: Any, with_bias: bool) -> None:
    report = exporter.export(exported(mask), tmp_path, fuse=True)
    assert report.fused is not None and report.fused.attention == 1 and report.certificate is not None
    (node,) = (n for n in onnx.load(report.path).graph.node if n.op_type == GQA)
    assert (len(node.input) == 11) == with_bias


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tmp_path: Path, side: str) -> None:
    program = exported(padded)
    session = open_session(exporter.export(program, tmp_path, fuse=True).path)
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    real = padding.bool()
    ids, empty = torch.randint(0, 96, (2, 6)), torch.zeros(2, KV, 0, SIZE)
    values = dict(zip([i.name for i in session.get_inputs()], (ids, padding, empty, empty), strict=True))
    found = torch.from_numpy(run_session(session, {name: to_ort(v) for name, v in values.items()})[0].numpy())
    expected = Attention(padded)(ids, padding, empty, empty)["y"]
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


REFUSED = {
    "it has no mask: a token sees later ones": lambda rows, keys, padding: None,
    "its mask lets a token see later ones": lambda rows, keys, padding: (keys <= rows + 1)[None, None],
    "its mask lets a token see": lambda rows, keys, padding: ((keys <= rows) | (keys < 2))[None, None],
    "its mask is not of the shape": lambda rows, keys, padding: keys <= rows,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_masks_that_are_not_fused(tmp_path: Path, reason: str) -> None:
    report = exporter.export(exported(REFUSED[reason]), tmp_path, fuse=True)
    assert report.fused is not None and report.fused.attention == 0
    assert len(report.fused.kept) == 1 and reason in report.fused.kept[0]
    assert report.certificate is not None and report.certificate.ok
