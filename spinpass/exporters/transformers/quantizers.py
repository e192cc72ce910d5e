"""The quantizer slot of an export config, where a rotation stands between the trace and the quantizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import execution, record
from spinpass.errors import ExportError
from spinpass.execution import into_basis

Sample = Mapping[str, Any]


def refuse_graph_quantizer(config: Any) -> None:
    """Raise ExportError where the config's quantizer works on the traced graph."""
    quantizer = config.quantizer
    if quantizer is not None and quantizer.quantizes_fx_graph:
        raise ExportError(
            f"{type(quantizer).__name__} quantizes the traced graph before it can be rotated, and a rotation does not "
            "pass through its roundings: quantize what RotatedDynamoExporter exports, or take a quantizer of the "
            "converted model, or spinpass.quantization"
        )


def calibrated(config: Any, sample_inputs: Sample, rotated: Callable[[], ExportedProgram]) -> Any:
    """Return the config with a quantizer whose calibration samples hold caches in the rotated program's basis.

    ``rotated`` is called when the first sample is read, after the trace. Without a calibration set of its own the
    quantizer reads ``sample_inputs``, as transformers has it.
    """
    quantizer = config.quantizer
    if quantizer is None:
        return config
    samples = quantizer.calibration_dataset or [sample_inputs]
    return dataclasses.replace(config, quantizer=quantizer.with_calibration(RotatedSamples(samples, rotated)))


def traced_samples(program: ExportedProgram, samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield of each sample what the program was traced with. Raises ExportError where a sample lacks some of it."""
    return (_traced(program, sample) for sample in samples)


class RotatedSamples:
    """These are forward kwargs whose cache tensors are those that the rotated program takes. They are copies: the
    samples stay as they are."""

    def __init__(self, samples: Iterable[Sample], rotated: Callable[[], ExportedProgram]) -> None:
        self._samples, self._rotated = samples, rotated

    def __iter__(self) -> Iterator[Sample]:
        program = self._rotated()
        found = record.read(program)
        carried = found.inputs if found is not None else {}
        for sample in self._samples:
            made = copy.deepcopy(dict(sample)) if carried else sample
            given = execution.flat_inputs(program, _traced(program, made)) if carried else {}
            for name, entry in carried.items():
                value: Tensor = given[name]
                value.copy_(into_basis(value, entry))
            yield made


def _traced(program: ExportedProgram, sample: Sample) -> Sample:
    """Return the kwargs that the program was traced with, in its order."""
    names = program.call_spec.in_spec.child(1).context
    missing = [name for name in names if name not in sample]
    if missing:
        raise ExportError(f"a calibration sample lacks {missing[0]}; the program takes {', '.join(names)}")
    return {name: sample[name] for name in names}
