"""Importing this package registers every built-in method."""

from . import interference

__all__ = ["interference"]
