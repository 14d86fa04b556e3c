"""Importing this package registers every built-in method."""

from . import additive, calibrated, geometric, interference, masked, sparse, subspace

__all__ = ["additive", "calibrated", "geometric", "interference", "masked", "sparse", "subspace"]
