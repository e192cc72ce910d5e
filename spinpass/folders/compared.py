"""``--compare``: rotated, and the original by the same scheme; the folder that does better on text is kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spinpass.formats import Draft
from spinpass.loading import LoadedModel

from .companions import Written, write_again
from .result import Result


@dataclass(frozen=True)
class Made:
    """A folder that was written, and what it was made of."""

    result: Result
    written: Written

    @property
    def card(self) -> Mapping[str, Any] | None:
        """What the file was scored; None where it could not be."""
        card = self.written.manifest["card"]
        return card if isinstance(card, Mapping) else None


def the_better(loaded: LoadedModel, rotated: Made, original: Made, draft: Draft, beside: Draft) -> Made:
    """Keep in ``draft`` which of two folders has the smaller perplexity, the rotated one where that is not known.

    Args:
        loaded: the model that both were made of.
        rotated: what ``draft`` holds.
        original: what ``beside`` holds.
        draft: what becomes the folder.
        beside: a folder that is deleted.

    Returns:
        What was kept; its card, and the one for people, say of the other how it did.
    """
    cards = rotated.card, original.card
    better = cards[0] is not None and cards[1] is not None and cards[1]["ratio"] < cards[0]["ratio"]
    kept, other = (original, rotated) if better else (rotated, original)
    if better:
        shutil.rmtree(draft.folder)
        beside.folder.rename(draft.folder)
    about = {"kept": "original" if better else "rotated", "other": other.written.manifest["card"]}
    manifest = write_again(loaded, kept.result, dict(kept.written.manifest) | {"compared": about}, draft)
    return replace(kept, written=replace(kept.written, manifest=manifest))
