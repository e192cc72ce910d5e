"""``--config``: options from a file, in place of the defaults that a command has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import yaml  # type: ignore[import-untyped]

from spinpass.errors import ConfigError, did_you_mean, first_line
from spinpass.evaluation import read_text
from spinpass.quantization import QuantizationConfig

_GIVEN = "spinpass.given"
_NEVER = (
    "config",
    "help",
    "force",
    "trust-remote-code",
    "memory",
    "json",
    "verbose",
)  # of one run, and of who gives it
_ROUNDING = frozenset({"bits", "recipe", "quantize", "int4"})  # ways to round, of which one counts
_OF_ROTATIONS = frozenset({"kind", "block-size", "seed", "tied", "form", "cache", "exclude", "matrices"})
_TEXT = frozenset({"samples", "calibration"})
_RECIPE = _ROUNDING | _OF_ROTATIONS | {"samples", "rotations"}  # what a recipe stands for
_LAYERS = frozenset({"keep", "layer"})  # of a scheme


class SettledCommand(typer.core.TyperCommand):
    """A command with ``--config``, whose file gives way to what stands beside it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take down which options are given before the first of them is read, which is ``--config``."""
        ctx.meta[_GIVEN] = self.make_parser(ctx).parse_args(list(args))[0]
        return super().parse_args(ctx, args)


def _take(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let the options of a file stand in for the defaults of a command; what the command line gives counts more."""
    if path is not None:
        found = _read(path)
        left = _superseded(ctx.meta.get(_GIVEN, {}), found)
        ctx.default_map = _defaults(_options(ctx), {name: found[name] for name in found if name not in left}, path)
    return path


Settings = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with options, such as the recipe.yaml of a folder; options given beside it count more.",
        metavar="FILE",
        is_eager=True,
        callback=_take,
    ),
]


def _superseded(given: dict[str, Any], found: dict[str, Any]) -> frozenset[str]:
    """Return the options of a file that do not count beside those of the command line.

    Other rotations, and a plan, take the place of the file's, another recipe or way to round that of the file's, and no
    text is read that it has no use for. Raises ConfigError where the scheme of the command line cannot be read.
    """
    rotations = {name.strip() for name in given.get("rotations", "R1").split(",")}
    idle = _OF_ROTATIONS if rotations == {"none"} else frozenset() if "R1" in rotations else frozenset({"form", "tied"})
    names = {name.replace("_", "-") for name in given}
    if "plan-file" in names:
        idle = _OF_ROTATIONS | {"rotations"}
    elif names & (_OF_ROTATIONS | {"rotations"}):
        idle |= {"plan"}
    return idle | _rounded_otherwise(given, found)


def _rounded_otherwise(given: dict[str, Any], found: dict[str, Any]) -> frozenset[str]:
    if not given.keys() & _ROUNDING:
        return frozenset()
    left = _RECIPE if given.keys() & {"bits", "recipe"} else _ROUNDING
    scheme = given.get("quantize")
    reads = QuantizationConfig.parse(scheme).uses_calibration if scheme else not given.get("int4")
    kept = str(given.get("bits")) == "16"
    cached = "kv_cache" in given or "kv-cache" in found
    if (kept or not reads or given.get("recipe") == "plain") and not cached:
        left |= _TEXT
    return left | _LAYERS if kept or given.get("int4") else left


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads plain values, and no option twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{twice} stands there twice: leave one of them out")
        return dict(super().construct_mapping(node, deep))


def _read(path: Path) -> dict[str, Any]:
    """Return what a file says. Raises ConfigError where that is no mapping."""
    try:
        found = yaml.load(read_text(path), Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}: options are expected, a line each, as bits: 4")
    return {str(name): value for name, value in found.items()}


def _options(ctx: typer.Context) -> dict[str, Any]:
    """The options of a command that a file may give, by name."""
    found = {}
    for parameter in ctx.command.params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            name = option.removeprefix("--")
            if option.startswith("--") and name not in _NEVER:
                found[name] = parameter
    return found


def _defaults(options: dict[str, Any], given: dict[str, Any], path: Path) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        parameter = options.get(name)
        if parameter is None:
            why = "is given on the command line alone" if name in _NEVER else "is no option"
            raise ConfigError(f"{path}: {name} {why}{did_you_mean(name, options)}")
        found[parameter.name] = _checked(name, parameter, value, path)
    return found


def _checked(name: str, parameter: Any, value: Any, path: Path) -> Any:
    """Return a value as the option takes it. Raises ConfigError where it is of another kind."""
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is {value!r}: true or false is expected")
        return value if f"--{name}" in parameter.opts else not value
    if parameter.multiple:
        listed = value if isinstance(value, list) else [value]
        if all(isinstance(each, str) for each in listed):
            return listed
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    expected = "a list of texts" if parameter.multiple else "a text or a number"
    raise ConfigError(f"{path}: {name} is {value!r}: {expected} is expected")
