import os

import torch

from safegraft import hardware
from safegraft.hardware import in_bfloat16, memory_of, multiplies_bfloat16


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


def test_auto_means_bfloat16_on_gpus_that_multiply_it_themselves(monkeypatch):
    """A T4 or V100 emulates it, slowly, and torch says that it is supported unless asked about that."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: native or including_emulation,
        )
        assert in_bfloat16("auto", gpu) == native
    assert not in_bfloat16("auto", cpu)
    assert in_bfloat16("bfloat16", cpu)
    assert not in_bfloat16("float32", gpu)
