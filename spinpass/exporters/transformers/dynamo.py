"""transformers' DynamoExporter, rotated."""

from __future__ import annotations

from .mixin import RotationMixin


class RotatedDynamoExporter(RotationMixin):
    """This exporter makes a rotated ``ExportedProgram``, online Hadamards as ``torch.ops.spinpass.hadamard``.

    What it saves loads where ``spinpass`` has been imported, which registers that operator.
    """
