"""``optimum-cli export spinpass``: the export of the command line as a command of optimum.

optimum imports every file of this namespace whenever it starts, whichever command it is to run: nothing heavy is
imported before the command is. There is no ``__init__.py`` on the way here, because the packages are shared.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_WEIGHTS: dict[str, list[str]] = {"fp32": [], "int8": ["--quantize", "w8-rtn-head8-embed8"], "int4": ["--int4"]}
_VALUES = {
    "rotations": ("R1,R2,R3,R4", "which rotations; none writes the model as it is, to compare with"),
    "kind": ("KIND", "of the rotation matrices: hadamard, random-hadamard or random-matrix"),
    "block-size": ("N", "rotate in diagonal blocks of this size"),
    "seed": ("N", "of the random kinds"),
    "tied": ("TIED", "a table shared by embedding and head: auto, keep or untie"),
    "form": ("FORM", "of R1: auto, offline (in the residual stream) or online (at the linears' inputs)"),
    "cache": ("CACHE", "let the KV cache travel rotated, or leave it plain"),
    "dtype": ("DTYPE", "of the weights: float32, float16, bfloat16, or auto as stored"),
    "quantize": ("SCHEME", "quantize, say w4g128-gptq-a8-head8-embed8, instead of --weights"),
    "calibration": ("FILE", "text for GPTQ, static ranges and --kv-cache"),
    "samples": ("N", "windows of 512 tokens to calibrate on"),
    "to": ("TARGET", "onnx, executorch, or gptq for a checkpoint"),
    "context": ("N", "with --to executorch: tokens that the KV cache inside holds"),
    "kv-cache": ("BITS", "int8 or int4: keep keys and values as integers"),
}
_SWITCHES = {
    "no-cache": "export the prompt's pass alone, without a KV cache",
    "no-verify": "do not certify the result",
    "last-logits": "compute the logits of the last token alone: prompts are read faster",
    "no-fuse": "standard ONNX operators only, instead of ONNX Runtime's for attention",
    "dequantize": "where MODEL is a GPTQ checkpoint, take the values of its integers",
    "json": "print one JSON document",
}


class SpinpassExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Runs ``spinpass export`` with the same options; ``--weights`` stands for its common schemes."""

    COMMAND = CommandInfo(name="spinpass", help="Rotate a model (SpinQuant's R1-R4), certify it and write ONNX.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Options that are not given are absent from the result: their defaults are those of ``spinpass export``."""
        parser.epilog = "spinpass export --help says more about each option and its default."
        parser.add_argument(
            "-m", "--model", required=True, help="a model folder, a name on the hub, a GGUF file or a .pt2 file"
        )
        parser.add_argument("output", metavar="OUT", help="folder for the model and what belongs to it")
        parser.add_argument("--weights", choices=list(_WEIGHTS), default="fp32", help="fp32 as they are, or packed")
        for name, (metavar, text) in _VALUES.items():
            parser.add_argument(f"--{name}", metavar=metavar, default=SUPPRESS, help=text)
        parser.add_argument(
            "--exclude", metavar="PATTERN", action="append", default=[], help="spaces or parameters to leave alone"
        )
        for name, text in _SWITCHES.items():
            parser.add_argument(f"--{name}", action="store_true", help=text)
        parser.add_argument("-v", "--verbose", action="count", default=0, help="log every pass; -vv: tracebacks")

    def run(self) -> None:
        """Exits as the command line does: 0 done, 1 refused or not equivalent, 2 bad usage; one line says why."""
        given = vars(self.args)
        if given["weights"] != "fp32" and "quantize" in given:
            self.parser.error("--weights and --quantize both say what the weights become: give one of them")
        from spinpass.cli import main

        main(arguments(given))
        sys.exit(0)


def arguments(given: Mapping[str, Any]) -> list[str]:
    """The parsed options as ``spinpass export`` takes them."""
    line = ["export", *_WEIGHTS[given["weights"]]]
    line += [f"--{name}={given[_key(name)]}" for name in _VALUES if _key(name) in given]
    line += [f"--exclude={pattern}" for pattern in given["exclude"]]
    line += [f"--{name}" for name in _SWITCHES if given[_key(name)]]
    line += ["-v"] * given["verbose"]
    return [*line, "--", given["model"], given["output"]]


def _key(option: str) -> str:
    return option.replace("-", "_")


REGISTER_COMMANDS = [(SpinpassExportCommand, ExportCommand)]
