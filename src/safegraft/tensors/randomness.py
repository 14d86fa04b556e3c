"""Randomness that depends on names alone, never on order, workers or what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the run's seed and a name (a tensor's, usually) alone; other numbers on a GPU."""
    mixed = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed[:8], "little") >> 1)


def uniform(shape: Sequence[int], rng: torch.Generator, device: torch.device) -> Tensor:
    """float32 numbers from [0, 1) on ``device``, drawn where ``rng`` is: a CPU's draws are the same on every device."""
    return torch.rand(tuple(shape), generator=rng, device=rng.device).to(device)
