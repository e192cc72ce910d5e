"""The values of a checkpoint of integers in a program of the same model, as floats or with their integers kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.formats import GptqCheckpoint
from spinpass.graph import ProgramEditor
from spinpass.passes import open_program
from spinpass.quantization import (
    GROUP_SIZES,
    Codes,
    QuantizationReport,
    Quantized,
    QuantizedWeight,
    Weights,
    weight_sites,
)


class StoredCodes(Protocol):
    """A checkpoint: the codes of its weights, and its other tensors, by parameter name."""

    @property
    def codes(self) -> Mapping[str, Codes]: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


def dequantize_checkpoint(program: ExportedProgram, checkpoint: StoredCodes, *, strict: bool = True) -> ExportedProgram:
    """Make a floating-point program with the checkpoint's values, which can be rotated and quantized again.

    Products (q − z)·s are computed in float32 and cast once to the dtype of the program's constant.

    Args:
        program: a program of the same model, with any values; parameters are matched by name. It is not changed.
        checkpoint: what :func:`spinpass.formats.read_gptq` or :func:`spinpass.formats.read_compressed_tensors` found.
        strict: every parameter must be in the checkpoint; otherwise the others keep the program's values.

    Raises:
        ConfigError: the program lacks a name, a shape differs, there are two values for one shared constant, or
            (``strict``) the checkpoint lacks a parameter.
    """
    analysed = open_program(program)
    dims = {analysed.fqn(site.weight): site.dim for site in weight_sites(analysed)[0]}
    editor = ProgramEditor(program)
    named = _by_name(editor)
    given: dict[Node, Tensor] = {}
    for name, tensor in _dequantized(checkpoint, dims):
        node = named.get(name)
        if node is None:
            if name.endswith(".bias") and not tensor.any():  # some writers give every module one
                continue
            raise ConfigError(f"the checkpoint has {name}, which the program has not; export the same model")
        if tensor.shape != node.meta["val"].shape:
            raise ConfigError(
                f"{name} is {list(tensor.shape)} in the checkpoint and {list(node.meta['val'].shape)} in the program"
            )
        if node in given and not torch.equal(given[node], tensor):
            raise ConfigError(f"{name} shares its constant in the program, but not in the checkpoint; untie it first")
        given[node] = tensor
    if strict:
        _check_complete(editor, named, given)
    for node, tensor in given.items():
        editor.queue(node, lambda _, new=tensor: new.double())  # type: ignore[misc]
    return editor.finish()


def quantized_checkpoint(program: ExportedProgram, checkpoint: GptqCheckpoint, *, strict: bool = True) -> Quantized:
    """Return the checkpoint as if :func:`spinpass.quantization.quantize` had returned it.

    Its integers stay, and can be packed (:func:`spinpass.quantization.pack`) and written again. Scales become float32;
    errors are not known (NaN). Arguments and errors are those of :func:`dequantize_checkpoint`.
    """
    loaded = dequantize_checkpoint(program, checkpoint, strict=strict)
    analysed = open_program(loaded)
    dims = {analysed.fqn(site.weight): site.dim for site in weight_sites(analysed)[0]}
    weights = {
        name: QuantizedWeight(_widened(codes), dims.get(name, 1), _scheme(codes), float("nan"))
        for name, codes in checkpoint.codes.items()
    }
    before = sum(t.nbytes for t in loaded.state_dict.values())
    saved = sum(loaded.state_dict[name].nbytes - weight.codes.nbytes for name, weight in weights.items())
    return Quantized(loaded, QuantizationReport(weights, (), (), {}, before, before - saved))


def _scheme(codes: Codes) -> Weights:
    """Say how a weight was quantized, as far as its layout tells: a group size that is none of ours is left out."""
    columns, groups = codes.q.shape[1], codes.scales.shape[1]
    size = -(-columns // groups)
    listed = size if groups > 1 and size in GROUP_SIZES else None
    return Weights(codes.bits, listed, codes.symmetric, act_order=codes.index is not None)


def _widened(codes: Codes) -> Codes:
    """Return the codes with scales in float32, in which every product (q − z)·s of a half type is exact."""
    return replace(codes, scales=codes.scales.float())


def _dequantized(checkpoint: StoredCodes, dims: Mapping[str, int]) -> Iterable[tuple[str, Tensor]]:
    yield from checkpoint.tensors.items()
    for name, codes in checkpoint.codes.items():
        matrix = _widened(codes).dequantized()
        yield name, matrix if dims.get(name, 1) == 1 else matrix.T


def _by_name(editor: ProgramEditor) -> dict[str, Node]:
    """Return the constants of a program by every name they are stored under."""
    stored = [node for node in editor.nodes if editor.is_stored(node)]
    found: dict[str, Node] = {}
    for node in sorted(stored, key=lambda n: -len(editor.fqns(n))):  # the one that stands for its aliases first
        for fqn in editor.fqns(node):
            found.setdefault(fqn, node)
    return found


def _check_complete(editor: ProgramEditor, named: Mapping[str, Node], given: Mapping[Node, Tensor]) -> None:
    for spec in editor.inputs:
        if spec.kind == InputKind.PARAMETER and spec.target is not None and named[spec.target] not in given:
            raise ConfigError(
                f"the checkpoint has no {spec.target}; give strict=False to keep what the program has there"
            )
