"""spinpass inside of tools that run whole workflows: a pass and an evaluator of Olive.

``python -m spinpass.hosts FILE`` writes the file in which Olive finds the pass. Olive is imported when something of it
is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .olive import SpinEvaluator, SpinPass, write_package_config

__all__ = ["SpinEvaluator", "SpinPass", "write_package_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import olive

    return getattr(olive, name)
