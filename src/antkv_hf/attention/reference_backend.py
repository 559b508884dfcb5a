"""The reference backend: plain PyTorch on any device."""

from __future__ import annotations

import torch

from ..codecs import LayerCodec
from ..reference import scores
from ..reference.attention import attention, grouped
from .backends import CALLS, Encoded
from .exact import exact_attention


class ReferenceBackend:
    """Every operation as `antkv_hf.reference` spells it out."""

    name = "reference"

    def attention(self, past, query, visibility, scale, softcap=None, sink_logit=None):
        CALLS["reference.attention"] += 1
        if past.coded_length == 0 and softcap is None and sink_logit is None:
            answer = exact_attention(past, query, visibility, scale)
            if answer is not None:
                return answer
        return attention(past, query, visibility, scale, softcap, sink_logit)

    def column_statistic(self, term, past, query, out, lse, visibility, scale, softcap, first_query, stride):
        CALLS["reference.column_statistic"] += 1
        return scores.column_statistic(
            term, grouped(query, past.tail_keys.shape[1]), past.tail_keys, past.tail_values, out, lse, visibility,
            past.coded_length, scale, softcap, first_query, stride=stride,
        )  # fmt: skip

    def query_moment(self, query, kv_heads, scale, first_query, kv_len):
        return scores.query_moment(grouped(query, kv_heads), scale, first_query, kv_len)

    def encode(
        self, codec: LayerCodec, keys, values, start: int, offset: torch.Tensor, scales=None, excluded=None
    ) -> Encoded:
        CALLS["reference.encode"] += 1
        positions = start + torch.arange(keys.shape[2], device=keys.device) - offset.unsqueeze(1)
        plain = codec.plain_keys(keys, positions)
        key_codes, value_codes, scales = codec.encode(plain, values, scales, excluded)
        return Encoded(
            key_codes,
            value_codes,
            (codec.decode_plain(key_codes, scales) - plain).float().square().sum(-1),
            (codec.decode_values(value_codes, scales) - values).float().square().sum(-1),
            scales,
        )

    def append_token(self, keys, values, tail_keys, tail_values, lengths) -> None:
        index = lengths[1:2].long()
        tail_keys.index_copy_(2, index, keys)
        tail_values.index_copy_(2, index, values)
        lengths[1:2].add_(1)

    def answers_step(self, query, kv_heads: int, term) -> bool:
        return False  # its loops over blocks need the lengths on the host

    def attend_step(self, past, query, mask, scale, softcap=None, sink_logit=None, term=None):
        raise NotImplementedError("the reference answers steps through `attention`")

    def observe_step(self, storage, past, query, out, lse, mask, scale, softcap, logits=None) -> None:
        raise NotImplementedError("the reference observes steps through `column_statistic` and `query_moment`")


REFERENCE = ReferenceBackend()
