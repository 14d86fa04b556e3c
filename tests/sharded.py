"""`safegraft` with FSDP on CPUs, which accelerate leaves out: run as a script, in every process. STOP=N in the
environment ends a SafeKey training after its Nth checkpoint."""

import os

from accelerate import state
from accelerate.utils import DistributedType

from safegraft.cli import main
from safegraft.train.safekey.trainer import SafeKeyTrainer


class Stopped(Exception):
    """As if the machine had gone."""


def lift():
    plain = state.PartialState.__init__

    def begin(self, *given, **named):
        plain(self, *given, **named)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = begin


def stop_after(count):
    plain = SafeKeyTrainer._save_checkpoint

    def save(self, *given, **named):
        plain(self, *given, **named)
        assert self.is_fsdp_enabled
        if self.state.global_step == count:
            raise Stopped

    SafeKeyTrainer._save_checkpoint = save


if __name__ == "__main__":
    lift()
    if "STOP" in os.environ:
        stop_after(int(os.environ["STOP"]))
    main()
