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

_WEIGHTS = {"fp32": ["--bits", "16"], "int8": ["--quantize", "w8-rtn-head8-embed8"], "int4": ["--int4"]}
_VALUES = {
    "rotations": ("R1,R2,R3,R4", "rotations to make, separated by commas; none writes the original, to compare with"),
    "kind": ("KIND", "kind of the rotation matrices: hadamard, random-hadamard or random-matrix"),
    "matrices": ("FILE", "rotation matrices that SpinQuant has learned, R.bin"),
    "plan": ("FILE", "plan to carry out, written by spinpass plan MODEL --save FILE"),
    "block-size": ("N", "rotate in diagonal blocks of this size"),
    "seed": ("N", "seed for the random kinds"),
    "tied": ("TIED", "keep a table that embedding and head share, or untie it; auto unties where that is cheap"),
    "form": ("FORM", "place of R1: auto, offline (in the residual stream) or online (at the linear layers' inputs)"),
    "cache": ("CACHE", "let the KV cache be stored rotated, or leave out the rotations that need it: rotated or plain"),
    "dtype": ("DTYPE", "dtype of the weights: float32, float16, bfloat16, or auto for the one they are stored in"),
    "device": ("DEVICE", "where weights are folded, rounded and run: cpu, cuda, or one of several, cuda:1"),
    "quantize": ("SCHEME", "scheme to quantize by in place of a recipe, for example w4g128-gptq-a8-head8"),
    "bits": ("N", "bits of the weights, by a recipe: 16, 8, 4, 3 or 2; 4 by default"),
    "recipe": ("NAME", "auto, the best measured, quick, on less text, or plain, to nearest unrotated"),
    "calibration": ("FILE", "what GPTQ, static ranges and --kv-cache calibrate on: a text, a dataset, or self"),
    "config": ("FILE", "YAML file with options, such as the recipe.yaml of a folder"),
    "samples": ("N", "number of calibration windows, of 512 tokens"),
    "learn": ("NAME", "none, local (block by block) or full (all together): what rounding learns from the model"),
    "minutes": ("N", "minutes that learning may take"),
    "to": ("TARGET", "runtime that the folder is for, onnx, openvino or executorch, or gptq for a checkpoint"),
    "context": ("N", "tokens that the KV cache inside an ExecuTorch program holds"),
    "memory": ("SIZE", "memory that the run may take, for example 12GB"),
    "kv-cache": ("BITS", "keep keys and values as integers, int8 or int4"),
}
_LISTS = {
    "exclude": ("PATTERN", "pattern of spaces or parameters to leave alone"),
    "keep": ("PATTERN", "pattern of parameters whose layers stay in floats"),
    "layer": ("PATTERN=SCHEME", "scheme of the weights of some layers, for example *.down_proj.*=w8"),
}
_SWITCHES = {
    "no-cache": "export without a KV cache, for whole prompts alone",
    "no-verify": "do not certify the result",
    "allow-partial": "where the certificate fails, leave out the spaces to blame",
    "last-logits": "compute the logits of a prompt's last token alone, so that it is read faster",
    "all-logits": "compute the logits of every token",
    "compare": "make the original by the same scheme as well, and keep which does better on text",
    "no-fuse": "write standard ONNX operators only, instead of ONNX Runtime's own for attention",
    "dequantize": "where MODEL is quantized (GPTQ, compressed-tensors, FP8, MXFP4), take the values of its codes",
    "trust-remote-code": "run the modelling code that comes with MODEL",
    "force": "write into OUT though it holds files that no export has put there",
    "json": "print one JSON document instead of tables",
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
        parser.add_argument("output", metavar="OUT", help="folder to write the model and its companions to")
        parser.add_argument("--weights", choices=list(_WEIGHTS), help="what the weights become, in place of --bits")
        for name, (metavar, text) in _VALUES.items():
            parser.add_argument(f"--{name}", metavar=metavar, default=SUPPRESS, help=text)
        for name, (metavar, text) in _LISTS.items():
            text += "; may be repeated"
            parser.add_argument(f"--{name}", metavar=metavar, action="append", default=[], help=text)
        for name, text in _SWITCHES.items():
            parser.add_argument(f"--{name}", action="store_true", help=text)
        parser.add_argument("-v", "--verbose", action="count", default=0, help="log every pass; -vv: tracebacks too")

    def run(self) -> None:
        """Exits as the command line does: 0 done, 1 refused or failed, 2 bad usage; one line says why."""
        given = vars(self.args)
        for other in ("quantize", "bits", "recipe"):
            if given["weights"] is not None and other in given:
                self.parser.error(f"--weights and --{other} both say what the weights become: give one of them")
        from spinpass.cli import main

        main(arguments(given))
        sys.exit(0)


def arguments(given: Mapping[str, Any]) -> list[str]:
    """The parsed options as ``spinpass export`` takes them."""
    line = ["export", *_WEIGHTS.get(given["weights"], [])]
    line += [f"--{name}={given[_key(name)]}" for name in _VALUES if _key(name) in given]
    line += [f"--{name}={each}" for name in _LISTS for each in given[name]]
    line += [f"--{name}" for name in _SWITCHES if given[_key(name)]]
    line += ["-v"] * given["verbose"]
    return [*line, "--", given["model"], given["output"]]


def _key(option: str) -> str:
    return option.replace("-", "_")


REGISTER_COMMANDS = [(SpinpassExportCommand, ExportCommand)]
