"""Which implementation answers: chosen once for each device, reported, overridable."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ..reference.attention import attention as reference_attention

# name -> attention function with the signature of `reference.attention.attention`
BACKENDS: dict[str, Callable] = {"reference": reference_attention}
KNOWN = ("auto", "reference", "triton", "cuda")


def select_backend(requested: str, device: torch.device) -> str:
    """Name of the backend to use on `device`; the environment variable ANTKV_BACKEND wins over `requested`.

    Raises:
        ValueError: for a name that does not exist, or a backend that is not in this version.
    """
    name = os.environ.get("ANTKV_BACKEND", requested)
    if name not in KNOWN:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(KNOWN)}")
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise ValueError(
            f"backend {name!r} is not available on {device} in this version; available: {', '.join(BACKENDS)}"
        )
    return name
