"""Transformers' own quantized caches, measured by the same ruler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, QuantizedCache, cache_utils
from transformers.cache_utils import Cache


def quantized_cache(name: str, model_config: PreTrainedConfig) -> Callable[[], Cache]:
    """A factory of ``transformers.QuantizedCache``s (its defaults: group size 64, residual length 128).

    Args:
        name: ``<backend>-int<bits>``, e.g. ``quanto-int4``, ``quanto-int2``, ``hqq-int4``, or ``fp8`` (e4m3 with one
            scale for a layer's keys and one for its values, no residual).

    Raises:
        ValueError: for a name of another form, or bits that the backend does not have.
        ImportError: if the backend is not installed, or this transformers has no fp8 cache.
    """
    if name == "fp8":
        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            raise ImportError(f"baseline fp8 needs a newer transformers than {transformers.__version__}, e.g. 5.23.0")
        return lambda: QuantizedCache("fp8", model_config)
    match = re.fullmatch(r"(quanto|hqq)-int(\d)", name)
    if not match:
        raise ValueError(f"baseline {name!r} is unknown; write quanto-int4, quanto-int2, hqq-int4, hqq-int2 or fp8")
    backend, bits = match[1], int(match[2])
    axis = 0 if backend == "quanto" else 1  # of the two axes that each takes, the one that works at 4 bits

    def make() -> Cache:
        try:
            return QuantizedCache(backend, model_config, nbits=bits, axis_key=axis, axis_value=axis)
        except ImportError as error:
            raise ImportError(
                f"baseline {name} needs {'optimum-quanto' if backend == 'quanto' else 'hqq'}, which is not installed: "
                "pip install 'antkv-hf[evaluate]'"
            ) from error

    make()
    return make


def cache_bits(cache: Cache) -> tuple[float, float]:
    """Bits an element of the quantized tokens, and of all tokens, in a filled `QuantizedCache`.

    Scales and zero points count as float16, as in a 16-bit model; a float32 model stores them twice as wide.
    """
    quantized_bytes = quantized_elements = exact_bytes = exact_elements = 0
    for layer in cache.layers:
        held: Any = layer
        quantized_bytes += tensor_bytes((held._quantized_keys, held._quantized_values), widest=2)
        exact_bytes += tensor_bytes((held.keys, held.values))
        exact_elements += held.keys.numel() + held.values.numel()
        for stored in (held._quantized_keys, held._quantized_values):
            if isinstance(stored, tuple):  # hqq: codes and a dict of what goes with them; fp8: numbers and their scale
                shape = stored[1]["shape"] if isinstance(stored[1], dict) else stored[0].shape
            else:
                shape = stored.shape
            quantized_elements += int(torch.Size(shape).numel())
    bits = 8 * quantized_bytes / max(quantized_elements, 1)
    return bits, 8 * (quantized_bytes + exact_bytes) / max(quantized_elements + exact_elements, 1)


def tensor_bytes(held: Any, widest: int | None = None) -> int:
    """Bytes of all tensors in `held`: nested tuples and dicts, and tensor subclasses that wrap other tensors.

    Args:
        widest: most bytes that an element of a floating-point tensor counts as; as it is stored by default.
    """
    if isinstance(held, torch.Tensor):
        if type(held) is not torch.Tensor and hasattr(held, "__tensor_flatten__"):
            names, _ = held.__tensor_flatten__()
            return sum(tensor_bytes(getattr(held, name), widest) for name in names)
        size = held.element_size()
        return held.numel() * (size if widest is None or not held.is_floating_point() else min(size, widest))
    if isinstance(held, dict):
        return sum(tensor_bytes(value, widest) for value in held.values())
    if isinstance(held, (tuple, list)):
        return sum(tensor_bytes(value, widest) for value in held)
    return 0
