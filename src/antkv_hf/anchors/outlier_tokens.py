"""Outlier tokens (the score of OTT, ACL 2025, arXiv 2505.10938)."""

from __future__ import annotations

import torch

from .base import TokenContext


class OutlierTokens:
    """``score_j = -|k_j|_1``: channels with the largest keys decide the sum, and tokens that are small there would
    widen the range that a group of keys shares. Looks at no query."""

    term = None

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return -tokens.keys.float().abs().sum(-1)
