"""Work of a captured step that nothing in the step waits for: a branch of the graph, beside the layers that follow.

What a query says of the tail's tokens is read when a chunk is encoded, at most once a step. In line it would keep every
layer waiting for one more small kernel; on a branch it runs while the layer's MLP reads its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

MOST_HELD = 1 << 26  # bytes of activations that a branch may keep from being used again


class Branch:
    """A second stream beside the one that is captured; what it reads is held until the main one has waited for it."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._held: list[torch.Tensor] = []

    @contextmanager
    def reading(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Inside, work goes to the branch; it may read `tensors` and write what nothing else in the step reads."""
        if sum(tensor.nbytes for tensor in self._held) > MOST_HELD:
            self.join()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._held.extend(tensors)

    def join(self) -> None:
        """The main stream waits for the branch."""
        if self._held:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._held.clear()


_BRANCH: ContextVar[Branch | None] = ContextVar("antkv_branch", default=None)


@contextmanager
def branching(branch: Branch) -> Iterator[None]:
    """Inside, steps leave their observations to `branch`; at the end everything is joined."""
    token = _BRANCH.set(branch)
    try:
        yield
    finally:
        _BRANCH.reset(token)
        branch.join()


@contextmanager
def beside(*tensors: torch.Tensor) -> Iterator[None]:
    """Inside, work that reads `tensors` goes to the branch, if there is one, else on as it is."""
    branch = _BRANCH.get()
    if branch is None:
        yield
    else:
        with branch.reading(*tensors):
            yield
