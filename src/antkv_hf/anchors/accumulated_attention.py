"""Accumulated attention (the score of H2O, arXiv 2306.14048)."""

from __future__ import annotations

import torch

from ..reference.scores import accumulated_attention_term
from .base import TokenContext


class AccumulatedAttention:
    """``score_j = sum_i p_ij``"""

    term = staticmethod(accumulated_attention_term)

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return tokens.received()
