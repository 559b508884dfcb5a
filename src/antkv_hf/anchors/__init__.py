"""Which tokens stay exact: one file a score behind the interface in `base`; `budget` says how many."""

from typing import cast

from .accumulated_attention import AccumulatedAttention
from .anchor_score import AnTKVAnchorScore
from .base import AnchorScore, TokenContext
from .budget import anchors_per_chunk, best_tokens, select_anchors, within_budget
from .error_aware import ErrorAware
from .first_tokens import FirstTokens
from .key_norm import KeyNorm
from .outlier_tokens import OutlierTokens
from .random_tokens import RandomTokens
from .squared_attention import SquaredAttention

_SCORES = {
    "error_aware": ErrorAware(),
    "anchor_score": AnTKVAnchorScore(),
    "accumulated_attention": AccumulatedAttention(),
    "squared_attention": SquaredAttention(),
    "key_norm": KeyNorm(),
    "outlier_tokens": OutlierTokens(),
    "first_tokens": FirstTokens(),
    "random": RandomTokens(),
    "none": None,
}


SCORES = cast("dict[str, AnchorScore | None]", _SCORES)


def get_score(name: str) -> AnchorScore | None:
    """The score of that name; raises ValueError listing the names there are."""
    if name not in SCORES:
        raise ValueError(f"anchor score {name!r} is unknown; choose one of {', '.join(SCORES)}")
    return SCORES[name]


__all__ = [
    "SCORES",
    "AnchorScore",
    "TokenContext",
    "anchors_per_chunk",
    "best_tokens",
    "get_score",
    "select_anchors",
    "within_budget",
]
