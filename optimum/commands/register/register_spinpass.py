"""``optimum-cli export spinpass``: the export of the command line as a command of optimum.

optimum imports every file of this namespace whenever it starts, and makes the parsers of all commands, whichever is to
run: nothing heavy is imported before this one is. Its options are those that ``spinpass export`` defines, and are read
off it when the command line is parsed. There is no ``__init__.py`` on the way here, because the packages are shared.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_WEIGHTS = {"fp32": ["--bits", "16"], "int8": ["--quantize", "w8-rtn-head8-embed8"], "int4": ["--int4"]}
_SAME = ("--bits", "--recipe", "--quantize", "--int4")  # they say what the weights become, as --weights does


class SpinpassExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Runs ``spinpass export`` with the same options; ``--weights`` stands for its common schemes."""

    COMMAND = CommandInfo(name="spinpass", help="Rotate a model (SpinQuant's R1-R4), certify it and write ONNX.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Let the parser have the options of ``spinpass export`` as soon as it parses anything."""
        parser.__class__ = _DeferredParser

    def run(self) -> None:
        """Exits as the command line does: 0 done, 1 refused or failed, 2 bad usage; one line says why."""
        given = vars(self.args)
        other = next((word for each in given["words"] if (word := each.partition("=")[0]) in _SAME), None)
        if given["weights"] is not None and other is not None:
            self.parser.error(f"--weights and {other} both say what the weights become: give one of them")
        from spinpass.cli import main

        main(arguments(given))
        sys.exit(0)


def arguments(given: Mapping[str, Any]) -> list[str]:
    """The parsed options as ``spinpass export`` takes them."""
    return ["export", *_WEIGHTS.get(given["weights"], []), *given["words"], "--", given["model"], given["output"]]


class _DeferredParser(ArgumentParser):
    """A parser whose options are defined when it is used: to read them off takes torch."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not any("--model" in action.option_strings for action in self._actions):
            _define(self)
        read, left = super().parse_known_args(args, namespace)
        unknown = next((word.partition("=")[0] for word in left if word.startswith("--")), None)
        near = get_close_matches(unknown, self._option_string_actions, 1) if unknown else []
        if near:  # else optimum says what it does not know
            self.error(f"there is no option {unknown}: did you mean {near[0]}?")
        return read, left


class _AsSpelled(Action):
    """Keeps an option for ``spinpass export``, which knows what it means."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        word = option_string if values == [] else f"{option_string}={values}"
        namespace.words = [*namespace.words, word]


def _define(parser: ArgumentParser) -> None:
    from spinpass.cli import command_options

    parser.epilog = "These are the options of spinpass export, and --weights."
    parser.add_argument(
        "-m", "--model", required=True, help="a model folder, a name on the hub, a GGUF file or a .pt2 file"
    )
    parser.add_argument("output", metavar="OUT", help="folder to write the model and its companions to")
    parser.add_argument("--weights", choices=list(_WEIGHTS), help="what the weights become, in place of --bits")
    parser.set_defaults(words=[])
    for option in command_options("export"):
        taken: dict[str, Any] = {"nargs": 0} if option.metavar is None else {"metavar": option.metavar}
        about = option.help.replace("%", "%%")  # which argparse fills in
        parser.add_argument(*option.names, action=_AsSpelled, dest="words", default=SUPPRESS, help=about, **taken)


REGISTER_COMMANDS = [(SpinpassExportCommand, ExportCommand)]
