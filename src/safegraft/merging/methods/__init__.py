"""Importing this package registers every built-in method."""

from . import additive, geometric, interference, sparse, subspace

__all__ = ["additive", "geometric", "interference", "sparse", "subspace"]
