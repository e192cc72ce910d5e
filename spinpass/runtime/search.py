"""What ``generate`` of transformers takes, and what of it is done here: all of it that changes a token, or a refusal.

    the call  >  generation_config  >  generation_config.json of the folder  >  transformers' defaults

The first of these that says something counts. What is known of transformers and not done is refused by its name
(:mod:`.refused`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict

from torch import Tensor

from spinpass.config import nearest_name
from spinpass.errors import ConfigError

from .penalties import Penalties, Processor
from .refused import HARMLESS, REFUSED
from .sampling import Sampling

Criterion = Callable[[Tensor, Any], Any]
"""As transformers has it: token ids, int64 (batch, length), and None, to which rows end with them, bool (batch,)."""


class SearchOptions(TypedDict, total=False):
    """The options of ``generate``, with the names and meanings that transformers gives them.

    None says what it says there, so ``top_k=None`` draws from all tokens; for ``eos_token_id`` and ``pad_token_id`` it
    takes what the folder names, and an empty collection of ends ends nothing.
    """

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    eos_token_id: int | Collection[int] | None
    pad_token_id: int | None
    seed: int | None
    stop_strings: str | Sequence[str] | None
    num_return_sequences: int | None
    logits_processor: Sequence[Processor] | None
    stopping_criteria: Sequence[Criterion] | None


_NEW = 20  # tokens, where nobody says how many
_DRAWN = {"temperature": (1, 0), "top_k": (0, 50), "top_p": (1,), "min_p": (0,)}  # values that ask for nothing
_OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
# None in a call says nothing of these
_NOT_OFF = {"max_new_tokens", "max_length", "do_sample", "num_return_sequences", "eos_token_id", "pad_token_id", "seed"}
_NUMBERS = frozenset([*_OFF, "max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_return_sequences"])
_REAL = {"temperature", "top_p", "min_p", "repetition_penalty"}
_DEFAULTS: dict[str, Any] = _OFF | {"top_k": 50, "do_sample": False, "num_return_sequences": 1}
_KNOWN = {*SearchOptions.__annotations__, "return_dict_in_generate", *HARMLESS, *REFUSED}


@dataclass(frozen=True)
class Search:
    """How a text goes on.

    Args:
        limit: how many tokens follow at most.
        sampling: how each is chosen.
        ends: the tokens that end a sequence.
        pad: what follows the end of a sequence; None where nobody says.
        copies: how often each sequence goes on.
        stop_strings: texts that end a sequence.
        criteria: what else ends one.
        as_object: the cache is returned as well.
    """

    limit: int
    sampling: Sampling
    ends: frozenset[int]
    pad: int | None
    copies: int = 1
    stop_strings: tuple[str, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    as_object: bool = False


class Wishes:
    """What is asked for, by whom: of several that say something of one name the first counts.

    Args:
        given: the arguments of the call.
        config: a GenerationConfig, or a mapping.
        defaults: what counts where neither says anything, and ``where`` they stand. What is not known in them is left
            alone, as transformers does.

    Raises:
        ConfigError: an argument that is not known, or not done here.
    """

    def __init__(self, given: Mapping[str, Any], config: Any, defaults: Mapping[str, Any], where: str) -> None:
        told = settings(config)
        for name in [*given, *told]:
            if name not in _KNOWN:
                raise ConfigError(f"generate takes no {name}{nearest_name(name, _KNOWN)}")
        self._off = {name for name in given if given[name] is None} - _NOT_OFF
        left = [{name: value for name, value in each.items() if name not in self._off} for each in (told, defaults)]
        self._layers = [{name: value for name, value in given.items() if value is not None}, *left]
        for layer, source in zip(self._layers, ("", "", f" of {where}")):
            for name in _NUMBERS & layer.keys():
                kind, what = (Real, "number") if name in _REAL else (Integral, "whole number")
                if not isinstance(layer[name], kind) or isinstance(layer[name], bool):
                    raise ConfigError(f"{name}={layer[name]!r}{source} is no {what}")
        for name, (neutral, advice) in REFUSED.items():
            self._refuse(name, neutral, advice, where)

    def _refuse(self, name: str, neutral: tuple[Any, ...], advice: str, where: str) -> None:
        """Raise ConfigError where a thing is asked for that is not done."""
        layer = next((each for each in self._layers if each.get(name) is not None), None)
        if layer is None or _among(layer[name], neutral):
            return
        end = source = ""
        if layer is self._layers[2]:
            source, end = f" of {where}", f"; give {name}={neutral[0] if neutral else None!r} to go on without"
        raise ConfigError(f"{name}={repr(layer[name])[:80]}{source} is not done here: {advice}{end}")

    def __call__(self, name: str) -> Any:
        """What is asked for; None where nothing is."""
        if name in self._off:
            return _OFF.get(name)
        found = (layer.get(name) for layer in self._layers)
        return next((value for value in found if value is not None), _DEFAULTS.get(name))

    def search(self, width: int, length: int, positions: int | None, ends: frozenset[int], pad: int | None) -> Search:
        """What is to be done.

        Args:
            width: of the tokens that are given, with padding.
            length: of the longest sequence without.
            positions: how many tokens the model has room for; None where that is not known.
            ends: the end tokens where nobody names one.
            pad: the padding token likewise.

        Raises:
            ConfigError: options out of range, or that contradict each other.
        """
        limit, asked = self._longest(width)
        if positions is not None and not asked:
            limit = max(1, min(limit, positions - length))
        draws = bool(self("do_sample"))
        given = self("eos_token_id")
        stops = self("stop_strings") or ()
        copies = self("num_return_sequences")
        if copies < 1 or (copies > 1 and not draws):
            raise ConfigError(
                f"num_return_sequences {copies}: the likeliest continuation is one; add do_sample=True for several"
            )
        return Search(
            limit,
            self._sampling(draws, self._fewest(width, limit)),
            ends if given is None else frozenset([given] if isinstance(given, int) else given),
            next((p for p in (self("pad_token_id"), pad) if p is not None and p >= 0), None),
            copies,
            (stops,) if isinstance(stops, str) else tuple(stops),
            tuple(self("stopping_criteria") or ()),
            bool(self("return_dict_in_generate")),
        )

    def _longest(self, width: int) -> tuple[int, bool]:
        """How many tokens at most, and whether that was asked for."""
        for layer in self._layers:
            new, whole = layer.get("max_new_tokens"), layer.get("max_length")
            if new is not None:
                if new < 1:
                    raise ConfigError(f"max_new_tokens {new} is less than 1")
                return new, layer is not self._layers[2]
            if whole is not None:
                if whole <= width:
                    raise ConfigError(f"max_length {whole} leaves no room behind {width} tokens: give max_new_tokens")
                return whole - width, layer is not self._layers[2]
        return _NEW, False

    def _fewest(self, width: int, limit: int) -> int:
        """How many tokens at least."""
        for layer in self._layers:
            new, whole = layer.get("min_new_tokens"), layer.get("min_length")
            if new is not None or whole is not None:
                least = new if new is not None else max(0, (whole or 0) - width)
                if least > limit and layer is not self._layers[2]:
                    raise ConfigError(f"at least {least} new tokens are asked for, and at most {limit}")
                return int(least)
        return 0

    def _sampling(self, draws: bool, fewest: int) -> Sampling:
        penalties = Penalties(
            self("repetition_penalty"),
            self("no_repeat_ngram_size"),
            tuple(map(tuple, self("bad_words_ids") or ())),
            fewest,
            tuple(self("logits_processor") or ()),
        )
        if draws:
            if not self("temperature"):
                raise ConfigError("temperature 0 draws nothing: leave out do_sample, or give a temperature above 0")
            kept = {name: self(name) for name in _DRAWN}
            return Sampling(**kept, seed=self("seed") or 0, penalties=penalties)
        asked = [name for name in _DRAWN if not _among(self._layers[0].get(name), _DRAWN[name])]
        if asked:
            raise ConfigError(
                f"{asked[0]}={self._layers[0][asked[0]]!r} is of draws, and the likeliest token is taken: add "
                f"do_sample=True, or leave {asked[0]} out"
            )
        return Sampling(penalties=penalties)


def settings(config: Any) -> dict[str, Any]:
    """Return what a GenerationConfig, or anything like one, sets: its attributes that are not None.

    Raises ConfigError: it is nothing that has names and values.
    """
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        try:
            config = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        except TypeError as error:
            raise ConfigError(f"generation_config={config!r} is no configuration: give a GenerationConfig") from error
    return {name: value for name, value in config.items() if value is not None and not name.startswith("_")}


def _among(value: Any, neutral: Collection[Any]) -> bool:
    """Whether the value is none, or one of these; those of other types, tensors too, are not."""
    plain = isinstance(value, bool | int | float | str | list | tuple)
    return value is None or (plain and any(value == each for each in neutral))
