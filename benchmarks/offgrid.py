"""The demo's model with weights that lie on no grid: ``python -m benchmarks.offgrid OUT.gguf --spread 0.8``.

The only weights of SmolLM2-135M that a package carries come from a 4-bit file with blocks of 32, whose values such
blocks round without loss. A change of scales per channel takes every linear layer off that grid and leaves the function
as it is:

    q, k, v and gate, up:  W·diag(s), and the norm in front of them ÷ s
    down:  W·diag(s), up:  diag(1/s)·W       o:  W·diag(s), v:  diag(1/s)·W, a value head's s for each query head of it

with log s uniform in ± log of the spread, seeded. A wide spread handicaps what rounds the original a little; a narrow
one leaves some of the grid. The result is a GGUF file in float32, which llama.cpp reads as well, and is certified: both
programs return the same logits but for the rounding of the products W·s to float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import spinpass
from spinpass.cli.screen import Screen
from spinpass.folders import packaged_model
from spinpass.loading import load_model

SPREADS = (0.95, 0.8)  # the smaller end of s; the larger one is 1 ÷ 0.8 = 1.25
BOUND = 1e-5  # relative, of products that are rounded to float32
_KEPT = "general.architecture"  # which the writer sets itself
_DERIVED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.file_type", "general.quantization_version")
Arrays = Mapping[str, np.ndarray[Any, Any]]


def main(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write.")],
    spread: Annotated[float, typer.Option(help="The least scale of a channel; the largest is 1 ÷ it.")] = SPREADS[-1],
    seed: Annotated[int, typer.Option(help="Seed of the scales.")] = 0,
    gguf: Annotated[Path | None, typer.Option(help="The model, of the Llama family; the demo's if none.")] = None,
) -> None:
    """Write the model off the grid and prove that it is the same function."""
    with Screen(as_json=False).steps() as steps:
        steps.start("rescale")
        source = gguf or packaged_gguf()
        write(source, out, spread, seed)
        before, after = (load_model(str(path), cache=False, progress=steps.begin).program for path in (source, out))
        steps.start("certify")
        certificate = spinpass.verify(before, after, bound=BOUND)
    print(certificate.verdict)
    certificate.raise_if_failed()


def packaged_gguf() -> Path:
    """The file of the package that carries the demo's model."""
    return next(Path(packaged_model()).glob("*.gguf"))


def write(source: Path, out: Path, spread: float, seed: int = 0) -> Path:
    """Write the rescaled model to ``out``, its metadata as they were. ``spread`` = 1 rescales nothing."""
    from gguf import GGUFReader, GGUFWriter, dequantize

    reader = GGUFReader(source)
    values = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    heads = int(reader.fields["llama.attention.head_count"].contents())
    cached = int(reader.fields["llama.attention.head_count_kv"].contents())
    staging = out.with_suffix(f".{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(staging, reader.fields[_KEPT].contents())
    for name, field in reader.fields.items():
        if name not in (_KEPT, *_DERIVED):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    for name, array in rescaled(values, heads, cached, spread, seed).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, out)
    return out


def rescaled(
    values: Arrays, heads: int, cached: int, spread: float, seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors (out, in) by their names in GGUF, float32, of ``heads`` query and ``cached`` value heads."""
    found = {name: array.astype(np.float64) for name, array in values.items()}
    draw, repeats = np.random.default_rng(seed), heads // cached

    def scales(width: int) -> np.ndarray[Any, Any]:
        return np.exp(draw.uniform(-1, 1, width) * math.log(spread))

    for block in sorted({name.rsplit(".", 2)[0] for name in found if name.startswith("blk.")}):
        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            s = scales(len(found[f"{block}.{norm}.weight"]))
            found[f"{block}.{norm}.weight"] /= s
            for reader in readers:
                found[f"{block}.{reader}.weight"] *= s
        s = scales(found[f"{block}.ffn_up.weight"].shape[0])
        found[f"{block}.ffn_up.weight"] /= s[:, None]
        found[f"{block}.ffn_down.weight"] *= s
        s = scales(found[f"{block}.attn_v.weight"].shape[0])
        found[f"{block}.attn_v.weight"] /= s[:, None]
        by_head = np.repeat(s.reshape(cached, -1), repeats, axis=0)  # each query head reads the values of one
        found[f"{block}.attn_output.weight"] *= by_head.reshape(-1)
    return {name: array.astype(np.float32) for name, array in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
