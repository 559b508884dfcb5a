"""Key norm: tokens with the smallest keys, which take attention without having been sought."""

from __future__ import annotations

import torch

from .base import TokenContext


class KeyNorm:
    """``score_j = -|k_j|``; looks at no query."""

    term = None

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return -tokens.keys.float().norm(dim=-1)
