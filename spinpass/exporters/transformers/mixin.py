"""``torch.export -> transform -> conversion``: what the rotated exporters share."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from transformers.exporters.exporter_dynamo import DynamoExporter

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, ExportError
from spinpass.pipeline import transform
from spinpass.record import Record

from .caches import RotatedComponent, check_caches
from .quantizers import refuse_graph_quantizer


class RotationMixin(DynamoExporter):
    """The mixin rotates every program that transformers traces, before a backend converts it.

    A backend's exporter comes first among the bases, ``class Mine(BackendExporter, RotationMixin)``: its
    ``export_program`` asks ``super()`` for the traced program, which is this class.

    Args:
        rotation: what to rotate; None for the default, R1–R4.

    Raises:
        ConfigError: ``rotation`` is no RotationConfig.
        ExportError: a package of the backend is missing.
    """

    extra = "transformers"
    """The extra of spinpass that installs what this exporter needs."""

    def __init__(self, rotation: RotationConfig | None = None) -> None:
        if rotation is not None and not isinstance(rotation, RotationConfig):
            raise ConfigError(f"rotation is a {type(rotation).__name__}, not a spinpass.RotationConfig")
        self.rotation = rotation or RotationConfig()
        self._components: list[RotatedComponent] = []
        self._last: ExportedProgram | None = None
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated

    def validate_environment(self) -> None:
        """Check the packages as transformers does. Raises ExportError, naming the extra, where one is missing."""
        try:
            super().validate_environment()  # type: ignore[no-untyped-call]  # as above
        except ImportError as error:
            raise ExportError(f"{error}: pip install 'spinpass[{self.extra}]'") from error

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[ExportedProgram, Any]:
        """Return the traced and rotated program, and its metadata, which names spinpass among the packages.

        Raises:
            ExportError: the quantizer works on the graph before the rotation could.
            ProgramError, QuantizedWeightError, RefusedError, VerificationError: :func:`spinpass.transform` raises them.
        """
        refuse_graph_quantizer(config)
        program, metadata = super().export_program(model, sample_inputs, config)
        rotated = transform(program, self.rotation)
        made = RotatedComponent.of(rotated, metadata)
        self._components.append(made)
        self._last = rotated
        metadata.packages["spinpass"] = made.record.version
        return self.lowered(rotated), metadata

    def lowered(self, program: ExportedProgram) -> ExportedProgram:
        """Return the rotated program as the backend takes it: as it is, unless the backend cannot be taught an
        operator."""
        return program

    @property
    def records(self) -> list[Record]:
        """List what each program of the last export says about itself, in the order of its components."""
        return [component.record for component in self._components]

    def rotated_program(self) -> ExportedProgram:
        """Return the program that was rotated last, its Hadamards as operators.

        Raises ExportError before the first export.
        """
        if self._last is None:
            raise ExportError("nothing was exported yet: call export or export_for_generation first")
        return self._last

    def export(self, model: Any, sample_inputs: Any, config: Any) -> Any:
        """Export one program as ``HfExporter.export`` does."""
        self._components.clear()
        return super().export(model, sample_inputs, config)

    def export_for_generation(self, model: Any, sample_inputs: Any, config: Any, **options: Any) -> Any:
        """Export the components of generation as ``HfExporter.export_for_generation`` does.

        An error of a component comes as the cause of its RuntimeError. Raises ExportError where two components would
        keep the cache that they share in different bases.
        """
        self._components.clear()
        exported = super().export_for_generation(model, sample_inputs, config, **options)
        check_caches(dict(zip(exported.components, self._components, strict=True)))
        return exported
