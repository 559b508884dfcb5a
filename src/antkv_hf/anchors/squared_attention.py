"""Sum of squared attention."""

from __future__ import annotations

import torch

from ..reference.scores import squared_attention_term
from .base import TokenContext


class SquaredAttention:
    """``score_j = sum_i p_ij^2``: a value error dv_j changes the outputs by this much in squared norm."""

    term = staticmethod(squared_attention_term)

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return tokens.received()
