"""Dense attention with its log-sum-exp, against the formula in PyTorch."""

import pytest
import torch
from antkv.flash_attention import exact_attention, flash_attention
from builders import assert_near, poison_empty

# Output relative to its largest value; LSE absolute.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1e-2, 1e-3)}
CPU, CUDA = "cpu", "cuda"


def truth(query, keys, values, scale, causal_offset=None, mask=None, softcap=None):
    """o_i and lse_i in float32, with the whole map."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    logits = query.float() @ keys.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if causal_offset is not None:
        last = torch.arange(query.shape[2], device=query.device) + causal_offset
        hidden = torch.arange(keys.shape[2], device=query.device) > last.unsqueeze(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ values, logits.logsumexp(-1)  # NaN: a query that sees no key


def inputs(device, dtype, q_len, n, dim=32, value_dim=None, heads=(2, 1), batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (heads[0], q_len, dim), (heads[1], n, dim), (heads[1], n, value_dim or dim)
    # (batch, tokens, heads, channels) in memory, as a model's projections are
    return tuple(
        torch.randn(batch, tokens, h, d, generator=g).to(device, dtype).transpose(1, 2) for h, tokens, d in sizes
    )


def check(device, dtype, q_len, n, causal_offset=None, mask=None, softcap=None, attention=flash_attention, **sizes):
    query, keys, values = inputs(device, dtype, q_len, n, **sizes)
    scale = 1.3 * query.shape[3] ** -0.5
    options = dict(scale=scale, causal_offset=causal_offset, mask=mask, softcap=softcap)
    out, lse = attention(query, keys, values, **options)
    expected, expected_lse = truth(query, keys, values, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_near(out, expected, TOLERANCE[dtype][0])
    finite = expected_lse.isfinite()
    assert torch.equal(lse[~finite], expected_lse[~finite])
    torch.testing.assert_close(lse[finite], expected_lse[finite], atol=TOLERANCE[dtype][1], rtol=1e-6)


def random_mask(kind, shape, device=CPU, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    visible = (torch.rand(shape, generator=g) < 0.6).to(device)
    if kind == "bool":
        return visible
    additive = torch.randn(shape, generator=g).to(device, dtype)
    return additive.masked_fill(~visible, float("-inf") if kind == "infinite" else torch.finfo(dtype).min)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("q_len, n", [(1, 1), (1, 300), (7, 129), (129, 129), (129, 300), (65, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(q_len, n, causal, dtype):
    check(CPU, dtype, q_len, n, n - q_len if causal else None)


@pytest.mark.parametrize("offset", [-100, -40, -1, 0, 5, 31, 32, 99, 1000])
def test_causal_offsets(offset):
    """Queries that see no key answer 0 with an LSE of -inf; offsets need not end at the last key."""
    check(CPU, torch.float32, 70, 100, offset)


@pytest.mark.parametrize("dim, value_dim", [(16, 16), (64, 64), (80, 80), (96, 128), (128, 64), (256, 256), (192, 128)])
def test_head_sizes(dim, value_dim):
    check(CPU, torch.float32, 33, 70, 37, dim=dim, value_dim=value_dim)
    check(CPU, torch.float16, 33, 70, 37, dim=dim, value_dim=value_dim)


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 2), (3, 3)])
def test_grouped_heads(heads):
    check(CPU, torch.float32, 9, 40, 31, heads=heads, batch=2)


@pytest.mark.parametrize("kind", ["bool", "infinite", "smallest"])
@pytest.mark.parametrize("shape", [(2, 4, 40, 70), (1, 1, 40, 70), (2, 1, 1, 70), (1, 4, 40, 70)])
def test_masks(kind, shape):
    check(CPU, torch.float32, 40, 70, mask=random_mask(kind, shape), heads=(4, 2), batch=2)


def test_columns_of_a_larger_mask():
    whole = random_mask("bool", (1, 1, 70, 400))
    check(CPU, torch.float32, 70, 150, mask=whole[..., 200:350])
    check(CPU, torch.float32, 70, 70, mask=whole[..., :70].mT)


def test_rows_that_a_mask_hides():
    mask = random_mask("bool", (1, 1, 70, 150))
    mask[:, :, 10:30] = False
    mask[..., :80] = False
    check(CPU, torch.float32, 70, 150, mask=mask)


def test_a_row_of_the_smallest_number_everywhere():
    """An additive mask of float32's minimum hides no key from a row where it stands alone: that row is an average."""
    check(CPU, torch.float32, 5, 40, mask=torch.full((1, 1, 5, 40), torch.finfo(torch.float32).min))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    check(CPU, torch.float32, 65, 90, 25, softcap=softcap)
    check(CPU, torch.float32, 65, 90, softcap=softcap, mask=random_mask("bool", (1, 1, 65, 90)))


def test_no_keys():
    check(CPU, torch.float32, 5, 0)


def test_exact_attention_falls_back():
    check(CPU, torch.float32, 33, 70, 37, attention=exact_attention)
    check(CPU, torch.float32, 33, 70, 200, attention=exact_attention)


class TestErrors:
    def fails(self, message, query=(1, 4, 3, 32), keys=(1, 2, 5, 32), values=(1, 2, 5, 32), dtypes=None, **options):
        tensors = [
            torch.zeros(shape, dtype=dtype) for shape, dtype in zip((query, keys, values), dtypes or 3 * [torch.float])
        ]
        for attention in (flash_attention, exact_attention):
            with pytest.raises(ValueError, match=message):
                attention(*tensors, scale=1.0, **options)

    def test_heads(self):
        self.fails("3 kv heads do not divide 4", keys=(1, 3, 5, 32), values=(1, 3, 5, 32))

    def test_sizes(self):
        self.fails("do not fit together", keys=(1, 2, 5, 16))
        self.fails("do not fit together", values=(1, 2, 6, 32))
        self.fails("head size 288", query=(1, 4, 3, 288), keys=(1, 2, 5, 288))

    def test_dtypes(self):
        self.fails("they must agree", dtypes=(torch.half, torch.float, torch.float))
        self.fails("float64 is not supported", dtypes=3 * [torch.float64])

    def test_mask(self):
        self.fails("mask of shape", mask=torch.zeros(1, 1, 3, 6))
        self.fails("must be bool or floating", mask=torch.zeros(1, 1, 3, 5, dtype=torch.int64))

    def test_channel_stride(self):
        with pytest.raises(ValueError, match="stride 3 along channels"):
            flash_attention(torch.zeros(1, 4, 32, 3).mT, *2 * [torch.zeros(1, 2, 5, 32)], scale=1.0)


SIXTEEN_BIT = [torch.float16, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [flash_attention, exact_attention])
@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("q_len, n", [(1, 4000), (129, 1000), (1500, 1500), (1024, 2048)])
@pytest.mark.parametrize("causal", [False, True])
def test_on_gpu(q_len, n, causal, dim, dtype, attention):
    """Both kernels, so PyTorch's causality from the last key and its grouped heads are covered."""
    check(CUDA, dtype, q_len, n, n - q_len if causal else None, dim=dim, heads=(8, 2), batch=2, attention=attention)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32])
@pytest.mark.parametrize("kind", ["bool", "infinite", "smallest"])
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (192, 128), (96, 128), (256, 256)])
def test_masks_on_gpu(dim, value_dim, kind, dtype):
    mask = random_mask(kind, (2, 1, 500, 1300), CUDA, dtype)
    check(CUDA, dtype, 500, 1300, mask=mask, dim=dim, value_dim=value_dim, heads=(8, 2), batch=2, softcap=20.0)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [flash_attention, exact_attention])
def test_unaligned_on_gpu(attention):
    """PyTorch's kernel loads 16 bytes at a time and must not be handed anything else."""
    query, keys, values = (x[..., 1:65] for x in inputs(CUDA, torch.float16, 100, 300, dim=72))
    out, lse = attention(query, keys, values, scale=0.1)
    expected, expected_lse = truth(query, keys, values, 0.1)
    assert_near(out, expected, 2e-3)
    assert_near(lse, expected_lse, 1e-3)
