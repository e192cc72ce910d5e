"""Learning: constants of a program as functions of moves, and one loss by which another program teaches it."""

from .checkpoint import forget
from .divergence import divergence
from .lesson import Lesson, parted
from .moves import LearningPart, places_of, values
from .record import LearningRecord
from .settings import PHASES, Learning, Phase
from .teach import taught

__all__ = [
    "PHASES",
    "Learning",
    "LearningPart",
    "LearningRecord",
    "Lesson",
    "Phase",
    "divergence",
    "forget",
    "parted",
    "places_of",
    "taught",
    "values",
]
