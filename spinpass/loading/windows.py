"""Windows and chunks of attention counted in tokens, not in places of the cache, where a row has padding.

    key in window of query  <=>  p(key) > p(query) − window,    p = cumsum(mask) − 1

With padding in front both counts are the same. Padding behind a prompt, as ONNX Runtime GenAI has it, lies between the
prompt and what follows, and would take up the window.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_Overlay = Callable[[Any, Any, Any, Any], Any]  # (row, head, query, key) -> whether the key is seen


@contextmanager
def windows_by_position(mask: Tensor) -> Iterator[None]:
    """Let the masks that transformers makes meanwhile count tokens.

    Args:
        mask: the attention mask, (batch, past + tokens), 0 for padding.
    """
    utils: Any = importlib.import_module("transformers.masking_utils")
    before = utils.sliding_window_overlay, utils.chunked_overlay
    positions = mask.long().cumsum(-1) - 1

    def window(size: int) -> _Overlay:
        return lambda row, head, query, key: positions[row, key] > positions[row, query] - size

    def chunk(size: int, left_padding: Tensor) -> _Overlay:
        return lambda row, head, query, key: positions[row, key] // size == positions[row, query] // size

    utils.sliding_window_overlay, utils.chunked_overlay = window, chunk
    try:
        yield
    finally:
        utils.sliding_window_overlay, utils.chunked_overlay = before
