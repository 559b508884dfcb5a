"""Quality of a cache: perplexity under stated protocols, bits counted in full, tables of both."""

from .perplexity import EvaluationRow, cache_losses, evaluate, one_shot_losses, real_bits
from .protocols import AttentionCall, Protocol, ProtocolEvaluator, ReadBack
from .report import format_rows, save_codebook, with_rows

__all__ = [
    "AttentionCall",
    "EvaluationRow",
    "Protocol",
    "ProtocolEvaluator",
    "ReadBack",
    "cache_losses",
    "evaluate",
    "format_rows",
    "one_shot_losses",
    "real_bits",
    "save_codebook",
    "with_rows",
]
