"""A program run on real or made-up inputs: what it takes, what it returns, what it hands itself."""

from .blocks import block_run, blocks_of, read_constants
from .draws import draws
from .interpreter import (
    Deferred,
    Runner,
    Watch,
    constants,
    execute,
    execute_each,
    execute_together,
    flat_inputs,
    origin,
    run,
    user_input_names,
)
from .likelihoods import log_probabilities
from .reading import holds_positions, read_in_pieces, reading_inputs, reading_sizes, token_input
from .returned import continued_inputs, output_names, returned_state
from .roles import InputRole
from .session import Session, copies, into_basis, step_together
from .synthetic import (
    Sizes,
    UserInput,
    bound_sizes,
    concrete,
    fresh,
    next_inputs,
    specialised,
    synthetic_inputs,
    user_inputs,
)

__all__ = [
    "Deferred",
    "InputRole",
    "Runner",
    "Session",
    "Sizes",
    "UserInput",
    "Watch",
    "block_run",
    "blocks_of",
    "bound_sizes",
    "concrete",
    "constants",
    "continued_inputs",
    "copies",
    "draws",
    "execute",
    "execute_each",
    "execute_together",
    "flat_inputs",
    "fresh",
    "holds_positions",
    "into_basis",
    "log_probabilities",
    "next_inputs",
    "origin",
    "output_names",
    "read_constants",
    "read_in_pieces",
    "reading_inputs",
    "reading_sizes",
    "returned_state",
    "run",
    "specialised",
    "step_together",
    "synthetic_inputs",
    "token_input",
    "user_input_names",
    "user_inputs",
]
