"""A Hugging Face KV cache that is vector-quantized down to 1 bit and below (AnTKV, arXiv 2506.19505)."""

from .cache.cache import AnTKVCache
from .cache.footprint import MemoryFootprint
from .codebook import AnTKVCodebook
from .config import AnchorConfig, AnTKVConfig, VQSpec
from .generation import antkv_generate

__version__ = "0.1.0"
__all__ = [
    "AnTKVCache",
    "AnTKVCodebook",
    "AnTKVConfig",
    "AnchorConfig",
    "MemoryFootprint",
    "VQSpec",
    "antkv_generate",
    "calibrate",
]


def __getattr__(name: str):
    if name == "calibrate":  # not needed to use a cache, so not imported with it
        from .calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
