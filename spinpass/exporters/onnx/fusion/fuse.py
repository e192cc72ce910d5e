"""Fusion into ONNX Runtime's own operators, on the graph that serves prompts and single tokens.

The order is that in which matches appear: rotary embeddings and norms are recognised as they are spelled; attention
carries both into its layout; a sum in front of a norm is taken into it last. The rotations' Hadamards and all roundings
are opaque nodes here, so that nothing is fused across them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from .attention import GQA, fuse_attention
from .builder import CONTRIB, Builder
from .lengths import free_caches
from .norm import NORM, SKIP, fuse_norms, fuse_skips
from .rotary import ROTARY, fuse_rotary


@dataclass(frozen=True)
class Fused:
    """It says how many nodes of each kind the graph got, in ``kept`` why some attention stayed as it was, and whether
    its ``caches`` may be longer than what is in them."""

    attention: int
    rotary: int
    norms: int
    skip_norms: int
    kept: tuple[str, ...]
    caches: bool

    @property
    def summary(self) -> str:
        """Say it in one line."""
        return (
            f"fused: {self.attention} GroupQueryAttention, {self.rotary} RotaryEmbedding, "
            f"{self.norms + self.skip_norms} norms ({self.skip_norms} with the sum in front)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self) | {"kept": list(self.kept)}


def fuse_model(model: ir.Model) -> Fused:
    """Fuse what can be fused in ``model``, in place. It computes the same function."""
    builder = Builder(model.graph)
    fuse_rotary(model.graph, builder)
    fuse_norms(model.graph, builder)
    _, kept = fuse_attention(model, builder)
    common.RemoveUnusedNodesPass()(model)
    fuse_skips(model.graph, builder)
    common.RemoveUnusedNodesPass()(model)
    caches = free_caches(model.graph, builder)
    common.CommonSubexpressionEliminationPass()(model)
    counts = {op: sum(node.op_type == op for node in model.graph) for op in (GQA, ROTARY, NORM, SKIP)}
    if counts[GQA] or counts[ROTARY] or counts[SKIP]:
        model.opset_imports[CONTRIB] = 1
    return Fused(counts[GQA], counts[ROTARY], counts[NORM], counts[SKIP], kept, caches)
