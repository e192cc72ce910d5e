"""Plans in files: what was decided once, with its matrices, is carried out again elsewhere.

    spinpass.plan(program)  ->  plan.json  ->  spinpass.transform(program, plan)

The file is JSON, as :meth:`spinpass.RotationPlan.to_dict` has it.
"""

from __future__ import annotations

import json
from pathlib import Path

from spinpass.errors import ConfigError
from spinpass.planning import RotationPlan

from .documents import read_object
from .staging import staged


def save_plan(plan: RotationPlan, path: str | Path) -> None:
    """Write a plan, its matrices included, for :func:`load_plan`. The file is there whole or not at all.

    Raises ExportError: the operating system refused to write; the message says why and what to do.
    """
    path, text = Path(path), json.dumps(plan.to_dict(), indent=1, allow_nan=False)
    with staged(path.parent, len(text)) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def load_plan(path: str | Path) -> RotationPlan:
    """Read a plan that :func:`save_plan` or ``spinpass plan MODEL --save FILE`` has written.

    Raises:
        ConfigError: there is no such file; it holds no plan, one of another version, or one that was changed by hand.
        DamageError: it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: name one that spinpass plan MODEL --save FILE has written")
    try:
        return RotationPlan.from_dict(read_object(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
