"""The demo: the whole cure shown on a small real model."""

from .run import run_demo

__all__ = ["run_demo"]
