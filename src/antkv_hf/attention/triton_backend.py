"""The Triton backend: one layer's snapshots in the form that the kernels of `antkv` read."""

from __future__ import annotations

import torch
from antkv.anchor_score import column_statistic, query_moment
from antkv.decode_attention import decode_attention
from antkv.decode_plan import MIN_ROWS
from antkv.encode import encode_keys, encode_values
from antkv.past import ExactTokens, QuantizedPast
from antkv.prefill import BIAS_ROWS, CodeBias, prefill_attention
from antkv.static_step import add_column_statistic, add_query_moment, add_tail_statistic, append_token

from ..codecs import LayerCodec
from ..reference import scores
from ..reference.attention import grouped
from ..snapshot import Snapshot
from .backends import CALLS, Encoded
from .reference_backend import REFERENCE
from .tables import UnsupportedTables, layer_tables

__all__ = ["TritonBackend", "UnsupportedTables"]

MAX_DECODE_QUERIES = 8
TERMS = {
    scores.squared_attention_term: "squared_attention",
    scores.accumulated_attention_term: "accumulated_attention",
    scores.anchor_score_term: "anchor_score",
}


class TritonBackend:
    """Kernels for one layer's tables; every operation is that of `ReferenceBackend` within rounding.

    Raises:
        UnsupportedTables: if the codec has no kernel.
    """

    name = "triton"

    def __init__(self, codec: LayerCodec, dtype: torch.dtype):
        self.key_tables, self.value_tables = layer_tables(codec, dtype)

    def attention(self, past: Snapshot, query, visibility, scale, softcap=None, sink_logit=None):
        options = dict(
            scale=scale, mask=visibility.mask, is_causal=visibility.is_causal, softcap=softcap, sink_logit=sink_logit
        )
        kv_heads = past.tail_keys.shape[1]
        query = query.to(past.tail_keys.dtype)  # autocast may mix them
        quantized = self._quantized_past(past)
        with torch.cuda.device_of(query):  # Triton launches on the current GPU, and a model may be spread over several
            if quantized is not None and decodes(query, kv_heads):
                tail = past.tail_keys.contiguous(), past.tail_values.contiguous()  # of static storage, they are views
                out, lse = self.decode_attention(query, quantized, *tail, **options)
            else:
                CALLS["triton.prefill_attention"] += 1
                bias = bias_and_exact(past, query, scale)
                out, lse = prefill_attention(
                    query, quantized, past.tail_keys, past.tail_values, code_bias=bias, **options
                )
        return out.unflatten(1, (kv_heads, -1)), lse.unflatten(1, (kv_heads, -1))

    def decode_attention(self, query, past: QuantizedPast, tail_keys, tail_values, **options):
        CALLS["triton.decode_attention"] += 1
        return decode_attention(query, past, tail_keys, tail_values, **options)

    def column_statistic(self, term, past: Snapshot, query, out, lse, visibility, scale, softcap, first_query, stride):
        if term not in TERMS:  # a score of the user's own, in PyTorch
            return REFERENCE.column_statistic(
                term, past, query, out, lse, visibility, scale, softcap, first_query, stride
            )
        CALLS["triton.column_statistic"] += 1
        keys, values = past.tail_keys, past.tail_values
        with torch.cuda.device_of(query):
            return column_statistic(
                TERMS[term], query.to(keys.dtype), keys, values, out.flatten(1, 2), lse.flatten(1, 2), scale=scale,
                first_column=past.coded_length, kv_len=past.length, stride=stride, mask=visibility.mask,
                is_causal=visibility.is_causal, softcap=softcap, first_query=first_query,
            )  # fmt: skip

    def query_moment(self, query, kv_heads, scale, first_query, kv_len):
        with torch.cuda.device_of(query):
            return query_moment(query, scale, kv_heads, first_query, kv_len)

    def encode(
        self, codec: LayerCodec, keys, values, start: int, offset: torch.Tensor, scales=None, excluded=None
    ) -> Encoded:
        CALLS["triton.encode"] += 1
        with torch.cuda.device_of(keys):
            key_codes, key_error = encode_keys(keys, self.key_tables, start, offset)
            value_codes, value_error = encode_values(values, self.value_tables)
        return Encoded(key_codes, value_codes, key_error, value_error)

    def append_token(self, keys, values, tail_keys, tail_values, lengths) -> None:
        with torch.cuda.device_of(keys):
            append_token(keys, values, tail_keys, tail_values, lengths)

    def answers_step(self, query, kv_heads: int, term) -> bool:
        return query.shape[2] == 1 and decodes(query, kv_heads) and (term is None or term in TERMS)

    def step_attention(self, query, past: QuantizedPast, tail_keys, tail_values, *, term, **options):
        """`decode_attention` of a step, and the tail's logits where it keeps them for scores of this term."""
        return *self.decode_attention(query, past, tail_keys, tail_values, **options), None

    def attend_step(self, past: Snapshot, query, mask, scale, softcap=None, sink_logit=None, term=None):
        static, kv_heads = past.static, past.tail_keys.shape[1]
        assert static is not None
        planned = past.coded_length if static.planned is None else static.planned
        quantized = self._static_past(past)._replace(coded=planned, lengths=static.lengths)
        with torch.cuda.device_of(query):
            out, lse, logits = self.step_attention(
                query.to(static.tail_keys.dtype), quantized, static.tail_keys, static.tail_values, term=TERMS.get(term),
                scale=scale, mask=mask, is_causal=False, softcap=softcap, sink_logit=sink_logit,
            )  # fmt: skip
        return out.unflatten(1, (kv_heads, -1)), lse.unflatten(1, (kv_heads, -1)), logits

    def observe_step(self, storage, past: Snapshot, query, out, lse, mask, scale, softcap, logits=None) -> None:
        static, term = past.static, storage.score.term
        assert static is not None
        query = query.to(static.tail_keys.dtype)
        with torch.cuda.device_of(query):
            if term is None:
                add_query_moment(query, scale, storage.query_moment)
                return
            stride = storage.config.anchors.query_stride
            if logits is not None:
                CALLS["triton.tail_statistic"] += 1
                add_tail_statistic(
                    TERMS[term], logits, query, lse.flatten(1, 2), static.statistic, storage.query_moment,
                    static.lengths, scale=scale, stride=stride,
                )  # fmt: skip
                return
            CALLS["triton.column_statistic"] += 1
            add_column_statistic(
                TERMS[term], query, static.tail_keys, static.tail_values, out.flatten(1, 2), lse.flatten(1, 2),
                static.statistic, static.lengths, past.offset, scale=scale, mask=mask, softcap=softcap, stride=stride,
                moment=storage.query_moment,
            )  # fmt: skip

    def _static_past(self, past: Snapshot) -> QuantizedPast:
        static = past.static
        assert static is not None
        exact = tuple(ExactTokens(*t.tensors()) for t in (static.sinks, static.anchors) if t is not None)
        return QuantizedPast(
            static.key_codes, static.value_codes, self.key_tables, self.value_tables, exact, static.exact_bits,
            past.offset, past.coded_length,
        )  # fmt: skip

    def _quantized_past(self, past: Snapshot) -> QuantizedPast | None:
        if past.key_codes is None or past.value_codes is None:
            return None
        if past.static is not None:
            return self._static_past(past)
        if past.exact_bits is None:
            raise ValueError(
                f"a snapshot of {past.coded_length} coded tokens has no exact_bits: LayerStorage makes them"
            )
        exact = tuple(ExactTokens(*tokens.tensors()) for tokens in past.exact_tokens)
        return QuantizedPast(
            past.key_codes, past.value_codes, self.key_tables, self.value_tables, exact, past.exact_bits, past.offset
        )


def bias_and_exact(past: Snapshot, query: torch.Tensor, scale: float) -> CodeBias | None:
    """The bias of the past's coded tokens, with the exact ones, which it does not concern; None: there is none."""
    heads = past.tail_keys.shape[1]
    if not past.coded_length:
        return None
    rows = query.split(BIAS_ROWS, 2)  # float32 copies of a long chunk are large
    parts = [bias for x in rows if (bias := past.codec.code_bias(grouped(x, heads), scale)) is not None]
    if not parts:
        return None
    read = [tokens.read(past.codec, past.offset, past.key_center) for tokens in past.exact_tokens]
    empty = past.tail_keys[:, :, :0], past.tail_values[:, :, :0]
    keys, values = (torch.cat([x.to(query.dtype) for x in kept], 2) for kept in zip(*read, empty))
    none = torch.empty(*keys.shape[:2], 0, dtype=torch.int32, device=keys.device)
    positions = torch.cat([*(tokens.positions for tokens in past.exact_tokens), none], 2)
    return CodeBias(torch.cat(parts, 3).flatten(1, 2), keys, values, positions)


def decodes(query: torch.Tensor, kv_heads: int) -> bool:
    """Whether decode attention answers these queries; the prefill path, which can do anything, answers the rest.

    Up to 32 rows a kv head, and 8 in float32 or at head sizes above 128: tests run no more than these on a GPU.
    """
    rows = query.shape[1] // kv_heads * query.shape[2]
    if query.dtype == torch.float32:
        return rows <= MIN_ROWS and query.shape[3] <= 128
    return query.shape[2] <= MAX_DECODE_QUERIES and rows <= (4 * MIN_ROWS if query.shape[3] <= 128 else MIN_ROWS)
