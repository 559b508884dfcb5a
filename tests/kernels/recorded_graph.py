"""A graph on a CPU: what PyTorch and Triton did in one call of a function is done again, on the same tensors.

Like a CUDA graph, a replay runs none of the function's Python, so numbers that the host worked out stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host asked for a number: a capture does not allow that")
        out = func(*args, **kwargs)
        self.names.append(func.overloadpacket.__name__)

        def again() -> None:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return out


class RecordedGraph:
    """Records in `capture`, where a CUDA graph would do nothing yet: the replay that follows has been done already."""

    runs_python = False

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> None:
        recording = _Recording()
        run = InterpretedFunction.run

        def launch(kernel, *args, grid, warmup, **kwargs):
            with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own work on tensors
                result = run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            recording.names.append(kernel.fn.__name__)
            recording.calls.append(lambda: run(kernel, *args, grid=grid, warmup=warmup, **kwargs))
            return result

        with mock.patch.object(InterpretedFunction, "run", launch), recording:
            self.output = function()
        self.calls, self.names, self._done = recording.calls, recording.names, True

    def replay(self) -> Any:
        if not self._done:
            for call in self.calls:
                call()
        self._done = False
        return self.output
