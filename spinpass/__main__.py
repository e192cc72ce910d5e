"""``python -m spinpass``."""

from spinpass.cli import main

main()
