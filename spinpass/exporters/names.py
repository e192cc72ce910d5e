"""Names of a graph's inputs and outputs, from the program's signature."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from spinpass import record
from spinpass.errors import ConfigError
from spinpass.execution import output_names as paths_of_outputs

from .caches import find_caches

_WORD = re.compile(r"\w+(?:\.\w+)*")

Names = Mapping[str, str] | Sequence[str] | None


@dataclass(frozen=True)
class GraphNames:
    """Every tensor that goes in or comes out has one name; a value that export specialised to a constant has none.

    ``input_index`` maps the name of a placeholder, and ``output_index`` the number of a user output of the program, to
    its place in the lists.
    """

    inputs: list[str]
    outputs: list[str]
    input_index: Mapping[str, int]
    output_index: Mapping[int, int]


def signature_names(ep: ExportedProgram) -> GraphNames:
    """Name the inputs and outputs of a program.

    Inputs have the names of their placeholders. Outputs have those of their keys in the returned structure, for example
    ``past_key_values_0``, or the program's own where they have no key; ``output.`` stands in front where an input has
    that name.
    """
    signature = ep.graph_signature
    taken = [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    inputs = [arg.name for arg in taken if not isinstance(arg, ConstantArgument)]
    returned = [spec.arg for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    keys = [] if ep.call_spec.out_spec is None else list(_keys(ep.call_spec.out_spec, ""))
    if len(keys) != len(returned):  # a program edited by hand
        keys = [""] * len(returned)
    kept = [i for i, arg in enumerate(returned) if not isinstance(arg, ConstantArgument)]
    outputs = [keys[i] or returned[i].name for i in kept]
    return GraphNames(
        inputs,
        [f"output.{name}" if name in inputs else name for name in outputs],
        {name: index for index, name in enumerate(inputs)},
        {i: index for index, i in enumerate(kept)},
    )


def cache_names(ep: ExportedProgram) -> dict[str, dict[str, str]]:
    """Return the ``input_names`` and ``output_names`` under which today's runtimes look for a KV cache.

    ``past_key_values.<layer>.key`` and ``.value`` go in, ``present.<layer>.key`` and ``.value`` come out; other state
    of a layer is ``.state``. What is a cache, and of what, is found at the attention (:mod:`.caches`), whatever the
    program calls it. Both are empty for a program without one.
    """
    names = signature_names(ep)
    found = [tensor for tensor in find_caches(ep) if tensor.output in names.output_index]
    return {
        "input_names": {tensor.input: f"past_key_values.{tensor.label}" for tensor in found},
        "output_names": {names.outputs[names.output_index[t.output]]: f"present.{t.label}" for t in found},
    }


def named_record(ep: ExportedProgram, input_names: Names, output_names: Names) -> dict[str, Any] | None:
    """Return what a rotated program says about itself, its certificate included, under the names that a file gives its
    inputs and outputs; None for any other program. Raises ConfigError as :func:`renamed`.
    """
    found = record.read(ep)
    if found is None:
        return None
    names = renamed(signature_names(ep), input_names, output_names)
    inputs = {name: names.inputs[index] for name, index in names.input_index.items()}
    outputs = {i: names.outputs[index] for i, index in names.output_index.items()}
    words = inputs | {name: outputs[i] for i, name in enumerate(paths_of_outputs(ep)) if i in outputs}
    data = found.to_dict()
    data["inputs"] = {inputs[name]: carried for name, carried in data["inputs"].items()}
    data["outputs"] = {outputs[int(i)]: carried for i, carried in data["outputs"].items()}
    data["certificate"] = _worded(data["certificate"], words)
    return data


def _worded(value: Any, words: Mapping[str, str]) -> Any:
    """Return JSON-able values with every word of their texts replaced that ``words`` has."""
    if isinstance(value, dict):
        return {key: _worded(each, words) for key, each in value.items()}
    if isinstance(value, list):
        return [_worded(each, words) for each in value]
    return _WORD.sub(lambda word: words.get(word[0], word[0]), value) if isinstance(value, str) else value


def renamed(names: GraphNames, inputs: Names, outputs: Names) -> GraphNames:
    """Return ``names`` with the user's overrides. Raises ConfigError for unknown, missing and repeated names."""
    result = replace(
        names, inputs=_override(names.inputs, inputs, "input"), outputs=_override(names.outputs, outputs, "output")
    )
    both = [*result.inputs, *result.outputs]
    repeated = sorted({name for name in both if both.count(name) > 1})
    if repeated:
        raise ConfigError(f"two inputs or outputs would have the name {repeated[0]!r}: give each its own")
    return result


def _override(names: list[str], override: Names, what: str) -> list[str]:
    if override is None:
        return names
    if isinstance(override, Mapping):
        unknown = [name for name in override if name not in names]
        if unknown:
            raise ConfigError(f"there is no {what} {unknown[0]!r} to rename; the {what}s are {', '.join(names)}")
        return [override.get(name, name) for name in names]
    if isinstance(override, str) or len(override) != len(names):
        given = repr(override) if isinstance(override, str) else f"{len(override)} names"
        raise ConfigError(f"{what}_names: {given} for the {len(names)} {what}s {', '.join(names)}")
    return list(override)


def _keys(spec: Any, prefix: str) -> Iterator[str]:
    """Yield the path of every leaf of an output structure, its keys and indices joined by ``_``; the path is empty
    where no key is on it."""
    if spec.is_leaf():
        yield prefix
        return
    children = spec.children()
    for i, child in enumerate(children):
        key = _key(spec.context, i, len(children))
        name = f"{prefix}_{key}" if prefix else ("" if key.isdigit() else key)
        yield from _keys(child, name)


def _key(context: Any, index: int, count: int) -> str:
    named = isinstance(context, list) and len(context) == count and all(isinstance(key, str) for key in context)
    return str(context[index]) if named else str(index)
