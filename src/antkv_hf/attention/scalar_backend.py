"""The Triton backend of scalar codes: a kernel for decode steps; prompts over a past that PyTorch decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from antkv.past import ExactTokens
from antkv.prefill import prefill_attention
from antkv.scalar_decode import ScalarPast, scalar_decode_attention

from ..codecs import ChannelQuantizer, LayerCodec, TokenQuantizer
from ..snapshot import Snapshot
from .backends import CALLS, Encoded
from .reference_backend import REFERENCE
from .tables import HEAD_DIMS, UnsupportedTables, channel_pairs
from .triton_backend import TritonBackend, decodes


class ScalarTritonBackend(TritonBackend):
    """As `TritonBackend`, for scalar codes; those are made in PyTorch.

    Raises:
        UnsupportedTables: if the head size or dtype has no kernel.
    """

    def __init__(self, codec: LayerCodec, dtype: torch.dtype):
        key, value = codec.key, codec.value
        assert isinstance(key, ChannelQuantizer) and isinstance(value, TokenQuantizer)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UnsupportedTables(f"the kernels take float16, bfloat16 and float32 keys, not {dtype}")
        for dim in (key.head_dim, value.head_dim):
            if dim % 8 or dim > HEAD_DIMS:
                raise UnsupportedTables(f"head size {dim} has no kernel; multiples of 8 up to {HEAD_DIMS} have")

    def attention(self, past: Snapshot, query, visibility, scale, softcap=None, sink_logit=None):
        kv_heads = past.tail_keys.shape[1]
        query = query.to(past.tail_keys.dtype)  # autocast may mix them
        options = dict(
            scale=scale, mask=visibility.mask, is_causal=visibility.is_causal, softcap=softcap, sink_logit=sink_logit
        )
        with torch.cuda.device_of(query):
            if past.coded_length and decodes(query, kv_heads):
                CALLS["triton.scalar_decode_attention"] += 1
                out, lse = scalar_decode_attention(
                    query, scalar_past(past), past.tail_keys, past.tail_values, **options
                )
            else:
                CALLS["triton.prefill_attention"] += 1
                dense = CodedTokens(past) if past.coded_length else None
                out, lse = prefill_attention(query, dense, past.tail_keys, past.tail_values, **options)
        return out.unflatten(1, (kv_heads, -1)), lse.unflatten(1, (kv_heads, -1))

    def encode(
        self, codec: LayerCodec, keys, values, start: int, offset: torch.Tensor, scales=None, excluded=None
    ) -> Encoded:
        return REFERENCE.encode(codec, keys, values, start, offset, scales, excluded)


@dataclass(frozen=True)
class CodedTokens:
    """The coded tokens of a snapshot as `prefill_attention` reads them: decoded in PyTorch, a segment at a time."""

    snapshot: Snapshot

    @property
    def length(self) -> int:
        return self.snapshot.coded_length

    def dense(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.snapshot.dense_coded(start, stop)


def scalar_past(past: Snapshot) -> ScalarPast:
    """The coded tokens of a snapshot as the kernel reads them."""
    codec, scales = past.codec, past.scales
    key, value = codec.key, codec.value
    assert isinstance(key, ChannelQuantizer) and isinstance(value, TokenQuantizer) and scales is not None
    assert past.key_codes is not None and past.value_codes is not None and past.exact_bits is not None
    dtype = torch.float32 if past.tail_keys.dtype == torch.float32 else torch.float16
    if dtype not in codec.kernel_tables:
        codec.kernel_tables[dtype] = (channel_pairs(codec, key.head_dim, past.offset.device, dtype),)
    return ScalarPast(
        past.key_codes, past.value_codes, scales.starts, scales.scale, scales.zero, scales.key_mean, scales.value_mean,
        scales.value_std, codec.kernel_tables[dtype][0], key.spec.bits, value.spec.bits, key.spec.group,
        value.spec.group, tuple(ExactTokens(*tokens.tensors()) for tokens in past.exact_tokens), past.exact_bits,
        past.offset,
    )  # fmt: skip
