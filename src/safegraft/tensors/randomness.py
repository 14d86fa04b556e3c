"""Randomness that depends on names alone, never on order, workers or what ran before."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the run's seed and a name (a tensor's, usually) alone."""
    mixed = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
