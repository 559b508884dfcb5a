"""Which implementation answers: chosen once a layer, reported, overridable."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections import Counter
from typing import NamedTuple, Protocol

import torch

from ..codecs import ChannelQuantizer, IdentityCodec, LayerCodec, ScalarScales

KNOWN = ("auto", "reference", "triton", "cuda")
CALLS: Counter[str] = Counter()  # "<backend>.<operation>" -> calls since the start of the process


class Encoded(NamedTuple):
    """Codes ``(batch, kv_heads, n, width)`` and squared errors |x - decoded|^2, float32 ``(batch, kv_heads, n)``.

    Keys are compared before RoPE. `scales` go with scalar codes: those of these tokens' groups.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_error: torch.Tensor
    value_error: torch.Tensor
    scales: ScalarScales | None = None


class Backend(Protocol):
    """What a layer asks of an implementation; `ReferenceBackend` says in PyTorch what each answer is."""

    name: str

    def attention(self, past, query, visibility, scale, softcap=None, sink_logit=None):
        """Output ``(batch, kv_heads, group, q_len, value_dim)`` and LSE: see `reference.attention.attention`."""
        ...

    def column_statistic(
        self, term, past, query, out, lse, visibility, scale, softcap, first_query, stride
    ) -> torch.Tensor:
        """What the tail's tokens received, ``(batch, kv_heads, tail)``: see `reference.scores.column_statistic`."""
        ...

    def query_moment(self, query, kv_heads, scale, first_query, kv_len) -> torch.Tensor:
        """``(batch, kv_heads, 2)``: see `reference.scores.query_moment`."""
        ...

    def encode(
        self, codec: LayerCodec, keys, values, start: int, offset: torch.Tensor, scales: ScalarScales | None = None,
        excluded: torch.Tensor | None = None,
    ) -> Encoded:  # fmt: skip
        """Codes of `keys` (after RoPE) and `values` ``(batch, kv_heads, n, dim)``, the tokens from index `start` on.

        `scales` and `excluded` are for scalar codes: see `ChannelQuantizer.encode`.
        """
        ...

    def append_token(self, keys, values, tail_keys, tail_values, lengths) -> None:
        """Writes ``(batch, kv_heads, 1, dim)`` into the tail's buffers at index ``lengths[1]``, and adds 1 to that."""
        ...

    def answers_step(self, query, kv_heads: int, term) -> bool:
        """Whether `attend_step` and `observe_step` take this query and this score's term; if not, `attention` and its
        kin do."""
        ...

    def attend_step(self, past, query, mask, scale, softcap=None, sink_logit=None, term=None):
        """`attention` of one token over ``past.static``, all lengths read on the device; without a mask, from `offset`
        on. Third of the answers: what `observe_step` may take for a score of this term instead of the tail, or None."""
        ...

    def observe_step(self, storage, past, query, out, lse, mask, scale, softcap, logits=None) -> None:
        """Adds what a step's query says to `query_moment` and statistic of a `StaticStorage`, in place.

        `logits`: the third of what `attend_step` answered.
        """
        ...


def select_backend(requested: str, device: torch.device) -> str:
    """Name of the backend to use on `device`; the environment variable ANTKV_BACKEND wins over `requested`.

    ``auto`` is ``cuda`` on an NVIDIA GPU (sm_80 or newer) where cuda-core is installed, else ``triton`` on a GPU where
    Triton is installed, else ``reference``. A layer whose codes have no CUDA kernel is ``triton`` (see `make_backend`).

    Raises:
        ValueError: for a name that does not exist, or a backend that cannot run there.
    """
    name = os.environ.get("ANTKV_BACKEND", requested)
    if name not in KNOWN:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(KNOWN)}")
    obstacle = _obstacle_to_triton(device)
    if name == "auto":
        if obstacle is not None or device.type != "cuda":
            return "reference"
        return "triton" if _obstacle_to_cuda(device) else "cuda"
    if name == "triton" and obstacle:
        raise ValueError(f"backend 'triton' is not available on {device}: {obstacle}; use 'reference' or 'auto'")
    if name == "cuda" and (obstacle := _obstacle_to_cuda(device)):
        raise ValueError(
            f"backend 'cuda' is not available on {device}: {obstacle}; use 'triton', 'reference' or 'auto'"
        )
    return name


def make_backend(requested: str, codec: LayerCodec, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a layer whose keys are in `dtype` on `device`.

    Raises:
        ValueError: as `select_backend`, or if ``triton`` or ``cuda`` was asked for by name and has no kernel for the
            codec.
    """
    from .reference_backend import REFERENCE

    name = select_backend(requested, device)
    if name == "reference" or isinstance(codec.key, IdentityCodec):
        return REFERENCE
    from .scalar_backend import ScalarTritonBackend
    from .triton_backend import TritonBackend, UnsupportedTables

    by_name = os.environ.get("ANTKV_BACKEND", requested) == name
    scalar = isinstance(codec.key, ChannelQuantizer)
    if name == "cuda" and scalar and by_name:
        raise UnsupportedTables("scalar codes have no kernel in CUDA C++; use 'triton' or 'auto'")
    if name == "cuda" and not scalar:
        from .cuda_backend import CudaBackend

        try:
            return CudaBackend(codec, dtype)
        except UnsupportedTables:  # a rate or head size of Triton's only
            if by_name:
                raise
    if name == "triton" and not by_name and not scalar:
        hint = _obstacle_to_cuda(device)
        if hint is not None and "cuda-core" in hint and _would_be_cuda(codec, dtype):
            warnings.warn(f"decoding with Triton's kernels, not the faster ones in CUDA C++: {hint}", stacklevel=2)
    try:
        return (ScalarTritonBackend if scalar else TritonBackend)(codec, dtype)
    except UnsupportedTables as reason:
        if by_name:
            raise
        warnings.warn(f"slow attention in PyTorch: {reason}", stacklevel=2)
        return REFERENCE


def _would_be_cuda(codec: LayerCodec, dtype: torch.dtype) -> bool:
    from .cuda_backend import CudaBackend, UnsupportedTables

    try:
        CudaBackend(codec, dtype)
    except UnsupportedTables:
        return False
    return True


def _obstacle_to_cuda(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton, whose kernels it shares, is not installed (pip install triton)"
    from antkv.cuda_decode import obstacle

    return obstacle(device)


def _obstacle_to_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton needs a GPU (or TRITON_INTERPRET=1, to test)"
