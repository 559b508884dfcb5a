"""Random tokens: the baseline every score has to beat."""

from __future__ import annotations

import torch

from .base import TokenContext


class RandomTokens:
    """A fixed pseudo-random number for each (position, kv head): the same tokens in every run and backend."""

    term = None

    def score(self, tokens: TokenContext) -> torch.Tensor:
        head = torch.arange(tokens.keys.shape[1], device=tokens.keys.device).view(1, -1, 1)
        mixed = (tokens.positions.unsqueeze(1) + 1) * 2654435761 + head * 40503  # Knuth's multiplicative hash
        return ((mixed ^ (mixed >> 15)) * 2246822519 % 1000003).float().expand(tokens.keys.shape[:3])
