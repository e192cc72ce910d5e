"""Programs that no file can hold, whatever its format."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from spinpass.errors import ExportError
from spinpass.graph import Handle


def refuse_fake_weights(ep: ExportedProgram) -> None:
    """Raise ExportError where a weight has no values."""
    for name, tensor in (*ep.state_dict.items(), *ep.constants.items()):
        if isinstance(tensor, torch.Tensor) and type(tensor.data) not in (torch.Tensor, Handle):
            raise ExportError(
                f"{name} is a {type(tensor.data).__name__}, not a tensor with values:"
                " load the weights into the program first"
            )


def refuse_mutation(ep: ExportedProgram, artefact: str) -> None:
    """Raise ExportError where the program writes to its inputs or buffers, which ``artefact`` cannot hold."""
    signature = ep.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        raise ExportError(
            f"the program writes to {written[0]}{more} in place, and {artefact} keeps no state between calls:"
            " export the program with that state, for example a static cache, as inputs and outputs"
        )
