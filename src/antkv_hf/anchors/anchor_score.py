"""AnTKV's Anchor Score (arXiv 2506.19505)."""

from __future__ import annotations

import torch

from ..reference.scores import anchor_score_term
from .base import TokenContext


class AnTKVAnchorScore:
    """``AnS_j = sum over the head group and queries i of p_ij |v_j - o_i| |q_i|``: first-order error bound for keys."""

    term = staticmethod(anchor_score_term)

    def score(self, tokens: TokenContext) -> torch.Tensor:
        return tokens.received()
