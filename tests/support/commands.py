"""The command line, called as a function."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from spinpass.cli.app import app


def run(*arguments: object) -> Any:
    """The result of one call; anything but an exit is an error of the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def document(result: Any) -> Any:
    """stdout as the one JSON document that it has to be."""
    return json.loads(result.stdout)
