"""GPUs that are not there: tensors with a memory of their own, streams, and pinned memory.

Values are worked out on the processor, so that what comes out can be compared bit for bit. What a real GPU would punish
with a wrong number now and then is an error here, every time:

* a tensor meets one of another device;
* an operation is not on a stream of the tensor's device, or on another stream than the one that made it;
* the first linear algebra is asked for by a thread beside others (pytorch/pytorch#90613);
* memory is used again while a copy out of it is under way; an answer is read before its copy has ended (it is NaN till
  then).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = ("aten::_to_copy", "aten::to", "aten::copy_")
current = threading.local()


class OnGpu(torch.Tensor):
    """A tensor on a GPU: ``held`` are its values, which no test looks at."""

    device = property(lambda self: self.where)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, where, stream):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip

    def __init__(self, held, where, stream):
        self.held, self.where, self.stream = held, where, stream

    def tolist(self):
        self.stream.synchronize()
        return self.held.tolist()

    def __deepcopy__(self, memo):
        return OnGpu(self.held.clone(), self.where, self.stream)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Named(TorchFunctionMode):
    """``cuda`` is ``cuda:0``, and numbers become a tensor there by way of the processor: C++ asks a GPU for both."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = tree_map(numbered, (args, kwargs or {}))
        there = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and there is not None and torch.device(there).type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(there)
        return func(*args, **kwargs)


def numbered(leaf):
    if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf == "cuda"):
        where = torch.device(leaf)
        return torch.device("cuda", 0) if where.type == "cuda" and where.index is None else where
    return leaf


class Generator(torch.Generator):
    """One of a GPU's, or of the processor's; both draw the same numbers."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.where = torch.device(device)
        return made

    device = property(lambda self: self.where)


class Stream:
    """What was asked of it and has not been waited for, in order."""

    def __init__(self, device):
        self.device, self.waiting, self.ended = device, [], 0

    def synchronize(self, until: int | None = None) -> None:
        while self.waiting and (until is None or self.ended < until):
            self.waiting.pop(0)()
            self.ended += 1

    def record_event(self):
        until = self.ended + len(self.waiting)
        return SimpleNamespace(synchronize=lambda: self.synchronize(until))

    def later(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)


@contextmanager
def on(stream: Stream):
    """``torch.cuda.stream``."""
    assert getattr(current, "stream", None) is None
    current.stream = stream
    try:
        with Mode():
            yield
    finally:
        current.stream = None


class Gpus:
    """``count`` of them with ``memory`` bytes each, there for the length of a block.

    Args:
        default: everything happens on the first one's default stream, as in programs that know of no others.

    Attributes:
        log: (device, operation, shape of its first tensor). streams: all that were made.
    """

    def __init__(self, count: int, memory: int, *, default: bool = False) -> None:
        self.count, self.memory, self.default = count, memory, default
        self.log: list[tuple[str, str, tuple[int, ...]]] = []
        self.streams: list[Stream] = []
        self.pinned: set[int] = set()
        self.prepared = False

    def __enter__(self) -> Gpus:
        if torch.version.cuda or torch.version.hip:
            pytest.skip("a torch built for GPUs does not take these for one")

        class Noted(Stream):
            def __init__(own, device):
                super().__init__(device)
                self.streams.append(own)

        fakes = {
            "is_available": lambda: True, "device_count": lambda: self.count, "_lazy_init": lambda: None,
            "mem_get_info": lambda device: (self.memory, self.memory), "Stream": Noted, "stream": on,
            "get_device_name": lambda device: f"GPU {device.index}",
            "set_device": lambda device: None, "current_device": lambda: 0, "manual_seed_all": lambda seed: None,
            "is_bf16_supported": lambda including_emulation=True: True, "empty_cache": lambda: None,
            "get_device_capability": lambda device=None: (9, 0),
        }  # fmt: skip
        self.patch = pytest.MonkeyPatch()
        for name, fake in fakes.items():
            self.patch.setattr(torch.cuda, name, fake)
        self.patch.setattr("gpus.here", self)
        self.modes = ExitStack()
        if self.default:
            self.modes.enter_context(on(Stream(torch.device("cuda", 0))))
            self.modes.enter_context(Named())
            self.patch.setattr(torch, "Generator", Generator)
            self.patch.setattr(torch.cuda.random, "get_rng_state", torch.get_rng_state)
            self.patch.setattr(torch.cuda.random, "set_rng_state", torch.set_rng_state)
            self.patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())  # wraps no tensors
        return self

    def __exit__(self, *_: object) -> None:
        self.modes.close()
        self.patch.undo()


here: Gpus | None = None


def run(func, args, kwargs):
    name = func._schema.name
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if name == "aten::empty" and given.get("pin_memory"):
        made = func(**{**given, "pin_memory": False})
        here.pinned.add(made.untyped_storage().data_ptr())
        return made
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    lifted = [t for t in tensors if isinstance(t, OnGpu)]
    places, target = {t.where for t in lifted}, None
    if given.get("device") is not None:
        target = torch.device(given["device"])
        if target.type == "meta":  # what the C++ of a tensor there takes it for
            target = current.stream.device
    if not places and (target is None or target.type == "cpu"):
        return func(*args, **kwargs)
    copies = name in COPIES
    assert copies or all(isinstance(t, OnGpu) or t.dim() == 0 for t in tensors), f"{name} meets a CPU tensor"
    assert len(places) < 2, f"{name} meets tensors of {places}"
    place = places.pop() if places else target
    stream = getattr(current, "stream", None)
    assert stream is not None, f"{name} on the default stream"
    assert stream.device == place, f"{name} of {place} on a stream of {stream.device}"
    assert all(t.stream is stream for t in lifted), f"{name} on another stream than its tensors'"
    if "linalg" in name or "cholesky" in name:
        here.prepared = here.prepared or threading.current_thread() is threading.main_thread()
        assert here.prepared, f"{name} is the first of its kind, in a thread"
    here.log.append((str(place), name, tuple(tensors[0].shape) if tensors else ()))
    if target is not None:
        given["device"] = torch.device("cpu")
    later = given.pop("non_blocking", False)
    if "pin_memory" in given:
        given["pin_memory"] = False
    leaves = (copies and not all(isinstance(t, OnGpu) for t in tensors)) or name == "aten::_local_scalar_dense"
    if leaves and not later:
        stream.synchronize()
    elif leaves and name == "aten::copy_":
        return downwards(given["self"], given["src"], stream)
    elif leaves:
        upwards(given["self"], stream)
    out = func(**tree_map(values, given))
    if (name == "aten::copy_" and not isinstance(given["self"], OnGpu)) or (
        target is not None and target.type == "cpu"
    ):
        return out
    made = tree_map(lambda t: OnGpu(t, place, stream) if isinstance(t, torch.Tensor) else t, out)
    wanted = [t.numel() * t.element_size() for t in tree_leaves(made) if isinstance(t, OnGpu)]
    if sum(wanted) > here.memory:
        raise torch.OutOfMemoryError(f"{sum(wanted)} bytes wanted on {place}, which has {here.memory}")
    return made


def values(leaf):
    return leaf.held if isinstance(leaf, OnGpu) else leaf


def upwards(source, stream):
    """A copy to the GPU that may read ``source`` at any time until it is waited for."""
    assert source.untyped_storage().data_ptr() in here.pinned, "an asynchronous copy of memory that is not pinned"
    before = source.clone()

    def check():
        assert same(source, before), "memory was used again while it was being copied"

    stream.later(check)


def downwards(out, source, stream):
    """A copy from the GPU that has not happened until it is waited for."""
    assert out.untyped_storage().data_ptr() in here.pinned, "an asynchronous copy into memory that is not pinned"
    found = source.held.clone()
    out.fill_(float("nan"))
    stream.later(lambda: out.copy_(found))
    return out


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
