"""Column statistics and query moments against `antkv_hf.reference.scores` in float32."""

from __future__ import annotations

import pytest
import torch
from antkv.anchor_score import column_statistic, query_moment

from antkv_hf.reference.attention import Visibility, grouped
from antkv_hf.reference.scores import (
    accumulated_attention_term,
    anchor_score_term,
    squared_attention_term,
)
from antkv_hf.reference.scores import column_statistic as reference_statistic

TERMS = {
    "squared_attention": squared_attention_term,
    "accumulated_attention": accumulated_attention_term,
    "anchor_score": anchor_score_term,
}
# relative to the largest sum; 16-bit inputs are exact in both, but not the output that a distance is taken to
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GPU = pytest.mark.gpu


def sample(batch, kv_heads, group, q_len, past, n, dim, value_dim, dtype, device, softcap=None, hidden=None):
    """Random attention over ``past + q_len`` keys: its inputs, output and log-sum-exp, and the last `n` keys."""
    g = torch.Generator(device).manual_seed(q_len + n + dim)
    make = lambda *size: torch.randn(size, generator=g, device=device).to(dtype)
    kv_len = past + q_len
    query = make(batch, q_len, kv_heads * group, dim).transpose(1, 2)  # as models hand it over
    keys, values = make(batch, kv_heads, kv_len, dim), make(batch, kv_heads, kv_len, value_dim)
    logits = grouped(query, kv_heads) @ keys.float().unsqueeze(2).mT * dim**-0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if hidden is None:
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).triu(1 + past)
        hidden = hidden[None, None]
    hidden = hidden.expand(batch, kv_heads * group if hidden.shape[1] > 1 else 1, -1, -1)
    hidden = hidden.unflatten(1, (kv_heads, group)) if hidden.shape[1] > 1 else hidden.unsqueeze(2)
    logits = logits.masked_fill(hidden, float("-inf"))
    output = (logits.softmax(-1).nan_to_num() @ values.float().unsqueeze(2)).flatten(1, 2).to(dtype)
    lse = logits.logsumexp(-1).flatten(1, 2)
    return query, keys[:, :, kv_len - n :], values[:, :, kv_len - n :], output, lse


def check(
    term, dtype, device="cpu", batch=2, kv_heads=2, group=2, q_len=129, past=0, n=None, dim=32, value_dim=None,
    stride=1, mask=None, is_causal=True, softcap=None, first_query=None, hidden=None, splits=None, add=False,
):  # fmt: skip
    """One call against the reference."""
    n = past + q_len if n is None else n
    kv_len = past + q_len
    if not is_causal and hidden is None:
        hidden = torch.zeros(1, 1, q_len, kv_len, dtype=torch.bool, device=device)
    query, keys, values, output, lse = sample(
        batch, kv_heads, group, q_len, past, n, dim, value_dim or dim, dtype, device, softcap, hidden
    )
    statistic = torch.rand(batch, kv_heads, n, device=device) if add else None
    out = torch.full((batch, kv_heads, n), float("nan"), device=device)
    result = column_statistic(
        term, query, keys, values, output if term == "anchor_score" else None, lse, scale=dim**-0.5,
        first_column=kv_len - n, kv_len=kv_len, stride=stride, mask=mask, is_causal=is_causal, softcap=softcap,
        first_query=first_query, statistic=statistic, out=out, splits=splits,
    )  # fmt: skip
    assert result.data_ptr() == out.data_ptr()
    expected = reference_statistic(
        TERMS[term], grouped(query, kv_heads), keys, values, grouped(output, kv_heads),
        lse.unflatten(1, (kv_heads, group)), Visibility(mask, is_causal, q_len, kv_len), kv_len - n, dim**-0.5,
        softcap, first_query, stride=stride,
    )  # fmt: skip
    if add:
        expected = expected + statistic
    error = (out - expected).abs().max() / expected.abs().max()
    tolerance = TOLERANCE[dtype]
    if term == "anchor_score":  # a query that sees one key has o = v: both compute the distance 0 as a square root of
        tolerance = max(tolerance, 1e-3)  # rounding errors
    assert error <= tolerance, f"relative error {error:.2e}"  # a NaN left over fails too


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(q_len=1, past=6, n=7),
        dict(q_len=7, past=0),
        dict(q_len=129, past=0),
        dict(q_len=3, past=700, n=65, group=3, batch=1),
        dict(q_len=140, past=33, n=160, dim=80, value_dim=64, batch=1),
    ],
    ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_equals_reference(term, sizes, dtype):
    check(term, dtype, **sizes)


@pytest.mark.parametrize("dim, value_dim", ((64, 64), (96, 128), (128, 96), (256, 16)))
def test_head_sizes(dim, value_dim):
    check("anchor_score", torch.float32, q_len=33, past=5, dim=dim, value_dim=value_dim, batch=1, kv_heads=1)


@pytest.mark.parametrize("stride", (3, 8, 300))
@pytest.mark.parametrize("q_len, past, n", ((1000, 0, 1000), (500, 411, 800), (4, 891, 850)))
def test_query_stride(stride, q_len, past, n):
    """Blocks of keys that start anywhere, and a chunk of queries in the middle of a prompt."""
    check("squared_attention", torch.float16, q_len=q_len, past=past, n=n, stride=stride, batch=1, kv_heads=1, dim=16)


def test_query_stride_in_chunks_equals_one_pass():
    query, keys, values, _, lse = sample(1, 1, 2, 700, 0, 700, 16, 16, torch.float16, "cpu")
    call = lambda start, stop, **kw: column_statistic(
        "accumulated_attention", query[:, :, start:stop], keys[:, :, :stop], values[:, :, :stop], None,
        lse[:, :, start:stop], scale=0.25, first_column=0, kv_len=stop, stride=8, **kw,
    )  # fmt: skip
    total = torch.zeros(1, 1, 0)
    for start, stop in ((0, 350), (350, 351), (351, 700)):
        total = torch.nn.functional.pad(total, (0, stop - start))
        total = call(start, stop, statistic=total, out=total)  # in place
    torch.testing.assert_close(total, call(0, 700), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", (2, 5))
@pytest.mark.parametrize("add", (False, True), ids=("alone", "added"))
def test_splits_of_the_queries(splits, add):
    check("squared_attention", torch.float16, q_len=400, past=100, n=450, stride=4, splits=splits, add=add, batch=1)


@pytest.mark.parametrize("kind", ("bool", "additive"))
@pytest.mark.parametrize("shape", ("row", "heads", "full"))
@pytest.mark.parametrize("stride", (1, 4))
def test_masks(kind, shape, stride):
    """Broadcast dimensions, rows that see nothing, left padding."""
    batch, heads, q_len, kv_len = 2, 4, 50, 460
    g = torch.Generator().manual_seed(0)
    size = dict(row=(batch, 1, 1, kv_len), heads=(1, heads, q_len, kv_len), full=(batch, heads, q_len, kv_len))[shape]
    hidden = torch.rand(size, generator=g) < 0.3
    if shape != "row":
        hidden[:, :, 5] = True
        hidden |= torch.ones(q_len, kv_len, dtype=torch.bool).triu(1 + kv_len - q_len)
    full = hidden.expand(batch, -1, q_len, -1)
    mask = ~hidden if kind == "bool" else torch.zeros(size).masked_fill(hidden, float("-inf"))
    check(
        "accumulated_attention", torch.float16, q_len=q_len, past=kv_len - q_len, n=455, mask=mask, stride=stride,
        hidden=full, first_query=torch.tensor([0, kv_len - q_len + 17]), add=True, dim=16,
    )  # fmt: skip


def test_finite_additive_mask():
    """A bias such as ALiBi's moves the logits after the softcap."""
    mask = torch.randn(1, 1, 20, 50, generator=torch.Generator().manual_seed(0))
    check("squared_attention", torch.float32, q_len=20, past=30, mask=mask, is_causal=False, softcap=2.0)


@pytest.mark.parametrize("term", TERMS)
def test_softcap_first_query_and_sum(term):
    check(term, torch.float32, q_len=50, past=9, softcap=1.5, first_query=torch.tensor([0, 20]), add=True)


def test_without_causality():
    check("squared_attention", torch.float32, q_len=300, past=200, n=450, is_causal=False, stride=8, batch=1)


@pytest.mark.parametrize("q_len, dim", ((1, 16), (7, 80), (129, 64), (700, 128)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_query_moment(q_len, dim, dtype):
    check_moment(2, 1, 3, q_len, dim, dtype, "cpu")


def check_moment(batch, kv_heads, group, q_len, dim, dtype, device):
    g = torch.Generator(device).manual_seed(q_len)
    query = torch.randn(batch, q_len, kv_heads * group, dim, generator=g, device=device).to(dtype).transpose(1, 2)
    moment = torch.rand(batch, kv_heads, 2, generator=g, device=device)
    square = grouped(query, kv_heads).square().sum(-1) * (0.3**2 / dim)
    for first in (None, torch.arange(batch, device=device) * 600 + 3):
        counted = torch.ones(batch, q_len, device=device)
        if first is not None:
            counted = (torch.arange(10, 10 + q_len, device=device) >= first.unsqueeze(1)).float()
        expected = torch.stack(
            [(square * counted[:, None, None]).sum((2, 3)), counted.sum(1, keepdim=True).expand(-1, kv_heads) * group],
            -1,
        )
        for start in (None, moment):
            result = query_moment(query, 0.3, kv_heads, first, 10 + q_len, start)
            wanted = expected if start is None else expected + start
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_no_keys():
    query = torch.randn(1, 2, 3, 16)
    empty = torch.empty(1, 1, 0, 16)
    lse = torch.zeros(1, 2, 3)
    out = column_statistic("squared_attention", query, empty, empty, None, lse, scale=1.0, first_column=9, kv_len=9)
    assert out.shape == (1, 1, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(term="h2o"), "'h2o' is unknown; choose one of squared_attention"),
        (dict(keys=torch.randn(1, 2, 8, 32)), "does not fit keys"),
        (dict(keys=torch.randn(1, 2, 8, 16).half()), "keys are torch.float16, but the query is torch.float32"),
        (dict(keys=torch.randn(1, 2, 16, 8).mT), "last stride of keys is 8; it must be 1"),
        (dict(values=torch.randn(1, 2, 7, 16)), "do not fit keys"),
        (dict(values=torch.randn(1, 2, 8, 512)), "value size 512 has no kernel; up to 256"),
        (dict(query=torch.randn(1, 4, 3, 16).double()), "query is torch.float64"),
        (dict(query=torch.randn(1, 3, 3, 16)), "3 query heads are not a multiple of 2 kv heads"),
        (dict(query=torch.randn(1, 4, 16, 3).mT), "last stride of query is 3; it must be 1"),
        (dict(lse=torch.zeros(1, 4, 3).half()), "lse is torch.float16"),
        (dict(lse=torch.zeros(1, 4, 2)), r"lse of shape \(1, 4, 2\)"),
        (dict(kv_len=9), "kv_len=9 is not first_column"),
        (dict(stride=0), "stride=0 must be at least 1"),
        (dict(softcap=0.0), "softcap=0.0 must be positive"),
        (dict(output=None), "needs the attention's output"),
        (dict(output=torch.randn(1, 4, 3, 8)), "output"),
        (dict(mask=torch.ones(1, 1, 3, 8, dtype=torch.bool)), r"mask of shape \(1, 1, 3, 8\) does not fit"),
        (dict(mask=torch.ones(1, 1, 3, 10, dtype=torch.int64)), "mask is torch.int64"),
        (dict(first_query=torch.zeros(1)), "first_query is torch.float32"),
        (dict(statistic=torch.zeros(1, 2, 7)), r"statistic has shape \(1, 2, 7\)"),
        (dict(out=torch.zeros(1, 8, 2).mT), "out must be contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change, message):
    call = dict(
        term="anchor_score", query=torch.randn(1, 4, 3, 16), keys=torch.randn(1, 2, 8, 16),
        values=torch.randn(1, 2, 8, 16), output=torch.randn(1, 4, 3, 16), lse=torch.zeros(1, 4, 3), scale=1.0,
        first_column=2, kv_len=10,
    )  # fmt: skip
    call.update(change)
    with pytest.raises(ValueError, match=message):
        column_statistic(**call)


def test_head_size_beyond_the_kernel():
    with pytest.raises(ValueError, match="head size 512 has no kernel; up to 256 have"):
        query_moment(torch.randn(1, 2, 3, 512), 1.0, 1, None, 3)


@GPU
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("dim", (64, 80, 128, 256))
@pytest.mark.parametrize("q_len, past, stride", ((4096, 0, 1), (2048, 3000, 8), (1, 511, 1), (5, 300, 8)))
def test_on_gpu(term, dtype, dim, q_len, past, stride):
    check(term, dtype, "cuda", q_len=q_len, past=past, stride=stride, dim=dim, group=4, batch=1, add=True)


@GPU
@pytest.mark.parametrize("splits", (None, 1, 8))
def test_same_sums_twice_on_gpu(splits):
    """Few heads: the queries are split over programs, and the result is still the same bit for bit."""
    inputs = sample(1, 1, 4, 4096, 0, 4096, 128, 128, torch.bfloat16, "cuda")
    call = lambda: column_statistic(
        "anchor_score", *inputs, scale=128**-0.5, first_column=0, kv_len=4096, stride=8, splits=splits
    )
    assert torch.equal(call(), call())


@GPU
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", ("bool", "additive"))
def test_masks_on_gpu(dtype, kind):
    batch, q_len, kv_len = 2, 1000, 1300
    hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device="cuda").triu(1 + kv_len - q_len)
    hidden = hidden.expand(batch, 1, -1, -1).clone()
    hidden[1, :, :, :77] = True
    mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape, dtype=dtype, device="cuda")
    mask = mask if kind == "bool" else mask.masked_fill(hidden, torch.finfo(dtype).min)
    check(
        "anchor_score", dtype, "cuda", q_len=q_len, past=kv_len - q_len, n=1200, dim=128, mask=mask, hidden=hidden,
        stride=8, first_query=torch.tensor([0, 400], device="cuda"), softcap=30.0,
    )  # fmt: skip


@GPU
@pytest.mark.parametrize("q_len", (1, 8192))
def test_query_moment_on_gpu(q_len):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_moment(2, 8, 4, q_len, 128, dtype, "cuda")
