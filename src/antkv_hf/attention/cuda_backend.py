"""The CUDA backend: Triton's kernels, but decode attention in CUDA C++ wherever that has a kernel."""

from __future__ import annotations

import torch
from antkv import cuda_decode, cuda_shape
from antkv.static_step import LOGITS_TERMS

from ..codecs import LayerCodec
from .backends import CALLS
from .tables import UnsupportedTables
from .triton_backend import TritonBackend

WAY_OUT = "use backend='triton' or 'auto'"
MIN_TOKENS = 2048  # of all sequences together: below, a captured step is not faster than with Triton's kernel


class CudaBackend(TritonBackend):
    """`TritonBackend` with a faster decode attention for 16-bit models on NVIDIA GPUs.

    Padding masks, few tokens, more than 8 query rows a kv head and GPUs with too little shared memory get Triton's
    kernel; so does everything, after one warning, if a kernel cannot be compiled.

    Raises:
        UnsupportedTables: if the codec has no CUDA kernel, or none for this GPU.
    """

    name = "cuda"

    def __init__(self, codec: LayerCodec, dtype: torch.dtype):
        super().__init__(codec, dtype)
        if dtype not in cuda_decode.SIXTEEN_BITS:
            raise UnsupportedTables(f"a {dtype} model has no CUDA kernel: float16 and bfloat16 ones have; {WAY_OUT}")
        memory, most = cuda_decode.shared_memory(self.key_tables.mean.device), cuda_shape.MAX_ROWS
        try:  # as many rows as take the most memory, so that no step is refused later
            cuda_shape.find_shape(self.key_tables, self.value_tables, most, softcap=False, shared_memory=memory)
        except ValueError as error:
            raise UnsupportedTables(f"{error}; {WAY_OUT}") from error

    def decode_attention(self, query, past, tail_keys, tail_values, *, mask=None, **options):
        shape = _kernel_for(query, past, mask, options.get("softcap"))
        if shape is None:
            return super().decode_attention(query, past, tail_keys, tail_values, mask=mask, **options)
        CALLS["cuda.decode_attention"] += 1
        return cuda_decode.decode_attention(query, past, tail_keys, tail_values, shape=shape, **options)

    def step_attention(self, query, past, tail_keys, tail_values, *, term, mask=None, **options):
        shape = _kernel_for(query, past, mask, options.get("softcap"))
        if shape is None or term not in LOGITS_TERMS:
            return super().step_attention(query, past, tail_keys, tail_values, term=term, mask=mask, **options)
        CALLS["cuda.decode_attention"] += 1
        logits = query.new_empty(*tail_keys.shape[:3], shape.rows, dtype=torch.float32)
        options |= dict(shape=shape, tail_logits=logits)
        return *cuda_decode.decode_attention(query, past, tail_keys, tail_values, **options), logits


def _kernel_for(query, past, mask, softcap: float | None) -> cuda_shape.Shape | None:
    """The kernel in CUDA C++ that answers; None where Triton's does."""
    if mask is not None or past.length * query.shape[0] < MIN_TOKENS:
        return None
    return cuda_decode.kernel_for(query, past, softcap is not None)
