"""The options of a command as values, for another command line that offers the same: made from what typer is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import typer.main

from spinpass.errors import ConfigError


@dataclass(frozen=True)
class CommandOption:
    """This is one option of a command.

    Attributes:
        names: its spellings, ``--to``, or ``-v`` and ``--verbose``.
        metavar: what its value is called, such as ``FILE``, or its values in braces; None where it takes none.
        help: what it does, in a sentence, and its default where that is worth a word.
        repeated: whether it may be given more than once.
    """

    names: tuple[str, ...]
    metavar: str | None
    help: str
    repeated: bool


def options_of(command: str) -> list[CommandOption]:
    """List the options of a command of ``spinpass``, in the order of its help, without its arguments.

    Raises ConfigError where there is no such command.
    """
    from .app import app

    made: Any = typer.main.get_command(app)
    if command not in made.commands:
        raise ConfigError(f"there is no command spinpass {command}: there are {', '.join(made.commands)}")
    callback: Any = next(each.callback for each in app.registered_commands if each.name == command)
    kinds = inspect.signature(callback, eval_str=True).parameters
    options = [each for each in made.commands[command].params if each.param_type_name == "option"]
    return [one for each in options for one in _spelled(each, kinds[each.name].annotation) if not each.hidden]


def _spelled(option: Any, kind: Any) -> Iterator[CommandOption]:
    """Yield an option; where it can be turned off, what turns it off as well."""
    takes_value = not (option.is_flag or option.count)
    metavar = None
    if takes_value:
        choices = ",".join(map(str, _choices(kind)))
        metavar = option.metavar or (f"{{{choices}}}" if choices else _name_of_value(option.name, kind))
    repeated = bool(option.multiple or option.count)
    yield CommandOption(tuple(option.opts), metavar, _described(option), repeated)
    for name in option.secondary_opts:
        yield CommandOption((name,), None, f"The opposite of {option.opts[0]}.", repeated)


def _choices(kind: Any) -> Iterator[Any]:
    """Yield the values that an annotation allows; none where it allows any."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) is not None or isinstance(kind, UnionType):
        for part in get_args(kind):
            yield from _choices(part)


def _name_of_value(name: str, kind: Any) -> str:
    value = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind  # without the description of the option
    return "N" if {int, float} & {value, *get_args(value)} else name.upper()


def _described(option: Any) -> str:
    said = option.show_default if isinstance(option.show_default, str) else ""
    default = said or (str(option.default) if option.default not in (None, False, "", [], ()) else "")
    counted = option.is_flag or option.count
    return f"{option.help} Default: {default}." if default and not counted else str(option.help)
