"""What the machine has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux tells the memory that a container may use, in bytes, or "max"."""


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all; on a CPU, those that this process may use."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(has, int(LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return has


def free_memory_of(gpu: torch.device) -> int:
    """Bytes of a GPU's memory that nobody uses."""
    import torch

    return int(torch.cuda.mem_get_info(gpu)[0])


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 by itself, which makes mixed precision faster than float32.

    On a CPU as torch.cpu.get_capabilities tells; a torch too old to tell, or a kind of processor that is not known to
    do it here, counts as one that does not.
    """
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(told.get(unit) for unit in ("avx512_bf16", "amx_bf16"))


def in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether ``precision`` means bfloat16 on a device; ``auto`` does on a GPU that multiplies it by itself."""
    if precision == "auto":
        return device.type == "cuda" and multiplies_bfloat16(device)
    return precision == "bfloat16"
