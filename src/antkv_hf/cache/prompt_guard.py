"""Notices a cache that is handed to `generate` with a prompt it does not hold.

transformers trusts a user's cache: with a longer, different prompt it silently writes wrong text. The cache itself
never sees token ids, but `generate` marks a user's cache (`cache._is_user_defined = True`) while its own frame still
holds them. Where that frame looks different (another transformers), the guard stays silent; tests pin both.

What is compared is the previous *prompt*: tokens that were generated after it are not checked, nor are calls that
follow beam search or batch operations.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch

_FRAMES = 4  # how far above the marking statement generate()'s own frame may be


def generate_input_ids() -> torch.Tensor | None:
    """The prompt ids ``(batch, n)`` of the `generate` call that is marking its cache, or None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name == "generate":
            ids = frame.f_locals.get("input_ids")
            return ids if isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() else None
        frame = frame.f_back
    return None


class PromptGuard:
    """Remembers the prompt that a cache was filled with, and compares the next one with it."""

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None

    def mismatch(self, ids: torch.Tensor, length: int) -> str | None:
        """Why a cache of `length` tokens cannot continue the prompt `ids`, or None if it can (or it is not known)."""
        if self.ids is None or length == 0:
            return None
        known = self.ids
        if ids.shape[0] != known.shape[0]:
            if ids.shape[0] % known.shape[0] == 0 or known.shape[0] % ids.shape[0] == 0:
                return None  # beams and return sequences expand the batch
            return f"it holds a batch of {known.shape[0]} and the prompt is a batch of {ids.shape[0]}"
        if ids.shape[1] < length:
            return f"it holds {length} tokens and the prompt has only {ids.shape[1]}"
        n = min(known.shape[1], length)
        differs = (ids[:, :n].cpu() != known[:, :n]).any(0)
        if differs.any():
            return f"it holds {length} tokens of another prompt (they differ at token {int(differs.int().argmax())})"
        return None

    def remember(self, ids: torch.Tensor) -> None:
        self.ids = ids.detach().cpu().clone()

    def forget(self) -> None:
        self.ids = None
