"""A chunk's attention over codes, exact tokens and tail, against the reference on the same snapshot."""

import pytest
import torch
from antkv import merge_splits, prefill
from antkv.prefill import merge_, prefill_attention
from builders import assert_near, poison_empty, quantized_past, random_codec, random_snapshot

from antkv_hf.attention.triton_backend import bias_and_exact
from antkv_hf.reference.attention import Visibility, attention
from antkv_hf.reference.code_bias import LARGEST

# Output relative to its largest value; LSE absolute. 16-bit keys and values are rounded once more than the codes are.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1e-2, 1e-2)}
CPU, CUDA = "cpu", "cuda"


def check(
    device, dtype, key="d8b8", value="d8b8", dim=32, value_dim=None, rope="half", coded=96, tail=30, q_len=19,
    group=2, batch=1, mask=None, softcap=None, sink=None, is_causal=True, segment=64, noise=True, **filled,
):  # fmt: skip
    """`prefill_attention` of the last `q_len` tokens equals the reference."""
    codec = random_codec(key, value, 2, dim, value_dim, rope, device, noise=noise)
    snapshot = random_snapshot(codec, batch, coded, tail, dtype, **filled)
    g = torch.Generator().manual_seed(7)
    query = torch.randn(batch, q_len, 2 * group, dim, generator=g).to(device, dtype).transpose(1, 2)
    scale = dim**-0.5
    visibility = Visibility(mask, is_causal and q_len > 1, q_len, snapshot.length)
    expected, expected_lse = attention(snapshot, query, visibility, scale, softcap, sink)
    out, lse = prefill_attention(
        query, quantized_past(snapshot), snapshot.tail_keys, snapshot.tail_values, scale=scale, mask=mask,
        is_causal=is_causal, softcap=softcap, sink_logit=sink, segment=segment,
        code_bias=bias_and_exact(snapshot, query, scale),
    )  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance, lse_tolerance = TOLERANCE[dtype]
    assert_near(out, expected.flatten(1, 2), tolerance)
    expected_lse = expected_lse.flatten(1, 2)
    finite = expected_lse.isfinite()
    assert torch.equal(lse[~finite], expected_lse[~finite])
    torch.testing.assert_close(lse[finite], expected_lse[finite], atol=lse_tolerance, rtol=1e-6)


def padded_mask(padding, q_len, length, device=CPU):
    """Causal mask ``(batch, 1, q_len, length)`` that hides the left padding of each sequence."""
    columns = torch.arange(length, device=device)
    causal = columns <= torch.arange(length - q_len, length, device=device).unsqueeze(1)
    return (causal & (columns >= torch.tensor(padding, device=device).view(-1, 1, 1))).unsqueeze(1)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    poison_empty(monkeypatch)
    monkeypatch.setattr(prefill, "MIN_SEGMENT", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", ["d8b8", "d4b8", "d2b8", "d16b8s2", "d8b10", "d32b12"])
def test_specs(spec, dtype):
    check(CPU, dtype, spec, spec, group=1, segment=1000)


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial", "scaled", "none"])
@pytest.mark.parametrize("anchors", ["int8", "float16"])
def test_rope_and_anchors(rope, anchors):
    check(CPU, torch.float32, rope=rope, anchor_dtype=anchors, q_len=7, group=1, segment=1000)


@pytest.mark.parametrize("sinks, fraction", [(0, 0.0), (4, 0.0), (3, 0.3)])
@pytest.mark.parametrize("noise", [False, True])
def test_exact_sets(sinks, fraction, noise):
    check(CPU, torch.float32, sinks=sinks, fraction=fraction, noise=noise, q_len=7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 0.02)])
@pytest.mark.parametrize("size", [3.0, 300.0])
def test_large_bias_beside_a_sink_that_takes_nearly_all(dtype, tolerance, size):
    """What is subtracted is nearly all there is: digits are lost (as many as exp(3) has), nothing is NaN."""
    codec = random_codec("d8b8", "d8b8", 2, 32)
    codec.key.noise.mul_(size)
    snapshot = random_snapshot(codec, 1, 96, 30, dtype)
    sink = snapshot.exact_tokens[0].keys[:, :, 0].repeat_interleave(2, 1).unsqueeze(2).float()
    query = (3 * sink + torch.randn(1, 4, 9, 32, generator=torch.Generator().manual_seed(3))).to(dtype)
    bias = codec.code_bias(query.unflatten(1, (2, 2)), 0.2)
    assert bias.max() <= LARGEST == merge_splits.LARGEST_BIAS.value and (size < 10 or bias.min() == LARGEST)
    expected, expected_lse = attention(snapshot, query, Visibility(None, True, 9, 126), 0.2)
    out, lse = prefill_attention(
        query, quantized_past(snapshot), snapshot.tail_keys, snapshot.tail_values, scale=0.2,
        code_bias=bias_and_exact(snapshot, query, 0.2), segment=64,
    )  # fmt: skip
    assert_near(out, expected.flatten(1, 2), tolerance)
    torch.testing.assert_close(lse, expected_lse.flatten(1, 2), atol=0.01, rtol=1e-4)


@pytest.mark.parametrize("dim, value_dim", [(64, 64), (80, 80), (64, 32)])
def test_head_sizes(dim, value_dim):
    check(CPU, torch.float32, dim=dim, value_dim=value_dim, coded=64, q_len=7)


@pytest.mark.parametrize("q_len, tail", [(1, 1), (1, 40), (7, 7), (7, 50), (129, 129), (129, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks(q_len, tail, dtype):
    check(CPU, dtype, q_len=q_len, tail=tail, coded=64, segment=1000 if q_len > 100 else 64, group=1 + (q_len < 100))


@pytest.mark.parametrize("segment", [40, 100, 10**6])
def test_segments(segment):
    check(CPU, torch.float32, segment=segment, q_len=7)


def test_not_causal():
    check(CPU, torch.float32, is_causal=False)


def test_softcap_and_sinks():
    sink = torch.tensor([-20.0, 0.0, 3.0, 30.0])
    check(CPU, torch.float32, softcap=5.0, sink=sink)
    check(CPU, torch.float16, sink=sink, softcap=5.0)


def test_left_padding():
    mask = padded_mask((5, 45), 19, 126)
    check(CPU, torch.float32, mask=mask, offset=(5, 45), batch=2, group=1)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float16).min)
    check(CPU, torch.float16, mask=additive, offset=(5, 45), batch=2, group=1)


def test_rows_that_see_nothing():
    mask = padded_mask((0, 116), 19, 126)  # the first queries of the second sequence are padding
    check(CPU, torch.float32, mask=mask, offset=(0, 116), sinks=0, batch=2, group=1, segment=1000)
    check(CPU, torch.float32, mask=mask, offset=(0, 116), sinks=0, batch=2, group=1, segment=1000, sink=torch.zeros(2))


def test_one_mask_a_head():
    g = torch.Generator().manual_seed(3)
    check(CPU, torch.float32, mask=torch.randn(1, 4, 19, 126, generator=g))


def test_without_a_past():
    check(CPU, torch.float32, coded=0, tail=50)
    check(CPU, torch.float32, coded=0, tail=19, softcap=5.0)


def test_workspace_does_not_grow_with_the_past(monkeypatch):
    """Nothing that `torch.empty` returns is as long as the past."""
    snapshot = random_snapshot(random_codec("d8b8", "d8b8", 1, 32), 1, 256, 5)
    sizes, empty = [], torch.empty

    def measured(*args, **kwargs):
        out = empty(*args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", measured)
    query = torch.randn(1, 1, 5, 32)
    past = quantized_past(snapshot)
    sizes.clear()
    prefill_attention(query, past, snapshot.tail_keys, snapshot.tail_values, scale=0.2, segment=64)
    assert max(sizes) == 64 * 32 and sizes.count(64 * 32) == 2


@pytest.mark.parametrize("q_len, dim", [(1, 32), (7, 80), (129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge(q_len, dim, dtype):
    out, part = torch.randn(2, 3, q_len, dim), torch.randn(2, q_len, 3, dim).to(dtype).transpose(1, 2)
    lse, part_lse = 5 * torch.randn(2, 3, q_len), 5 * torch.randn(2, 3, q_len)
    for x, x_lse in ((out[0], lse[0]), (part[:, 1], part_lse[:, 1])):  # each alone has seen nothing; one row, both
        x[0, 0], x_lse[0, 0] = 0.0, float("-inf")
    total = torch.logaddexp(lse, part_lse)
    weights = [(x - total).exp().nan_to_num(0.0).unsqueeze(-1) for x in (lse, part_lse)]
    expected = out * weights[0] + part.float() * weights[1]
    merged = merge_(out, lse, part, part_lse)
    assert_near(out, expected, 1e-6)
    assert_near(merged, total, 1e-6)


class TestErrors:
    @pytest.fixture(scope="class")
    def snapshot(self):
        return random_snapshot(random_codec("d8b8", "d8b8", 2, 32), 1, 64, 5)

    def fails(self, message, snapshot, past=True, q_len=3, tail=slice(None), **options):
        query = torch.zeros(1, 4, q_len, 32)
        keys, values = snapshot.tail_keys[:, :, tail], snapshot.tail_values[:, :, tail]
        with pytest.raises(ValueError, match=message):
            prefill_attention(query, quantized_past(snapshot) if past else None, keys, values, scale=1.0, **options)

    def test_queries_outside_the_tail(self, snapshot):
        self.fails("6 causal queries do not fit a tail of 5", snapshot, q_len=6)

    def test_no_keys(self, snapshot):
        self.fails("no keys", snapshot, past=False, tail=slice(0))

    def test_mask(self, snapshot):
        self.fails("covers 68 keys, not 69", snapshot, mask=torch.ones(1, 1, 3, 68, dtype=torch.bool))
        self.fails("does not fit", snapshot, mask=torch.ones(1, 3, 3, 69, dtype=torch.bool))

    def test_sinks(self, snapshot):
        self.fails(r"shape \(2,\)", snapshot, sink_logit=torch.zeros(2))

    def test_segment(self, snapshot):
        self.fails("segment=0", snapshot, segment=0)

    def test_tail(self, snapshot):
        with pytest.raises(ValueError, match="tail's values have shape"):
            values = snapshot.tail_values[..., :16]
            prefill_attention(torch.zeros(1, 4, 3, 32), quantized_past(snapshot), snapshot.tail_keys, values, scale=1.0)

    def test_merge(self):
        out, lse = torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3)
        for changed, message in (
            ((out.half(), lse, out, lse), "float32 is needed"),
            ((out, lse, out[:, :, :2], lse), "part has shape"),
            ((out, lse.double(), out, lse), "an LSE is"),
        ):
            with pytest.raises(ValueError, match=message):
                merge_(*changed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("key, value, dim", [("d8b8", "d8b8", 128), ("d4b8", "d16b8s2", 64), ("d16b8", "d16b8", 256)])
@pytest.mark.parametrize("tail, q_len", [(1000, 1000), (1328, 1200), (130, 1)])
def test_on_gpu(tail, q_len, key, value, dim, dtype):
    check(CUDA, dtype, key, value, dim, coded=8192, tail=tail, q_len=q_len, segment=6000, group=4, batch=2, chunk=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_softcap_and_sinks_on_gpu(dtype):
    check(
        CUDA, dtype, dim=128, coded=4096, tail=700, q_len=512, segment=3000, group=4, batch=2, chunk=128,
        offset=(0, 333), mask=padded_mask((0, 333), 512, 4796, CUDA), softcap=30.0,
        sink=torch.linspace(-3, 3, 8, device=CUDA),
    )  # fmt: skip
