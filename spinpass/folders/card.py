"""The card of a folder: how the file that was written does on text, beside the model that it was made of.

The text is Python's own help, which no recipe calibrates on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass.errors import ConfigError, ExportError, ProgramError, VerificationError
from spinpass.evaluation import (
    Comparison,
    ProgramScorer,
    Speed,
    Windows,
    compare,
    read_text,
    speed,
    token_ids,
    windows,
)
from spinpass.graph import storage_key
from spinpass.loading import LoadedModel
from spinpass.progress import Steps
from spinpass.runtime import DecoderSession, ModelFolder
from spinpass.values import Fields, check_told, notebook_table, titled
from spinpass.workers import Team

WINDOWS, LENGTH = 8, 512
_VERSION = 1
_RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pte": "executorch"}
_MODELS = ("*.onnx*", "openvino_model.*", "*.pte", "*.safetensors")
_NEW = 16  # tokens, timed


def plural(count: int, noun: str) -> str:
    """Return a count of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, repr=False)
class Card:
    """What a user wants to know of a folder. ``print(card)`` shows it in two lines, a notebook as a table.

    Args:
        runtime: what the file was scored in; ``"torch"`` where no runtime of its is here, and its program was.
        ratio: the perplexity of the file divided by that of the model as it was loaded.
        ratio_error: its standard error, paired over windows; None where there is one window.
        kl: the divergence of the file's predictions from the model's, in nats per token.
        agreement: the share of tokens at which both find the same one the likeliest.
        bytes: of the model's files.
        bits_per_weight: bytes × 8 ÷ the weights of the model, tied ones counted once.
        decode, prefill: tokens per second in the runtime, one after the other and of one prompt; None in torch.
        windows, length: how much text was scored, in windows of so many tokens.
    """

    runtime: str
    ratio: float
    ratio_error: float | None
    kl: float
    agreement: float
    bytes: int
    bits_per_weight: float
    decode: float | None
    prefill: float | None
    windows: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return titled("card", _VERSION, asdict(self))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Card:
        """Return the card that :meth:`to_dict` has written, for example of a folder: ``manifest["card"]``.

        Raises ConfigError: it is none, one of another version, or incomplete.
        """
        fields = Fields.of(data, "card", _VERSION)
        found = Card(
            runtime=fields.text("runtime"),
            ratio=fields.number("ratio"),
            ratio_error=fields.perhaps("ratio_error", fields.number),
            kl=fields.number("kl"),
            agreement=fields.number("agreement"),
            bytes=fields.count("bytes"),
            bits_per_weight=fields.number("bits_per_weight"),
            decode=fields.perhaps("decode", fields.number),
            prefill=fields.perhaps("prefill", fields.number),
            windows=fields.count("windows"),
            length=fields.count("length"),
        )
        check_told("card", data, found.to_dict())
        return found

    def __repr__(self) -> str:
        ratio = ratio_text(self.ratio, self.ratio_error)
        return f"<Card: perplexity × {ratio}, {self.bytes / 1e6:,.1f} MB, {self.bits_per_weight:.2f} bits per weight>"

    def __str__(self) -> str:
        return "\n".join(card_lines(self.to_dict()))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a figure a row."""
        rows = [
            ("perplexity ÷ the model's", ratio_text(self.ratio, self.ratio_error)),
            ("same likeliest token", f"{self.agreement:.1%}"),
            ("divergence, nats per token", f"{self.kl:.4f}"),
            ("size", f"{self.bytes / 1e6:,.1f} MB, {self.bits_per_weight:.2f} bits per weight"),
        ]
        if self.decode is not None and self.prefill is not None:
            rows += [("tokens per second, decode", f"{self.decode:.1f}")]
            rows += [("tokens per second, prefill", f"{self.prefill:.0f}")]
        note = f"{self.windows} windows of {self.length} tokens of Python's help, in {self.runtime}"
        return notebook_table("Card", ("", ""), rows, numbers=1, notes=[note])


@dataclass(frozen=True)
class _Scored:
    """What is scored: the model that was loaded, and what was made of it, on windows of a text."""

    before: ProgramScorer
    after: ProgramScorer | DecoderSession
    runtime: str
    cut: Windows


@contextmanager
def _scored(loaded: LoadedModel, folder: Path, program: ExportedProgram | None) -> Iterator[_Scored]:
    """Open what is scored. Raises ConfigError, ExportError and ProgramError where it cannot be."""
    if loaded.companions is None or loaded.companions.tokenizer is None:
        raise ConfigError("there is no tokenizer to read a text with")
    ids = token_ids(loaded.companions.tokenizer)(read_text(None))
    before = ProgramScorer(loaded.program)
    longest = [each for each in (LENGTH, before.longest, ModelFolder(folder).positions) if each]
    if program is not None:
        yield _Scored(before, ProgramScorer(program), "torch", _cut(ids, longest))
        return
    with DecoderSession(folder) as decoder:
        cut = _cut(ids, [*longest, decoder.open() or LENGTH])
        yield _Scored(before, decoder, _RUNTIMES[decoder.path.suffix], cut)


def score_share(loaded: LoadedModel, folder: Path, team: Team) -> None:
    """Read this rank's share of the windows that rank 0 of a team scores a folder on. Where that cannot be done, rank 0
    says so."""
    if team.told(None):
        with _scored(loaded, folder, None) as asked, suppress(ConfigError, ExportError, ProgramError):
            compare(asked.before, asked.after, asked.cut, team=team)


def scored_card(
    loaded: LoadedModel,
    folder: Path,
    steps: Steps,
    program: ExportedProgram | None = None,
    team: Team | None = None,
    why: str = "",
) -> Card | str:
    """Score the model of a folder against the model that was loaded; a sentence where that cannot be done.

    ``program``: what is scored in place of a file that no runtime here runs. ``team``: the others of it call
    :func:`score_share`. ``why``: the reason that it is not scored, empty where it is.
    """
    team = team or Team()
    if why:
        team.told(False)
        return f"not scored: {why}"
    with ExitStack() as held:
        try:
            asked = held.enter_context(_scored(loaded, folder, program))
        except (ConfigError, ExportError, ProgramError) as error:
            team.told(False)
            return f"not scored: {error}"
        team.told(True)
        try:
            found = compare(asked.before, asked.after, asked.cut, steps.start("score the file"), team)
            _check_numbers(found, asked.runtime)
            timed: Speed | None = None
            if isinstance(asked.after, DecoderSession):
                timed = speed({"file": asked.after}, asked.cut[0][: len(asked.cut[0]) // 2], _NEW, repeats=1)["file"]
        except (ConfigError, ExportError, ProgramError) as error:
            return f"not scored: {error}"
    size = sum(file.stat().st_size for pattern in _MODELS for file in folder.glob(pattern))
    return Card(
        runtime=asked.runtime,
        ratio=found.ratio,
        ratio_error=found.to_dict()["ratio_error"],
        kl=found.divergence,
        agreement=found.agreement,
        bytes=size,
        bits_per_weight=8 * size / max(1, weight_count(loaded.program)),
        decode=None if timed is None else timed.decode,
        prefill=None if timed is None else timed.prefill,
        windows=len(asked.cut),
        length=len(asked.cut[0]),
    )


def _cut(ids: Sequence[int], longest: Sequence[int]) -> Windows:
    length = min(longest)
    return windows(ids, length, min(WINDOWS, max(1, len(ids) // length)))


def _check_numbers(found: Comparison, runtime: str) -> None:
    """Raise VerificationError where the file predicts what is no number, ConfigError where the model does, or what is
    too large to be compared."""
    if not all(map(math.isfinite, found.before.losses)):
        raise ConfigError("the model's own predictions of Python's help texts are no numbers")
    if not all(map(math.isfinite, found.after.losses)):
        raise VerificationError(
            f"in {runtime} the file's predictions of Python's help texts are no numbers, and those of the model are: "
            "its dtype may be too narrow for it (--dtype float32)"
        )
    if not math.isfinite(found.ratio):
        raise ConfigError("its perplexity is too many times the model's for a number")


def weight_count(program: ExportedProgram) -> int:
    """Return how many weights a program has, tied ones counted once."""
    return sum({storage_key(tensor): tensor.numel() for tensor in program.state_dict.values()}.values())


def ratio_text(ratio: float, error: float | None) -> str:
    """Return a ratio with its standard error, where it has one."""
    return f"{ratio:.4f}" if error is None else f"{ratio:.4f} ± {error:.4f}"


def card_lines(card: Mapping[str, Any] | str | None, compared: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a stored card says, in lines for people; none without a card. ``compared``: of ``--compare``."""
    if card is None or isinstance(card, str):
        return [card] if card else []
    speeds = ""
    if card["decode"] is not None:
        speeds = f"; decode {card['decode']:.1f}, prefill {card['prefill']:.0f} tokens/s here"
    ratio = ratio_text(card["ratio"], card["ratio_error"])
    lines = [
        f"perplexity × {ratio}, the same likeliest token at {card['agreement']:.1%}, divergence {card['kl']:.4f} nats "
        f"({card['windows']} windows of {card['length']} tokens of Python's help, in "
        f"{card['runtime']})",
        f"{card['bytes'] / 1e6:,.1f} MB, {card['bits_per_weight']:.2f} bits per weight, graph, scales and tables "
        f"included{speeds}",
    ]
    if compared is None:
        return lines
    other, kept = compared["other"], compared["kept"]
    left = "rotated" if kept == "original" else "the original"
    how = f"× {other['ratio']:.4f}" if isinstance(other, Mapping) else str(other)
    return [f"kept: {'the original' if kept == 'original' else 'rotated'}; {left} by the same scheme: {how}", *lines]
