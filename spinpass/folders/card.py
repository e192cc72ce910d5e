"""The card of a folder: how the file that was written does on text, beside the model that it was made of.

The text is Python's own help, which no recipe calibrates on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError, ExportError
from spinpass.evaluation import ProgramScorer, compare, read_text, speed, token_ids, windows
from spinpass.loading import LoadedModel
from spinpass.progress import Steps

WINDOWS, LENGTH = 8, 512
_NEW = 16  # tokens, timed


@dataclass(frozen=True)
class Card:
    """What a user wants to know of a folder.

    Args:
        ratio: the perplexity of the file divided by that of the model as it was loaded.
        ratio_error: its standard error, paired over windows; None where there is one window.
        kl: the divergence of the file's predictions from the model's, in nats per token.
        agreement: the share of tokens at which both find the same one the likeliest.
        bytes: of the model's files.
        bits_per_weight: bytes × 8 ÷ the weights of the model, tied ones counted once.
        decode, prefill: tokens per second in ONNX Runtime, one after the other and of one prompt.
        windows, length: how much text was scored, in windows of so many tokens.
    """

    ratio: float
    ratio_error: float | None
    kl: float
    agreement: float
    bytes: int
    bits_per_weight: float
    decode: float
    prefill: float
    windows: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)


def scored_card(loaded: LoadedModel, folder: Path, steps: Steps) -> Card | str:
    """Score the ONNX model of a folder against the model that was loaded; a sentence where that cannot be done."""
    from spinpass.runtime import OrtDecoder

    if loaded.companions is None or loaded.companions.tokenizer is None:
        return "not scored: there is no tokenizer to read a text with"
    ids = token_ids(loaded.companions.tokenizer)(read_text(None))
    before = ProgramScorer(loaded.program)
    length = min(LENGTH, before.longest or LENGTH)
    try:
        decoder = OrtDecoder(folder)
        cut = windows(ids, length, min(WINDOWS, max(1, len(ids) // length)))
        found = compare(before, decoder, cut, steps.start("score the file"))
        timed = speed({"file": decoder}, cut[0][: length // 2], _NEW, repeats=1)["file"]
    except (ConfigError, ExportError) as error:
        return f"not scored: {error}"
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    weights = {tensor.data_ptr(): tensor.numel() for tensor in loaded.program.state_dict.values()}
    return Card(
        ratio=found.ratio,
        ratio_error=found.to_dict()["ratio_error"],
        kl=found.divergence,
        agreement=found.agreement,
        bytes=size,
        bits_per_weight=8 * size / max(1, sum(weights.values())),
        decode=timed.decode,
        prefill=timed.prefill,
        windows=len(cut),
        length=length,
    )


def card_lines(card: Mapping[str, Any] | str | None) -> list[str]:
    """Return what a stored card says, in lines for people; none without a card."""
    if card is None or isinstance(card, str):
        return [card] if card else []
    error = "" if card["ratio_error"] is None else f" ± {card['ratio_error']:.4f}"
    return [
        f"perplexity × {card['ratio']:.4f}{error}, the same likeliest token at {card['agreement']:.1%}, divergence "
        f"{card['kl']:.4f} nats ({card['windows']} windows of {card['length']} tokens of Python's help)",
        f"{card['bytes'] / 1e6:,.1f} MB, {card['bits_per_weight']:.2f} bits per weight; decode {card['decode']:.1f}, "
        f"prefill {card['prefill']:.0f} tokens/s here",
    ]
