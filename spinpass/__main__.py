"""``python -m spinpass``."""

from .cli import main

main()
