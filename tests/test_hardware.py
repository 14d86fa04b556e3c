import os

import torch

from safegraft import hardware
from safegraft.hardware import memory_of


def test_a_container_has_what_it_may_use(tmp_path, monkeypatch):
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(hardware, "LIMIT", tmp_path / "memory.max")
    assert memory_of(torch.device("cpu")) == has  # no such file
    for told, wanted in (("1000000\n", 1_000_000), ("max\n", has), (f"{2 * has}\n", has)):
        hardware.LIMIT.write_text(told)
        assert memory_of(torch.device("cpu")) == wanted
