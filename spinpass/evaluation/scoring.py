"""Logits of an exported program for token ids, whatever else it takes: masks, positions, an empty cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError, first_line
from spinpass.execution import (
    InputRole,
    Watch,
    continued_inputs,
    execute,
    read_in_pieces,
    reading_inputs,
    reading_sizes,
    token_input,
    user_inputs,
)
from spinpass.formats import finish, runtime_file
from spinpass.graph import HOST, Device
from spinpass.loading import load_config, load_model, load_tokenizer, locate
from spinpass.runtime import ModelFolder

from .comparison import Scorer


@dataclass(frozen=True)
class Opened:
    """Something that scores, with its program (None where it is in ONNX Runtime) and its tokenizer."""

    scorer: Scorer
    program: ExportedProgram | None
    tokenizer: Any

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return token_ids(self.tokenizer)(text)


def token_ids(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from a text to its token ids, without special tokens, by a tokenizer of transformers."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class ProgramScorer:
    """Scores with a program that takes token ids and returns logits first, in its own dtype.

    Raises ConfigError where it is not clear which input takes the tokens.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._inputs = user_inputs(program)
        ids = token_input(self._inputs)
        if ids is None:
            names = ", ".join(spec.name for spec in self._inputs if spec.role is InputRole.LOOKUP) or "none"
            raise ConfigError(f"which input takes the token ids is not clear: looked up in tables are {names}")
        self._ids = ids

    @property
    def longest(self) -> int | None:
        """The longest text in tokens; None where the program names no limit."""
        length = self._ids.shape[-1]
        if self._takes_single_tokens:
            return None
        if isinstance(length, int):
            return length
        allowed = self.program.range_constraints.get(length)
        return int(allowed.upper) if allowed is not None and allowed.upper < 2**31 else None

    def inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        """The program's inputs by name: one sequence, every token of it seen, positions from 0, no cache."""
        tokens = torch.tensor([list(ids)], dtype=self._ids.dtype, device=self._ids.device)
        sizes = reading_sizes(self._inputs, self._ids, tokens)
        for symbol, allowed in self.program.range_constraints.items():  # a lower bound of 2 is an artefact of export
            size = symbol.subs(sizes)
            if size.is_number and size > allowed.upper:
                raise ConfigError(f"the program does not take {len(ids)} tokens: {symbol} is at most {allowed.upper}")
        return reading_inputs(self._inputs, self._ids, tokens, sizes)

    def logits(self, ids: Sequence[int], watch: Watch | None = None) -> Tensor:
        """Logits (length, vocabulary), float32. Raises ConfigError where the program does not take that many tokens.

        The watch sees every value, except where the program reads one token at a time.
        """
        if self._takes_single_tokens:
            return read_in_pieces(
                self.program, self._ids, torch.split(torch.tensor([list(ids)], device=self._ids.device), 1, 1)
            )[0].float()
        logits: Tensor = execute(self.program, self.inputs(ids), watch=watch).outputs[0]
        return logits[0].float()

    @property
    def _takes_single_tokens(self) -> bool:
        return self._ids.shape[-1] == 1 and bool(continued_inputs(self.program))


class OnnxScorer:
    """Scores with the ONNX file that a program was exported to, in ONNX Runtime; its inputs have their names in the
    program.

    Raises ExportError where ONNX Runtime cannot load it.
    """

    def __init__(self, program: ExportedProgram, path: Path) -> None:
        from spinpass import runtime

        self._program, self._ort = ProgramScorer(program), runtime
        self._session = runtime.open_session(path)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (length, vocabulary), float32."""
        taken = {node.name for node in self._session.get_inputs()}
        given = {name: value for name, value in self._program.inputs(ids).items() if name in taken}
        results = self._ort.run(self._session, {name: self._ort.to_ort(value) for name, value in given.items()})
        return self._ort.from_ort(results[0])[0].float()


def open_scorer(
    model: str,
    tokenizer: str | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    dequantize: bool = False,
    trust_remote_code: bool = False,
    device: Device = HOST,
) -> Opened:
    """Open a folder of a runtime in it, or anything that :func:`spinpass.loading.load_model` takes.

    ``tokenizer`` is a folder, where the model has none of its own; ``progress`` is called with the name of each step;
    the others are those of ``load_model``.

    Raises:
        ConfigError: there is no model, or no tokenizer.
        ExportError: the model cannot be loaded.
    """
    finish(Path(model))
    if is_exported(model):
        from spinpass.runtime import open_decoder

        decoder = open_decoder(model)
        return Opened(decoder, None, _tokenizer(tokenizer) if tokenizer else decoder.tokenizer)
    loaded = load_model(
        model,
        cache=False,
        dequantize=dequantize,
        trust_remote_code=trust_remote_code,
        device=device,
        progress=progress,
    )
    own = loaded.companions.tokenizer if loaded.companions else None
    if own is None and tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer; name a folder that has one with --tokenizer")
    return Opened(ProgramScorer(loaded.program), loaded.program, _tokenizer(tokenizer) if tokenizer else own)


def is_exported(model: str) -> bool:
    """Whether a model is for a runtime: a file of ONNX Runtime, OpenVINO or ExecuTorch, or a folder with one."""
    return runtime_file(model) is not None


def open_tokenizer(
    model: str, tokenizer: str | None = None, *, dequantize: bool = False, trust_remote_code: bool = False
) -> Any:
    """Open the tokenizer that :func:`open_scorer` would read texts with, without the model.

    Raises:
        ConfigError: there is no model, or no tokenizer.
        ExportError: transformers is missing, or the model's configuration says that it cannot be loaded.
    """
    file = runtime_file(model)
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"there is no file {model}: name a folder that spinpass export wrote")
        return _tokenizer(tokenizer) if tokenizer else ModelFolder(file.parent).tokenizer
    source = locate(model)
    load_config(source, dequantize=dequantize, trust_remote_code=trust_remote_code)
    if tokenizer:
        return _tokenizer(tokenizer)
    found = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if found is None:
        raise ConfigError(f"{model} has no tokenizer; name a folder that has one with --tokenizer")
    return found


def _tokenizer(name: str) -> Any:
    here = "" if Path(name).exists() else f"there is no folder {name} here, and "
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # files, hub and imports: no common base below Exception
        raise ConfigError(
            f"{here}transformers finds no tokenizer at {name}: {first_line(error)}; name another with --tokenizer"
        ) from error
