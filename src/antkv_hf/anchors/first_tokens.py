"""First tokens of each chunk: a baseline that looks at nothing."""

from __future__ import annotations

import torch

from .base import TokenContext


class FirstTokens:
    """``score_j = -position_j``"""

    term = None

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return -tokens.positions.float().unsqueeze(1).expand(tokens.keys.shape[:3])
