"""What an anchor score is: a number a token and kv head, the larger the more it hurts to quantize that token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..reference.scores import ColumnTerm


@dataclass(frozen=True)
class TokenContext:
    """What is known of the tokens that are about to be encoded; shapes ``(batch, kv_heads, n)`` unless said.

    Args:
        statistic: sum over the queries seen so far of the score's `term`, or None for scores without one.
        keys: exact keys after RoPE ``(batch, kv_heads, n, head_dim)``; values likewise.
        key_error, value_error: squared quantization errors |dk|^2 and |dv|^2.
        logit_variance: mean over queries of ``scale^2 |q|^2 / head_dim``: variance of a logit per unit |dk|^2,
            ``(batch, kv_heads, 1)``.
        positions: position of each token in its sequence ``(batch, n)``; negative for padding.
    """

    statistic: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    key_error: torch.Tensor
    value_error: torch.Tensor
    logit_variance: torch.Tensor
    positions: torch.Tensor

    def received(self) -> torch.Tensor:
        """The statistic, for scores that have a `term`."""
        assert self.statistic is not None, "the score has a term, so its statistic is kept"
        return self.statistic


class AnchorScore(Protocol):
    """One way to choose anchors. `term` is what it needs summed over queries (None: it does not look at queries)."""

    term: ColumnTerm | None

    def score(self, tokens: TokenContext) -> torch.Tensor:
        """Scores ``(batch, kv_heads, n)``; the largest of each chunk become anchors."""
        ...
