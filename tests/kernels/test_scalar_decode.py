"""A few queries over scalar codes, exact tokens and tail in one launch, against the reference on the same snapshot."""

import pytest
import torch
from antkv.scalar_decode import scalar_decode_attention
from builders import ROPE, assert_near, poison_empty, rotary_of
from test_backend import life

from antkv_hf.anchors import get_score
from antkv_hf.attention import backends
from antkv_hf.attention.backends import CALLS, make_backend
from antkv_hf.attention.reference_backend import REFERENCE
from antkv_hf.attention.scalar_backend import scalar_past
from antkv_hf.codecs import ChannelQuantizer, LayerCodec, TokenQuantizer
from antkv_hf.config import AnchorConfig, AnTKVConfig, ScalarSpec
from antkv_hf.reference.attention import Visibility, attention
from antkv_hf.snapshot import Snapshot
from antkv_hf.storage import LayerStorage

# Output relative to its largest value; LSE absolute. 16-bit models turn keys, with their bias, in float16.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (5e-3, 2e-3), torch.bfloat16: (1e-2, 1e-2)}
CPU, CUDA = "cpu", "cuda"


def scalar_codec(key="int2g32", value="int2g32", dim=32, value_dim=None, rope="half", device=CPU) -> LayerCodec:
    rotary = rotary_of(rope, dim)
    return LayerCodec(
        ChannelQuantizer(ScalarSpec.parse(key), dim),
        TokenQuantizer(ScalarSpec.parse(value), value_dim or dim),
        None if rotary is None else rotary.to(torch.device(device)),
    )


def scalar_snapshot(
    codec: LayerCodec, batch: int, heads: int, coded: int, tail: int, dtype, anchor_dtype="int8", sinks=4,
    fraction=0.05, offset=None, device=CPU, cuts=(),
) -> Snapshot:  # fmt: skip
    """A layer after `coded` + `tail` random tokens, cropped to each of `cuts` on its way: groups of any length."""
    chunk = codec.key.spec.group
    g = torch.Generator().manual_seed(coded)
    keys = torch.randn(batch, heads, coded + 3 * chunk, codec.key.head_dim, generator=g)
    keys[..., 0] += 30.0  # a bias
    values = torch.randn(batch, heads, coded + 3 * chunk, codec.value.head_dim, generator=g)
    keys, values = keys.to(device, dtype), values.to(device, dtype)
    anchors = AnchorConfig(score="random" if fraction else "none", fraction=fraction, dtype=anchor_dtype, sinks=sinks)
    config = AnTKVConfig(codec.key.spec, codec.value.spec, anchors=anchors, window=1, chunk=chunk)
    storage = LayerStorage(codec, config, get_score(anchors.score), keys, values)
    if offset is not None:
        storage.offset, storage.max_offset = torch.tensor(offset, device=device), max(offset)
    for length in (*cuts, coded):
        new = slice(storage.length, storage.length + (-(-(length - storage.length) // chunk)) * chunk + 1)
        storage.append(keys[:, :, new], values[:, :, new])
        storage.commit()
        storage.crop(length)
    storage.append(keys[:, :, coded : coded + tail], values[:, :, coded : coded + tail])
    snapshot = storage.snapshot()
    assert snapshot.coded_length == coded and snapshot.tail_keys.shape[2] == tail
    return snapshot


def check(
    device, dtype, codec=None, batch=2, heads=2, coded=160, tail=40, q_len=1, group=3, mask=None, softcap=None,
    sink=None, is_causal=True, **filled,
):  # fmt: skip
    """`scalar_decode_attention` of the last `q_len` tokens equals the reference."""
    codec = scalar_codec(device=device) if codec is None else codec
    snapshot = scalar_snapshot(codec, batch, heads, coded, tail, dtype, device=device, **filled)
    dim, g = codec.key.head_dim, torch.Generator().manual_seed(coded + q_len)
    query = torch.randn(batch, q_len, heads * group, dim, generator=g).to(device, dtype).transpose(1, 2)
    visibility = Visibility(mask, is_causal and q_len > 1, q_len, snapshot.length)
    expected, expected_lse = attention(snapshot, query, visibility, dim**-0.5, softcap, sink)
    out, lse = scalar_decode_attention(
        query, scalar_past(snapshot), snapshot.tail_keys, snapshot.tail_values, scale=dim**-0.5, mask=mask,
        is_causal=is_causal, softcap=softcap, sink_logit=sink,
    )  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance, lse_tolerance = TOLERANCE[dtype]
    # Float32 angles of late positions turn the bias: 8K tokens were 3.7e-5 off on a GPU.
    tolerance = max(tolerance, 1e-8 * coded)
    assert_near(out, expected.flatten(1, 2), tolerance)
    # a logit grows with the bias, and its rounding with it
    torch.testing.assert_close(lse, expected_lse.flatten(1, 2), atol=lse_tolerance, rtol=4 * lse_tolerance)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize(
    "length, dtype", [(1, torch.float32), (7, torch.float16), (129, torch.float16), (1000, torch.float32)]
)
def test_odd_lengths(length, dtype):
    check(CPU, dtype, coded=length, tail=min(length, 7), heads=1, batch=1)


@pytest.mark.parametrize(
    "key, value, dim, value_dim",
    [
        ("int2g64", "int4g128", 64, 64), ("int4g128", "int2g64", 80, 96), ("int4g32", "int4g32", 96, 80),
        ("int2g32", "int2g64", 128, 64),
    ],
)  # fmt: skip
def test_specs_and_head_sizes(key, value, dim, value_dim):
    codec = scalar_codec(key, value, dim, value_dim)
    check(CPU, torch.float32, codec, batch=1, heads=2, coded=140, tail=3)


def test_groups_cut_short_by_crops():
    check(CPU, torch.float32, coded=111, cuts=(1, 50, 51, 90))


@pytest.mark.parametrize("rope", ROPE)
def test_rope_and_anchors(rope):
    for anchors in ("int8", "float16") if rope == "half" else ("int8",):  # float16 ones are not turned
        check(CPU, torch.float32, scalar_codec(rope=rope), anchor_dtype=anchors, coded=64, batch=1, tail=5)


@pytest.mark.parametrize("sinks, fraction", [(0, 0.0), (4, 0.0), (0, 0.1)])
def test_exact_sets(sinks, fraction):
    check(CPU, torch.float32, sinks=sinks, fraction=fraction, coded=64, batch=1)


@pytest.mark.parametrize("q_len, group, tail", [(1, 7, 90), (2, 4, 2), (8, 4, 33)])
def test_queries(q_len, group, tail):
    options = dict(q_len=q_len, group=group, tail=tail, batch=1, heads=1, coded=64)
    check(CPU, torch.float32, **options)
    check(CPU, torch.float32, is_causal=False, **options)


def test_padding_softcap_and_sink():
    q_len, length, padding = 3, 136, (0, 45)
    columns, rows = torch.arange(length), torch.arange(length - q_len, length)
    real = (columns >= torch.tensor(padding).unsqueeze(1)).view(2, 1, 1, length)
    mask = real & (columns <= rows.unsqueeze(1))
    options = dict(q_len=q_len, coded=96, offset=padding, softcap=20.0, sink=torch.randn(6))
    check(CPU, torch.float32, mask=mask, **options)


def test_life_of_a_layer():
    codec, score, padding = scalar_codec(), "error_aware", (0, 21)
    triton = make_backend("triton", codec, torch.device(CPU), torch.float32)
    expected, reference = life(REFERENCE, codec, score, padding)
    CALLS.clear()
    out, storage = life(triton, codec, score, padding)
    answered = {"triton.prefill_attention", "triton.scalar_decode_attention", "reference.encode"}
    assert answered <= set(CALLS) and not {"reference.attention", "reference.column_statistic"} & set(CALLS)
    assert_near(out[:, :, 21:], expected[:, :, 21:], 1e-4)
    assert storage.coded_length == reference.coded_length == 64
    assert torch.equal(storage.key_codes, reference.key_codes)
    assert torch.equal(storage.anchors.positions, reference.anchors.positions)
    assert codec.memory_bytes() > 0  # the kernel's table of turns


def test_codecs_without_a_kernel(monkeypatch):
    with pytest.raises(ValueError, match="head size 20 has no kernel"):
        make_backend("triton", scalar_codec(dim=20), torch.device(CPU), torch.float32)
    monkeypatch.setattr(backends, "select_backend", lambda *_: "cuda")  # as on a GPU with cuda-core
    assert make_backend("auto", scalar_codec(), torch.device(CPU), torch.float16).name == "triton"
    with pytest.raises(ValueError, match=r"scalar codes have no kernel in CUDA C\+\+; use 'triton' or 'auto'"):
        make_backend("cuda", scalar_codec(), torch.device(CPU), torch.float16)


def test_errors():
    snapshot = scalar_snapshot(scalar_codec(), 1, 2, 64, 7, torch.float32)
    past, tail = scalar_past(snapshot), (snapshot.tail_keys, snapshot.tail_values)
    query = torch.randn(1, 6, 1, 32)
    for change, message in (
        (dict(scale=past.scale[:, :, :1]), r"scale has shape \(1, 2, 1, 32\); \(1, 2, 2, 32\)"),
        (dict(value_codes=past.value_codes[..., 1:]), "value_codes has shape"),
        (dict(key_bits=3), "keys of 3 bits have no kernel"),
        (dict(value_group=48), "groups of 48 values have no kernel"),
        (dict(exact_bits=past.exact_bits[..., 1:]), "exact_bits has shape"),
        (dict(key_codes=past.key_codes[:, :, :0]), "0 coded tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            scalar_decode_attention(query, past._replace(**change), *tail, scale=1.0)
    with pytest.raises(ValueError, match="90 query rows"):
        scalar_decode_attention(torch.randn(1, 6, 30, 32), past, *tail, scale=1.0)
    with pytest.raises(ValueError, match="value head size 5 has no kernel"):
        scalar_decode_attention(query, past, tail[0], tail[1][..., :5], scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "key, value, dim, options",
    [
        ("int2g32", "int2g64", 128, dict(heads=8, group=4, coded=8192)),
        ("int4g64", "int4g64", 64, dict(heads=3, group=3, coded=1024, anchor_dtype="float16")),
        ("int4g128", "int2g128", 80, dict(heads=4, group=1, coded=384)),
        ("int2g64", "int2g32", 128, dict(heads=2, group=8, coded=1000, cuts=(77, 301), batch=4)),
    ],
)
def test_on_gpu(key, value, dim, options, dtype):
    check(CUDA, dtype, scalar_codec(key, value, dim, device=CUDA), tail=20, **options)
