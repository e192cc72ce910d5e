"""Every error that spinpass raises on purpose.

All derive from :class:`SpinpassError`; a message names the value that was wrong and says what to do about it.
"""

import difflib
from collections.abc import Iterable


class SpinpassError(Exception):
    """The base of all errors that spinpass raises."""


class ConfigError(SpinpassError, ValueError):
    """A value that was given cannot be used, for example an unknown rotation or a block size that does not divide."""


class ProgramError(SpinpassError, TypeError):
    """The input is not a program that spinpass can read, for example of the wrong type or in training mode."""


class QuantizedWeightError(ProgramError):
    """A weight is quantized or packed. To rotate it would need dequantizing, which is not done behind your back."""


class RefusedError(SpinpassError):
    """No requested rotation can be applied exactly; the message lists every reason. Nothing was changed."""


class InvariantError(SpinpassError):
    """A pass broke an invariant of the program. It is a bug in spinpass, never a user's fault: please report it."""


class VerificationError(SpinpassError):
    """A program does not compute the function of the original within the stated bound, or an exported file is not what
    it says of itself."""


class LearningError(SpinpassError):
    """Learning could not go on, for example because the loss became no number; the message names a setting to try."""


class ExportError(SpinpassError):
    """Writing or reading an exported artefact failed; nothing was left half written."""


class DamageError(ExportError):
    """A file is damaged, claims more than it holds, or holds what could run code. It was not used."""


class WorkerError(SpinpassError):
    """A process of a run of several was lost, or failed with an error that is none of these."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library says, at most 300 characters; its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean NAME?`` with the known name that is nearest to a word, or nothing where none is near.

    The dashes before an option count for nothing: they would make all options alike.
    """
    spelled = {name.lstrip("-"): name for name in known}
    near = difflib.get_close_matches(word.lstrip("-"), spelled, 1)
    return f"; did you mean {spelled[near[0]]}?" if near else ""
