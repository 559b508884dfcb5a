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
MIN_TOKENS = 2048  # of all sequences together, for shorter ones Triton's kernel; a captured step is planned for more


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

    def decode_attention(self, query, past, tail_keys, tail_values, **options):
        out, lse, _ = self.step_attention(query, past, tail_keys, tail_values, term=None, **options)
        return out, lse

    def step_attention(self, query, past, tail_keys, tail_values, *, term, mask=None, **options):
        shape = None
        if mask is None and past.length * query.shape[0] >= MIN_TOKENS:
            shape = cuda_decode.kernel_for(query, past, options.get("softcap") is not None)
        if shape is None:
            out, lse = super().decode_attention(query, past, tail_keys, tail_values, mask=mask, **options)
            return out, lse, None
        CALLS["cuda.decode_attention"] += 1
        logits = None
        if term in LOGITS_TERMS:
            logits = query.new_empty(*tail_keys.shape[:3], shape.rows, dtype=torch.float32)
        options |= dict(shape=shape, tail_logits=logits)
        return *cuda_decode.decode_attention(query, past, tail_keys, tail_values, **options), logits
