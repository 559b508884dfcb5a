"""The merge of a split attention's parts: both kernels, few rows and many, against the same in PyTorch."""

from __future__ import annotations

import pytest
import torch
from antkv import merge_splits as module
from antkv.merge_splits import LARGEST_BIAS, merge_splits
from builders import assert_near, random_codec

from antkv_hf.attention.tables import layer_tables
from antkv_hf.reference.attention import grouped

# batch, query heads a kv head, q_len, head size, spec, splits, sink logits, noise: rows that fill no tile
CASES = [
    (5, 4, 1, 128, "d8b8", 1, False, 1.0),
    (3, 4, 1, 64, "d16b8", 3, True, 1.0),
    (9, 1, 2, 96, "d8b8", 2, True, 30.0),  # some bias is cut
    (3, 3, 3, 80, "d8b8", 2, False, None),
    (17, 2, 1, 64, "d32b8", 1, False, 1.0),
    (2, 2, 1, 128, "d32b8", 2, False, 1.0),
    (1, 6, 2, 256, "d16b8", 5, True, 1.0),
]


def reference(partial, state, tables, sink_logit, query, codec, scale):
    """Softmax over all parts: those of codes come first, get the bias, and go through the values' basis."""
    batch, heads, parts, rows, dim = partial.shape
    top, total = state.double() * torch.tensor([0.6931471805599453, 1.0], device=state.device).view(2, 1, 1, 1, 1)
    weight, splits = top.exp(), parts // 2  # (batch, heads, parts, rows)
    bias = codec.code_bias(grouped(query, heads), scale)
    if bias is not None:
        weight[:, :, :splits] *= bias.double().reshape(batch, heads, 1, rows).exp()
    sums, totals = partial.double() * weight[..., None], total * weight
    code_total = totals[:, :, :splits].sum(2)[..., None]
    latent = sums[:, :, :splits].sum(2)
    out = sums[:, :, splits:].sum(2) + latent @ tables.synthesis.double() + code_total * tables.mean.double()[:, None]
    whole = totals.sum(2)
    if sink_logit is not None:
        whole = whole + sink_logit.double().exp().view(heads, -1).repeat_interleave(query.shape[2], 1)
    out = out / whole.where(whole > 0, 1.0)[..., None]
    return out.view(batch, -1, query.shape[2], dim), whole.log().view(batch, -1, query.shape[2])


def check(case, tiles: bool, monkeypatch, device: str = "cpu") -> None:
    batch, group, q_len, dim, spec, splits, sink, noise = case
    heads, rows = 2, group * q_len
    monkeypatch.setattr(module, "TILES_FROM", 1 if tiles else 10**9)
    monkeypatch.setattr(module, "TILE_SPLITS", 128)
    codec = random_codec(spec, spec, heads, dim, device=device, noise=noise is not None)
    if noise is not None:
        codec.key.noise *= noise
    keys, values = layer_tables(codec, torch.float32)
    g = torch.Generator().manual_seed(dim + splits)
    partial = torch.randn(batch, heads, 2 * splits, rows, dim, generator=g)
    state = torch.rand(2, batch, heads, 2 * splits, rows, generator=g) * 3
    empty = [(0, slice(None)), (1, slice(splits)), (2, slice(splits, None))]  # nothing, no codes, codes alone
    for b, parts in empty[:batch]:
        partial[b, :, parts, 0], state[0, b, :, parts, 0], state[1, b, :, parts, 0] = 0, float("-inf"), 0
    partial, state = partial.to(device), state.to(device)
    query = torch.randn(batch, q_len, heads * group, dim, generator=g).to(device).transpose(1, 2)
    sink_logit = torch.randn(heads * group, generator=g).to(device) if sink else None
    expected, expected_lse = reference(partial, state, values, sink_logit, query, codec, dim**-0.5)
    out, lse = (torch.full(shape, float("nan"), device=device) for shape in (query.shape, query.shape[:3]))
    merge_splits(partial, state, values, sink_logit, out, lse, query, keys, dim**-0.5)
    assert_near(out, expected, 1e-5)
    assert_near(lse, expected_lse, 1e-5)
    if noise is not None and noise > 1:
        assert codec.code_bias(grouped(query, heads), dim**-0.5).max() == LARGEST_BIAS.value


@pytest.mark.parametrize("tiles", [False, True], ids=("rows", "tiles"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:6])))
def test_merge_splits(case, tiles, monkeypatch):
    check(case, tiles, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [False, True], ids=("rows", "tiles"))
@pytest.mark.parametrize("case", [*CASES, (150, 4, 1, 128, "d8b8", 1, False, 1.0)], ids=lambda c: "-".join(map(str, c)))
def test_merge_splits_on_a_gpu(case, tiles, monkeypatch):
    check(case, tiles, monkeypatch, "cuda")
