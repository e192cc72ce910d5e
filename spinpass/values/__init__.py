"""How the values that spinpass returns are shown and kept: columns of text, tables in a notebook, documents of JSON."""

from .columns import columns
from .documents import Fields, check_told, titled
from .notebook import notebook_lines, notebook_parts, notebook_table

__all__ = [
    "Fields",
    "check_told",
    "columns",
    "notebook_lines",
    "notebook_parts",
    "notebook_table",
    "titled",
]
