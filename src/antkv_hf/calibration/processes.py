"""The processes that share a calibration: as many as `accelerate launch` or `torchrun` started, one without them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

_PATIENCE = timedelta(days=1)  # launchers end all processes when one fails: what waits this long is slow, not dead
T = TypeVar("T")


class Processes:
    """Process `rank` of `size`, `local_rank` on its machine, and how they wait for each other. A context manager.

    Args:
        cpu: whether the model computes on the CPU.
    """

    def __init__(self, cpu: bool) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
            PartialState(cpu=cpu, timeout=_PATIENCE)
            atexit.register(_leave)
        several = distributed.is_available() and distributed.is_initialized()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.rank = distributed.get_rank() if several else 0
        self.size = distributed.get_world_size() if several else 1
        # Only words are exchanged, and gloo needs no device for them.
        self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE) if self.size > 1 else None

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item: all processes together have each item once."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Returns once every process has come here."""
        if self._group is not None:
            distributed.barrier(self._group)

    def agreed(self, value: T) -> T:
        """The first process's `value`, in every process."""
        told = [value]
        if self._group is not None:
            distributed.broadcast_object_list(told, src=0, group=self._group)
        return told[0]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error) -> None:
        if self._group is not None:
            distributed.destroy_process_group(self._group)


def on_cpu(device: str) -> bool:
    """Whether a `--device` of the command line is the CPU."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def device_of(device: str, local_rank: int) -> str:
    """The device of a process of this machine: with auto or cuda each has a GPU of its own.

    Raises:
        ValueError: one device for several processes, or fewer GPUs than processes.
    """
    if local_rank == 0 or on_cpu(device):
        return device
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"--device {device} would be shared by several processes: leave it out, each takes its own GPU"
        )
    if local_rank >= (count := torch.cuda.device_count()):
        raise ValueError(f"process {local_rank + 1} of this machine has no GPU, since there are {count}: start {count}")
    return f"cuda:{local_rank}"


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
