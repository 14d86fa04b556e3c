"""What the machine has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

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
