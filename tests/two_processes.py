"""Two processes of this machine, joined as `torchrun` would join them, that run functions of the tests."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = 2
_PATIENCE = 300  # seconds for one call; starting takes most of the first
_IMPORTED = [  # once, before the processes part
    "antkv_hf.cache.cache", "antkv_hf.calibration", "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
]  # fmt: skip


class TwoProcesses:
    """Starts them once for a module, since importing torch and transformers takes seconds. Close with `end`.

    With `backend` "nccl" each has a GPU of its own, which is its current device; with "gloo" both compute on the CPU.
    """

    def __init__(self, folder: Path, backend: str = "gloo"):
        # A process whose imports have touched CUDA cannot be forked, so those with a GPU import for themselves.
        context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        if backend == "gloo":
            context.set_forkserver_preload(_IMPORTED)
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, backend, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What ``function(*args)`` returns in each; `function` belongs to a module, and fails in both or in none."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(_PATIENCE):
                self.end()
                raise TimeoutError(f"process {rank} has not answered within {_PATIENCE} s")
            answers.append(pipe.recv())
        if failed := [text for good, text in answers if not good]:
            raise AssertionError(failed[0])
        return [value for _, value in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, backend: str, store: str, pipe) -> None:
    numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=SIZE, LOCAL_WORLD_SIZE=SIZE)
    os.environ.update({name: str(number) for name, number in numbers.items()})
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=SIZE)
    while True:
        try:
            function, args = pipe.recv()
            answer = True, function(*args)
        except EOFError:  # the tests are gone
            return
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
