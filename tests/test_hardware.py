import os

import torch

from safegraft import hardware
from safegraft.hardware import memory_of, multiplies_bfloat16


def test_a_container_has_what_it_may_use(tmp_path, monkeypatch):
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(hardware, "LIMIT", tmp_path / "memory.max")
    assert memory_of(torch.device("cpu")) == has  # no such file
    for told, wanted in (("1000000\n", 1_000_000), ("max\n", has), (f"{2 * has}\n", has)):
        hardware.LIMIT.write_text(told)
        assert memory_of(torch.device("cpu")) == wanted


def test_bfloat16_only_where_the_processor_is_known_to_multiply_it(monkeypatch):
    told = {"avx512_f": True, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert not multiplies_bfloat16(torch.device("cpu"))
    for unit in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setitem(told, unit, True)
        assert multiplies_bfloat16(torch.device("cpu"))
        monkeypatch.setitem(told, unit, False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as an older torch
    assert not multiplies_bfloat16(torch.device("cpu"))
