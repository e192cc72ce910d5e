"""``generate`` as transformers has it, on a folder that ONNX Runtime runs: batches, padding, streamers.

To try and to measure a file, one sequence at a time, there is :mod:`.decoder`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.formats import model_path

from .decoding import new_tokens
from .model_folder import ModelFolder
from .onnx_graph import DecoderGraph
from .sampling import Sampling
from .text_pieces import Pieces


class OrtModel:
    """A decoder that takes and returns token ids as transformers does.

    Args:
        graph: what ONNX Runtime runs.
        folder: knows the tokenizer, the end tokens and the longest sequence.
    """

    def __init__(self, graph: DecoderGraph, folder: ModelFolder) -> None:
        self.graph = graph
        self.folder = folder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, provider: str = "CPUExecutionProvider", threads: int | None = None
    ) -> OrtModel:
        """Load ``model.onnx`` of a folder, or the ``.onnx`` file itself.

        Args:
            folder: the one or the other.
            provider: ONNX Runtime's name of what computes.
            threads: how many of the CPU. None leaves the number to ONNX Runtime.

        Raises:
            ExportError: no model is there, ONNX Runtime cannot load it or lacks an operator of it, or it is no decoder
                with a cache.
            VerificationError: its rotations are not those that it or ``spinpass.json`` beside it names.
            ConfigError: ONNX Runtime does not have ``provider``.
        """
        path = model_path(folder)
        return cls(DecoderGraph.open(path, provider, threads), ModelFolder(path.parent))

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, see :attr:`.ModelFolder.tokenizer`."""
        return self.folder.tokenizer

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Collection[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
    ) -> Tensor:
        """Continue token ids.

        Args:
            input_ids: of an integer dtype, (batch, length).
            attention_mask: (batch, length), 0 for padding on either side. A graph that takes a mask runs all rows
                together; otherwise those of the same length are: none sees another's padding.
            max_new_tokens: how many at most.
            do_sample: draw each token. Otherwise the likeliest is taken.
            temperature: what logits are divided by before a token is drawn.
            top_k: how many of the likeliest tokens it is drawn from. 0 draws from all.
            top_p: the share of the probability, of the likeliest tokens first, that it is drawn from.
            seed: of the draws.
            eos_token_id: what ends a sequence. None takes what the folder names, and an empty collection ends none.
            pad_token_id: what follows the end of a sequence. None takes what the folder names, else an end token, or 0
                if there is none.
            streamer: has ``put(ids)`` and ``end()``, as those of transformers. It takes one sequence.

        Returns:
            The ids and what follows, (batch, length + new), in the dtype of ``input_ids``.

        Raises:
            ConfigError: no tokens, a mask with holes, more tokens than the model has positions, options out of range,
                or a streamer for several sequences.
        """
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ConfigError(f"input_ids of shape {list(input_ids.shape)}: (batch, length) with tokens is expected")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} is less than 1")
        if streamer is not None and len(input_ids) > 1:
            raise ConfigError(f"a streamer takes one sequence, not {len(input_ids)}")
        sampling = Sampling(temperature, top_k, top_p, seed) if do_sample else Sampling()
        spans = _spans(input_ids, attention_mask)
        self.folder.check_length(max(stop - start for start, stop in spans), max_new_tokens)
        stop_at = self._ends(eos_token_id)
        pad = next((p for p in (pad_token_id, self.folder.pad_token) if p is not None), min(stop_at, default=0))
        new = torch.full((len(input_ids), max_new_tokens), pad, dtype=input_ids.dtype)
        if streamer is not None:
            streamer.put(input_ids)
        longest = 0
        for rows, prompt, mask in self._batches(input_ids, spans, pad):
            found = new_tokens(self.graph, prompt, max_new_tokens, sampling, stop_at, pad, mask)
            for count, tokens in enumerate(found):
                new[rows, count] = tokens.to(new.dtype)
                longest = max(longest, count + 1)
                if streamer is not None:
                    streamer.put(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, new[:, :longest]], 1)

    def stream(self, text: str, *, max_new_tokens: int = 20, sampling: Sampling | None = None) -> Iterator[str]:
        """What follows ``text``, piece by piece, up to an end token, which is not shown.

        Raises:
            ConfigError: no tokens, or more than the model has positions.
            ExportError: the folder has no tokenizer.
        """
        ids = torch.tensor([self.tokenizer(text)["input_ids"]], dtype=torch.int64)
        if not ids.numel():
            raise ConfigError("there are no tokens to start from: give at least one")
        self.folder.check_length(ids.shape[1], max_new_tokens)
        ends = self.folder.end_tokens
        pieces = Pieces(self.tokenizer)
        for token in new_tokens(self.graph, ids, max_new_tokens, sampling or Sampling(), ends):
            if int(token) not in ends:
                yield from pieces.add(int(token))
        yield from pieces.rest()

    def _batches(
        self, ids: Tensor, spans: list[tuple[int, int]], pad: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Yield rows that are run together, their tokens with padding in front, and the mask that says where."""
        lengths = {stop - start for start, stop in spans}
        together = self.graph.takes_padding and len(lengths) > 1
        for group in [sorted(lengths)] if together else [[length] for length in sorted(lengths)]:
            rows = [i for i, (start, stop) in enumerate(spans) if stop - start in group]
            longest = group[-1]
            prompt = torch.full((len(rows), longest), pad, dtype=torch.int64)
            mask = torch.zeros_like(prompt)
            for at, row in enumerate(rows):
                start, stop = spans[row]
                prompt[at, longest - (stop - start) :] = ids[row, start:stop]
                mask[at, longest - (stop - start) :] = 1
            yield rows, prompt, mask if together else None

    def _ends(self, given: int | Collection[int] | None) -> frozenset[int]:
        if given is None:
            return self.folder.end_tokens
        return frozenset([given] if isinstance(given, int) else given)


def _spans(ids: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    """(start, stop) of the tokens of each row that are no padding. Raises ConfigError where a row has none or holes."""
    if mask is None:
        return [(0, ids.shape[1])] * len(ids)
    if mask.shape != ids.shape:
        raise ConfigError(f"attention_mask of shape {list(mask.shape)} beside input_ids of {list(ids.shape)}")
    spans = []
    for row, kept in enumerate(mask.bool()):
        places = kept.nonzero().flatten().tolist()
        if not places or places[-1] - places[0] + 1 != len(places):
            raise ConfigError(f"row {row} of attention_mask has {'holes' if places else 'no token'}")
        spans.append((places[0], places[-1] + 1))
    return spans
