"""``python -m safegraft``."""

from .cli import main

main()
