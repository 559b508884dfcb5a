"""Anchor scores against eager attention maps; budgets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import tiny_llama
from transformers import DynamicCache

from antkv_hf import AnTKVCache, AnTKVConfig
from antkv_hf.anchors import SCORES, TokenContext, anchors_per_chunk, get_score, select_anchors
from antkv_hf.config import AnchorConfig
from antkv_hf.reference.attention import Visibility
from antkv_hf.reference.scores import BLOCK, NEAR_BLOCKS, SIDE, column_statistic, squared_attention_term

PADDING = 13


def eager_maps(model, ids, mask):
    """Attention maps, and q, k, v, o of every layer, recorded from transformers' eager attention."""
    recorded = []

    def record(module, query, key, value, attention_mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).mT * scaling
        logits = logits.masked_fill(~attention_mask, float("-inf")) if attention_mask is not None else logits
        if attention_mask is None:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        probs = logits.softmax(-1).nan_to_num()
        out = probs @ value.repeat_interleave(group, 1)
        recorded.append((probs, query, key, value, out))
        return out.transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("recorded_eager", record)
    AttentionMaskInterface.register("recorded_eager", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("recorded_eager")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache(config=model.config))
    model.set_attn_implementation("sdpa")
    return recorded


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
@pytest.mark.parametrize("name", ("anchor_score", "accumulated_attention", "squared_attention"))
@pytest.mark.parametrize("steps", ((97,), (40, 1, 1, 30, 25)), ids=("prefill", "chunks"))
def test_statistic_equals_eager_attention_maps(lane, name, steps):
    """Left padding, GQA with a group of 3, one pass or chunks and decode steps; relative error 1e-4."""
    model = tiny_llama(num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    ids = torch.randint(3, 128, (2, 97), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    real = mask[:, None, :, None].float()
    config = AnTKVConfig.preset("identity", window=200, anchors=AnchorConfig(score=name, fraction=0.1))
    cache = AnTKVCache(model.config, config)
    model.set_attn_implementation(lane)
    start = 0
    for n in steps:
        stop = start + n
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        start = stop
    for layer, (probs, query, _, value, out) in zip(cache.layers, eager_maps(model, ids, mask)):
        probs = probs * real  # padded queries do not count
        if name == "squared_attention":
            term = probs.square()
        elif name == "accumulated_attention":
            term = probs
        else:
            distance = torch.cdist(out, value.repeat_interleave(3, 1))
            term = probs * distance * query.norm(dim=-1, keepdim=True)
        expected = term.sum(2).view(2, 2, 3, -1).sum(2)
        assert torch.all(expected[1, :, :PADDING] == 0)
        error = (layer.storage.statistic - expected).abs().max() / expected.abs().max()
        assert error < 1e-4


def test_error_aware_score_approximates_the_true_change_of_the_output():
    """Tokens it ranks highest carry most of the true first-order output change, and more than random ones."""
    g = torch.Generator().manual_seed(0)
    n, dim = 256, 32
    query, keys, values = (torch.randn(1, 1, n, dim, generator=g) for _ in range(3))
    keys = keys * (1 + 2 * torch.rand(1, 1, n, 1, generator=g))
    dk, dv = 0.3 * torch.randn(keys.shape, generator=g), 0.3 * torch.randn(values.shape, generator=g)
    dk, dv = (d * torch.rand(1, 1, n, 1, generator=g) * 2 for d in (dk, dv))
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    probs = (query @ keys.mT * dim**-0.5).masked_fill(~causal, float("-inf")).softmax(-1)
    out = probs @ values
    change = (query @ dk.mT * dim**-0.5).unsqueeze(-1) * (values.unsqueeze(2) - out.unsqueeze(3)) + dv.unsqueeze(2)
    true = (probs.square() * change.square().sum(-1)).sum(2)
    context = TokenContext(
        probs.square().sum(2), keys, values, dk.square().sum(-1), dv.square().sum(-1),
        (query.square().sum(-1).mean(-1) / dim**2).unsqueeze(-1), torch.arange(n).unsqueeze(0),
    )  # fmt: skip
    best = select_anchors(get_score("error_aware").score(context), 0.1, n)
    ideal = select_anchors(true, 0.1, n)
    assert true.gather(2, best).sum() > 0.8 * true.gather(2, ideal).sum()
    random = select_anchors(get_score("random").score(context), 0.1, n)
    assert true.gather(2, best).sum() > 2 * true.gather(2, random).sum()


def test_select_anchors_per_chunk():
    scores = torch.arange(24.0).view(1, 1, 24)
    assert select_anchors(scores, 0.25, 8)[0, 0].tolist() == [6, 7, 14, 15, 22, 23]
    with pytest.raises(ValueError, match="23 tokens are not a multiple of the chunk of 8"):
        select_anchors(scores[..., :23], 0.25, 8)
    assert [anchors_per_chunk(f, 128) for f in (0.001, 0.01, 0.02, 1.0)] == [1, 1, 3, 128]


def test_unknown_score_names_the_known_ones():
    with pytest.raises(ValueError, match="'h2o' is unknown; choose one of error_aware"):
        get_score("h2o")
    assert set(SCORES) >= {"error_aware", "anchor_score", "random", "none"}


@pytest.mark.parametrize("side", SIDE.values())
def test_query_stride_weighs_by_absolute_index_and_chunks_add_up(side, monkeypatch):
    """Against the dense map with explicit weights; one pass or chunks; with causality, a mask and left padding."""
    monkeypatch.setitem(SIDE, "cpu", side)
    g = torch.Generator().manual_seed(0)
    batch, heads, group, n, dim = 2, 2, 2, 900, 16
    query = torch.randn(batch, heads, group, n, dim, generator=g)
    keys, values = (torch.randn(batch, heads, n, dim, generator=g) for _ in range(2))
    first_query = torch.tensor([0, 131])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    hidden = ~(causal & (torch.arange(n) >= first_query.view(-1, 1, 1)))[:, None, None]
    logits = (query @ keys.unsqueeze(2).mT * dim**-0.5).masked_fill(hidden, float("-inf"))
    probs, lse = logits.softmax(-1).nan_to_num(), logits.logsumexp(-1)
    output = probs @ values.unsqueeze(2)
    index = torch.arange(n)
    near = index.unsqueeze(1) // BLOCK - index // BLOCK <= NEAR_BLOCKS
    mask = ~hidden[:, :, 0]
    for stride in (1, 5, 8, 200):
        far = stride * (index % stride == stride - 1).float().unsqueeze(1)
        weight = torch.where(near, 1.0, far)
        expected = (probs.square() * weight).sum((2, 3))
        for first_column in (0, 77):
            for visibility in (Visibility(None, True, n, n), Visibility(mask, False, n, n)):
                for cuts in ((0, n), (0, 200, 201, 611, n)):
                    total = torch.zeros(batch, heads, n - first_column)
                    for start, stop in pairwise(cuts):
                        rows, seen = slice(start, stop), stop - first_column
                        view = Visibility(visibility.mask, visibility.is_causal, n, n).rows(rows)
                        if view.mask is not None:
                            view = Visibility(view.mask[..., :stop], False, stop - start, stop)
                        total[:, :, :seen] += column_statistic(
                            squared_attention_term, query[:, :, :, rows], keys[:, :, first_column:stop],
                            values[:, :, first_column:stop], output[:, :, :, rows], lse[:, :, :, rows], view,
                            first_column, dim**-0.5, first_query=first_query, stride=stride,
                        )  # fmt: skip
                    # hidden keys of a sequence's padding are seen in the causal form only
                    compared = slice(131 - first_column, None) if visibility.mask is None else slice(None)
                    error = (total - expected[:, :, first_column:])[:, :, compared].abs().max()
                    assert error <= 1e-5 * expected.max()
    with pytest.raises(ValueError, match="stride=0 must be at least 1"):
        column_statistic(squared_attention_term, query, keys, values, output, lse, visibility, 0, 1.0, stride=0)
