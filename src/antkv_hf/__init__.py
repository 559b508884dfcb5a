"""A Hugging Face KV cache that is vector-quantized down to 1 bit and below (AnTKV, arXiv 2506.19505).

Names are imported when they are first used, so that ``antkv --help`` answers before torch and transformers are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.cache import AnTKVCache
    from .cache.footprint import MemoryFootprint
    from .calibration import calibrate
    from .calibration.finetune import finetune
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
    "finetune",
]

_HOMES = {
    "AnTKVCache": ".cache.cache",
    "AnTKVCodebook": ".codebook",
    "AnTKVConfig": ".config",
    "AnchorConfig": ".config",
    "MemoryFootprint": ".cache.footprint",
    "VQSpec": ".config",
    "antkv_generate": ".generation",
    "calibrate": ".calibration",
    "finetune": ".calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
