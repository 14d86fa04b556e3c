"""What ``--device`` means on this machine."""

from __future__ import annotations

import re

import torch

from ..config import DEVICES
from ..errors import ConfigError
from .source import CPU


def devices_of(named: str) -> tuple[torch.device, ...]:
    """The devices that ``named`` means: ``cpu``, ``cuda`` (the first GPU), ``cuda:1``, or several GPUs with commas.

    Raises:
        ConfigError: it means nothing, there is no such GPU here, or one is named twice.
    """
    if not re.fullmatch(DEVICES, named):
        raise ConfigError(f"device {named!r} is neither cpu nor cuda, cuda:1 or cuda:0,cuda:1")
    if named == "cpu":
        return (CPU,)
    if not torch.cuda.is_available():
        raise ConfigError(f"device {named!r}: torch sees no CUDA device here", "Use --device cpu.")
    numbers = [int(part.partition(":")[2] or 0) for part in named.split(",")]
    count = torch.cuda.device_count()
    if max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"device {named!r}: torch sees {count} CUDA device(s) here, cuda:0 to cuda:{count - 1}",
            "Name each GPU once, or use --device cpu.",
        )
    return tuple(torch.device("cuda", number) for number in numbers)
