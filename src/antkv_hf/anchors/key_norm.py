"""Key norm (the score of OTT, ACL 2025): tokens with the smallest keys are the outliers."""

from __future__ import annotations

import torch

from .base import TokenContext


class KeyNorm:
    """``score_j = -|k_j|``; looks at no query."""

    term = None

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return -tokens.keys.float().norm(dim=-1)
