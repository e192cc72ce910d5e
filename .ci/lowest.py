"""Print the lowest version of each package that pyproject.toml allows, a line each:  torch>=2.8  ->  torch==2.8.

    python .ci/lowest.py cli onnx      of the project itself and of these extras
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def lowest(project: dict[str, Any], extras: Sequence[str]) -> list[str]:
    """Return the requirements of a project and of some of its extras, each at its lower bound.

    What an extra asks for counts more than what the project asks for. Raises ValueError for a requirement without a
    bound: its oldest release is not known to work.
    """
    asked = [each for extra in extras for each in project["optional-dependencies"][extra]]
    found = {}
    for requirement in (*project["dependencies"], *asked):
        if requirement.startswith(f"{project['name']}["):
            continue
        parts = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if parts is None:
            raise ValueError(f"{requirement} in pyproject.toml has no lower bound: write NAME>=VERSION")
        found[parts[1]] = parts[2]
    return [f"{name}=={version}" for name, version in found.items()]


if __name__ == "__main__":
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(lowest(tomllib.loads(text)["project"], sys.argv[1:])))
