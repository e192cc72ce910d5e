"""Without the bars and warnings of the packages behind."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the progress bars and warnings of the packages behind; loggers and settings are put back."""
    from_below = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(from_below)


@contextmanager
def _no_bars() -> Iterator[None]:
    try:
        gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        theirs: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    shown, bar = theirs.is_progress_bar_enabled(), getattr(gguf, "tqdm", None)
    theirs.disable_progress_bar()
    if bar is not None:  # the one bar that does not ask
        gguf.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
        if bar is not None:
            gguf.tqdm = bar
