"""Quality of a cache: perplexity under stated protocols, bits counted in full, tables of both."""

from .perplexity import EvaluationRow, cache_losses, evaluate
from .protocols import Protocol, ProtocolEvaluator
from .report import format_rows, save_codebook, with_rows

__all__ = [
    "EvaluationRow",
    "Protocol",
    "ProtocolEvaluator",
    "cache_losses",
    "evaluate",
    "format_rows",
    "save_codebook",
    "with_rows",
]
