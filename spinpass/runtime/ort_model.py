"""``generate`` as transformers has it, on a folder that ONNX Runtime runs: batches, padding, streamers, caches.

What may be asked of it is told in :mod:`.search`. To try and to measure a file, one sequence at a time, there is
:mod:`.decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError, first_line
from spinpass.formats import model_path

from .decoding import Reading, new_tokens
from .model_folder import ModelFolder
from .onnx_graph import DecoderGraph
from .search import Search, SearchOptions, Wishes, settings
from .text_pieces import Pieces, StopText

if TYPE_CHECKING:
    from typing_extensions import Unpack

_WHERE = "generation_config.json"


@dataclass(frozen=True)
class Past:
    """What a model has read, to be given back to ``generate`` as ``past_key_values``, as often as one likes."""

    graph: DecoderGraph
    reading: Reading

    def copied(self) -> Reading:
        """The same, to go on from."""
        return replace(self.reading, state=self.reading.state.copied())


@dataclass(frozen=True)
class GeneratedTokens:
    """What :meth:`OrtModel.generate` returns with ``return_dict_in_generate``.

    Args:
        sequences: the ids and what follows, (batch, length + new).
        past_key_values: what has been read of them, which is all but the last token; None where rows of different
            length were run one after the other.
    """

    sequences: Tensor
    past_key_values: Past | None


class OrtModel:
    """A decoder that takes and returns token ids as transformers does.

    Args:
        graph: what ONNX Runtime runs.
        folder: knows the tokenizer, the end tokens and the longest sequence.
        generation_config: what counts where a call says nothing: a GenerationConfig, or a mapping. None takes
            generation_config.json of the folder, as transformers does, and ``{}`` nothing.
    """

    def __init__(self, graph: DecoderGraph, folder: ModelFolder, *, generation_config: Any = None) -> None:
        self.graph = graph
        self.folder = folder
        self.generation_config = generation_config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        generation_config: Any = None,
    ) -> OrtModel:
        """Load ``model.onnx`` of a folder, or the ``.onnx`` file itself.

        Args:
            folder: the one or the other.
            provider: ONNX Runtime's name of what computes.
            threads: how many of the CPU. None leaves the number to ONNX Runtime.
            generation_config: see :class:`OrtModel`.

        Raises:
            ExportError: no model is there, ONNX Runtime cannot load it or lacks an operator of it, or it is no decoder
                with a cache.
            VerificationError: its rotations are not those that it or ``spinpass.json`` beside it names.
            ConfigError: ONNX Runtime does not have ``provider``.
        """
        path = model_path(folder)
        graph = DecoderGraph.open(path, provider, threads)
        return cls(graph, ModelFolder(path.parent), generation_config=generation_config)

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, see :attr:`.ModelFolder.tokenizer`."""
        return self.folder.tokenizer

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        past_key_values: Past | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        token_type_ids: Tensor | None = None,
        return_dict_in_generate: Literal[False] | None = None,
        **options: Unpack[SearchOptions],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        past_key_values: Past | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        token_type_ids: Tensor | None = None,
        return_dict_in_generate: Literal[True],
        **options: Unpack[SearchOptions],
    ) -> GeneratedTokens: ...

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        past_key_values: Past | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        token_type_ids: Tensor | None = None,
        return_dict_in_generate: bool | None = None,
        **options: Unpack[SearchOptions],
    ) -> Tensor | GeneratedTokens:
        """Continue token ids: ``model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=20)``.

        Args:
            input_ids: of an integer dtype, (batch, length).
            attention_mask: (batch, length), 0 for padding on either side. A graph that takes a mask runs all rows
                together; otherwise those of the same length are: none sees another's padding.
            inputs: another name for ``input_ids``.
            generation_config: a GenerationConfig, or a mapping; what the call says itself counts more.
            past_key_values: what an earlier call returned. What ``input_ids`` begin with of it is not read again.
            streamer: has ``put(ids)`` and ``end()``, as those of transformers. It takes one sequence.
            tokenizer: for ``stop_strings``. None takes the folder's.
            token_type_ids: what some tokenizers return; zeros, which say nothing.
            return_dict_in_generate: return the cache as well.
            options: see :class:`.SearchOptions`. Draws follow ``seed``, 0 by default, as those of transformers follow
                ``torch.manual_seed``.

        Returns:
            The ids and what follows, (batch × num_return_sequences, length + new), in the dtype of ``input_ids``; with
            ``return_dict_in_generate`` :class:`GeneratedTokens`, which has them as ``sequences``.

        Raises:
            ConfigError: an argument that is not known, not done here or out of range; no tokens, a mask with holes,
                more tokens than the model has positions, or a streamer for several sequences.
            ExportError: ``stop_strings`` without a tokenizer or without transformers.
        """
        ids, mask = _checked(input_ids if inputs is None else inputs, attention_mask, token_type_ids)
        if inputs is not None and input_ids is not None:
            raise ConfigError("inputs and input_ids are two names of one thing: give one of them")
        if past_key_values is not None and (
            not isinstance(past_key_values, Past) or past_key_values.graph is not self.graph
        ):
            raise ConfigError(
                f"past_key_values is a {type(past_key_values).__name__} of another model: give what an earlier "
                "generate(..., return_dict_in_generate=True) of this one returned"
            )
        spans = _spans(ids, mask)
        given: dict[str, Any] = {**options}
        if return_dict_in_generate is not None:
            given["return_dict_in_generate"] = return_dict_in_generate
        search = self._search(given, generation_config, ids.shape[1], max(stop - start for start, stop in spans))
        if search.copies > 1:
            ids = ids.repeat_interleave(search.copies, 0)
            spans = [span for span in spans for _ in range(search.copies)]
        if streamer is not None and len(ids) > 1:
            raise ConfigError(f"a streamer takes one sequence, not {len(ids)}")
        pad = search.pad if search.pad is not None else min(search.ends, default=0)
        new = torch.full((len(ids), search.limit), pad, dtype=ids.dtype, device="cpu")
        ended = self._ended(search, tokenizer)
        if streamer is not None:
            streamer.put(ids)
        longest, past = 0, None
        for rows, prompt, real in self._batches(ids, spans, pad):
            reading = self._begun(past_key_values, prompt, real)
            read = reading.ids.shape[1]
            found = new_tokens(
                self.graph, prompt[:, read:], search.limit, search.sampling, search.ends, pad=pad,
                mask=None if real is None else real[:, read:], reading=reading, ended=ended,
            )  # fmt: skip
            for count, tokens in enumerate(found):
                new[rows, count] = tokens.to(new.dtype)
                longest = max(longest, count + 1)
                if streamer is not None:
                    streamer.put(tokens)
            past = Past(self.graph, reading) if len(rows) == len(ids) else None
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([ids, new[:, :longest]], 1)
        return GeneratedTokens(sequences, past) if search.as_object else sequences

    def stream(self, text: str, *, generation_config: Any = None, **options: Unpack[SearchOptions]) -> Iterator[str]:
        """What follows ``text``, piece by piece, up to an end token or one of ``stop_strings``, which are not shown.

        Args:
            text: as it is, without a chat template.
            generation_config: see :meth:`generate`, and so are the options.
            options: all but ``num_return_sequences``.

        Raises:
            ConfigError: as :meth:`generate`.
            ExportError: the folder has no tokenizer.
        """
        ids, _ = _checked(
            torch.tensor([self.tokenizer(text)["input_ids"]], dtype=torch.int64, device="cpu"), None, None
        )
        search = self._search({**options}, generation_config, ids.shape[1], ids.shape[1])
        if search.copies > 1:
            raise ConfigError(f"num_return_sequences {search.copies}: one text is streamed at a time")
        pieces = StopText(Pieces(self.tokenizer), search.stop_strings)
        ended = self._ended(replace(search, stop_strings=()), None)
        for token in new_tokens(self.graph, ids, search.limit, search.sampling, search.ends, ended=ended):
            if int(token) not in search.ends:
                yield from pieces.add(int(token))
            if pieces.ended:
                break
        yield from pieces.rest()

    def _search(self, given: Mapping[str, Any], config: Any, width: int, length: int) -> Search:
        """What is asked for, for ids of a ``width`` with padding, and of a ``length`` without. Raises ConfigError."""
        mine = self.generation_config
        defaults, where = (self.folder.search_defaults, _WHERE) if mine is None else (settings(mine), "this model")
        wishes = Wishes(given, config, defaults, where)
        folder = self.folder
        search = wishes.search(width, length, folder.positions, folder.end_tokens, folder.pad_token)
        folder.check_length(length, search.limit)
        return search

    def _begun(self, past: Past | None, prompt: Tensor, mask: Tensor | None) -> Reading:
        """What has been read of a prompt before, or nothing."""
        if past is not None:
            reading = past.copied()
            if reading.go_back(self.graph, prompt, mask):
                return reading
        return Reading.begun(self.graph, len(prompt))

    def _ended(self, search: Search, tokenizer: Any) -> Callable[[Tensor], Tensor] | None:
        """What says which rows have ended, but for end tokens; None where nothing is asked."""
        criteria = list(search.criteria)
        if search.stop_strings:
            try:
                from transformers.generation.stopping_criteria import StopStringCriteria
            except ModuleNotFoundError as error:
                raise ExportError(
                    f"stop_strings needs the package {error.name}: pip install transformers, or give eos_token_id"
                ) from error
            reader = self.tokenizer if tokenizer is None else tokenizer
            try:
                criteria.append(StopStringCriteria(reader, list(search.stop_strings)))
            except ValueError as error:
                raise ExportError(
                    f"stop_strings {list(search.stop_strings)} cannot be looked for with a {type(reader).__name__} "
                    f"({first_line(error)}): give eos_token_id, or a criterion in stopping_criteria"
                ) from error
        if not criteria:
            return None

        def ended(ids: Tensor) -> Tensor:
            found = [torch.as_tensor(each(ids, None), device="cpu").bool().expand(len(ids)) for each in criteria]
            return torch.stack(found).any(0)

        return ended

    def _batches(
        self, ids: Tensor, spans: list[tuple[int, int]], pad: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Yield rows that are run together, their tokens with padding in front, and the mask that says where."""
        lengths = {stop - start for start, stop in spans}
        together = self.graph.takes_padding and len(lengths) > 1
        for group in [sorted(lengths)] if together else [[length] for length in sorted(lengths)]:
            rows = [i for i, (start, stop) in enumerate(spans) if stop - start in group]
            longest = group[-1]
            prompt = torch.full((len(rows), longest), pad, dtype=torch.int64, device="cpu")
            mask = torch.zeros_like(prompt)
            for at, row in enumerate(rows):
                start, stop = spans[row]
                prompt[at, longest - (stop - start) :] = ids[row, start:stop]
                mask[at, longest - (stop - start) :] = 1
            yield rows, prompt, mask if together else None


def _checked(ids: Tensor | None, mask: Tensor | None, token_types: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens and their mask as they are, if that is what they are. Raises ConfigError otherwise."""
    if ids is None:
        raise ConfigError("there are no input_ids to continue: give tokens, (batch, length)")
    for name, value in (("input_ids", ids), ("attention_mask", mask), ("token_type_ids", token_types)):
        if value is not None and not isinstance(value, Tensor):
            raise ConfigError(
                f"{name} is a {type(value).__name__}: give a tensor, for example of "
                'tokenizer(text, return_tensors="pt")'
            )
    if ids.ndim != 2 or not ids.numel():
        raise ConfigError(f"input_ids of shape {list(ids.shape)}: (batch, length) with tokens is expected")
    if token_types is not None and bool(token_types.any()):
        raise ConfigError("token_type_ids tell sentences apart, and the file takes token ids alone: leave them out")
    return ids, mask


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
