"""Encoding against `antkv_hf.codecs.VectorQuantizer`: nearest centroids, packed codes, squared errors."""

from __future__ import annotations

import pytest
import torch
from antkv import encode
from antkv.encode import encode_keys, encode_values
from antkv.tables import Codes
from builders import poison_empty, random_codec

from antkv_hf.attention.tables import layer_tables
from antkv_hf.codecs.packing import unpack_codes

GPU = pytest.mark.gpu
START = 1000  # index of the first token


def distances(latent: torch.Tensor, tables, codes: torch.Tensor, basis=0.0) -> tuple[torch.Tensor, ...]:
    """In each stage's own metric: by how much the taken score misses the best, the size of its terms, all the same.

    latent ``(batch, heads, n, dim)`` float64, codes ``(batch, heads, n, slots)`` -> three ``(stages, ...)`` tensors:
    best minus taken score, (|r| + basis) |e| + |b| of the taken centroid, and whether the taken one is the best.
    """
    cut = tables.codes
    rest = latent.unflatten(-1, (cut.groups, cut.sub_dim))
    codes = codes.unflatten(-1, (cut.groups, cut.stages))
    missed, size, same = [], [], []
    head = torch.arange(rest.shape[1], device=rest.device).view(1, -1, 1, 1)
    group = torch.arange(cut.groups, device=rest.device)
    for stage in range(cut.stages):
        encode, bias = tables.encode_centroids[:, :, stage].double(), tables.encode_bias[:, :, stage].double()
        score = torch.einsum("bhngd,hgkd->bhngk", rest, encode) + bias.unsqueeze(1)
        taken = codes[..., stage]
        best, index = score.max(-1)
        missed.append(best - score.gather(-1, taken.unsqueeze(-1)).squeeze(-1))
        size.append(
            (rest.norm(dim=-1) + basis) * encode[head, group, taken].norm(dim=-1) + bias[head, group, taken].abs()
        )
        same.append(index == taken)
        rest = rest - tables.centroids[:, :, stage].double()[head, group, taken]
    return torch.stack(missed), torch.stack(size), torch.stack(same)


def check_codes(packed, latent, tables, tf32: bool, basis=0.0) -> None:
    """Each code's score is the best but for rounding, nearly all codes are the best, and padding bits are 0.

    `basis`, ``(batch, kv_heads, n, 1)``: size of the products that each latent channel is the sum of.
    """
    cut = tables.codes
    assert packed.dtype == torch.uint8 and packed.shape == (*latent.shape[:3], cut.width)
    codes = unpack_codes(packed, cut.code_bits, cut.groups * cut.stages)
    missed, size, same = distances(latent, tables, codes, basis)
    # TF32 keeps 10 bits of each factor; float32 sums of float32 products are exact to some 1e-7 of their size.
    assert (missed <= (4e-3 if tf32 else 1e-5) * size).all()
    assert (~same).sum() <= 1 + (0.02 if tf32 else 0.001) * same.numel()
    bits = cut.groups * cut.stages * cut.code_bits
    if bits % 8:
        assert (packed[..., -1] >> (bits % 8) == 0).all()


def check(
    key="d8b8", value="d8b8", dtype=torch.float32, device="cpu", batch=2, kv_heads=2, n=33, dim=32, value_dim=None,
    rope="half",
):  # fmt: skip
    """Keys and values of one layer, strided as models hand them over, with left padding."""
    codec = random_codec(key, value, kv_heads, dim, value_dim, rope, device)
    key_tables, value_tables = layer_tables(codec, dtype)
    tf32 = device != "cpu" and dtype != torch.float32 and torch.version.hip is None
    g = torch.Generator(device).manual_seed(n)
    make = lambda size: torch.randn(batch, n, kv_heads, size, generator=g, device=device).to(dtype).transpose(1, 2)
    keys, values = make(dim), make(value_dim or dim)
    offset = torch.arange(batch, device=device) * 700
    positions = START + torch.arange(n, device=device) - offset.unsqueeze(1)
    plain = codec.plain_keys(keys.float(), positions)

    packed, error = encode_keys(keys, key_tables, START, offset)
    channels = key_tables.channels.long().unsqueeze(1).expand(batch, kv_heads, n, dim)
    latent = plain.gather(-1, channels).double() - key_tables.mean.double().unsqueeze(1)
    check_codes(packed, latent, key_tables, tf32)
    expected = (codec.key.decode(packed) - plain).square().sum(-1)
    torch.testing.assert_close(error, expected, rtol=2e-4, atol=1e-4)
    assert (packed == codec.key.encode(plain)).double().mean() >= (0.95 if tf32 else 0.99)

    packed, error = encode_values(values, value_tables)
    latent = (values.double() - value_tables.mean.double().unsqueeze(1)) @ value_tables.analysis.double()
    columns = value_tables.analysis.double().norm(dim=1).amax(-1).view(-1, 1, 1)
    basis = (values.double() - value_tables.mean.double().unsqueeze(1)).norm(dim=-1, keepdim=True) * columns
    check_codes(packed, latent, value_tables, tf32, basis)
    expected = (codec.value.decode(packed) - values.float()).square().sum(-1)
    torch.testing.assert_close(error, expected, rtol=5e-3 if tf32 else 2e-4, atol=1e-4)
    assert (packed == codec.value.encode(values.float())).double().mean() >= (0.95 if tf32 else 0.99)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize(
    "key, value, dim",
    [
        ("d8b8", "d8b8", 32),
        ("d2b4", "d4b4", 32),
        ("d2b6", "d2b8", 20),
        ("d4b10", "d16b6", 16),
        ("d32b12", "d8b10", 32),
        ("d16b8s2", "d16b4s2", 48),
        ("d8b6s3", "d8b4s4", 40),
        ("d4b6", "d2b10", 12),
    ],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_equals_vector_quantizer(key, value, dim, dtype):
    """All sub-vector sizes, code bits and stages; numbers of groups that are no power of two."""
    check(key, value, dtype, dim=dim, n=17, batch=1, kv_heads=1)


@pytest.mark.parametrize("n", (1, 7, 129))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_lengths(n, dtype):
    check(n=n, dtype=dtype, key="d8b6", value="d8b6", dim=16)


@pytest.mark.parametrize("rope", ("half", "interleaved", "partial", "scaled", "none"))
def test_rope_forms(rope):
    check(rope=rope, dim=24, n=20, key="d4b4", value="d8b4")


@pytest.mark.parametrize("dim, value_dim", ((64, 128), (128, 64), (256, 80)))
def test_head_sizes(dim, value_dim):
    check(dim=dim, value_dim=value_dim, n=9, key="d8b4", value="d8b4", batch=1, kv_heads=1)


@pytest.mark.parametrize("key, value", (("d8b8", "d8b6"), ("d8b4s3", "d4b10")))
def test_long_input(monkeypatch, key, value):
    """The large tiles, with several groups a program."""
    monkeypatch.setattr("antkv.encode.SMALL", 100)
    check(key, value, torch.float16, n=140, dim=40, batch=1, kv_heads=1)


@pytest.mark.parametrize("dim, tile", ((128, 128), (256, 64)))
def test_wide_values_have_small_tiles(monkeypatch, dim, tile):
    """However many tokens: shared memory must hold the tile of values beside the centroids'."""
    found, constants = [], encode._search_constants

    def kept(*given):
        found.append(constants(*given))
        return found[-1]

    monkeypatch.setattr(encode, "_search_constants", kept)
    monkeypatch.setattr(encode, "SMALL", 1)
    _, tables = layer_tables(random_codec("d8b8", "d8b8", 1, dim), torch.float16)
    encode_values(torch.zeros(1, 1, 2, dim, dtype=torch.float16), tables)
    ((chunk, of_search),) = found
    assert of_search["BC"] == tile and chunk > 4


def test_nan_and_nothing():
    """A vector with NaN gets valid codes and the error NaN; no tokens are no codes."""
    key_tables, value_tables = layer_tables(random_codec("d8b4", "d8b4", 1, 32), torch.float32)
    x = torch.zeros(1, 1, 2, 32)
    x[0, 0, 0] = float("nan")
    offset = torch.zeros(1, dtype=torch.int64)
    for codes, error in (encode_keys(x, key_tables, 0, offset), encode_values(x, value_tables)):
        assert (codes[0, 0, 0] == 0).all() and error.isnan().tolist() == [[[True, False]]]
    for codes, error in (encode_keys(x[:, :, :0], key_tables, 0, offset), encode_values(x[:, :, :0], value_tables)):
        assert codes.shape == (1, 1, 0, 2) and error.shape == (1, 1, 0)


@pytest.mark.parametrize(
    "keys, change, message",
    [
        (torch.zeros(1, 2, 3, 32).double(), {}, "keys are torch.float64"),
        (torch.zeros(1, 2, 32, 3).mT, {}, "last stride of keys is 3; it must be 1"),
        (torch.zeros(1, 2, 3, 512), {}, "head size 512 has no kernel; up to 256 have"),
        (torch.zeros(1, 2, 3, 40), {}, "keys of size 40 do not fit tables of 4 sub-vectors of 8 channels"),
        (torch.zeros(1, 3, 3, 32), {}, r"centroids has shape \(2, 4, 1, 16, 8\); it must be \(3,"),
        (torch.zeros(1, 2, 3, 32), dict(codes=Codes(4, 1, 5, 8)), "code_bits=5 has no kernel"),
        (torch.zeros(1, 2, 3, 32), dict(codes=Codes(2, 1, 4, 16)), "centroids has shape"),
        (torch.zeros(1, 2, 3, 32), dict(codes=Codes(5, 1, 4, 6)), "sub_dim=6 has no kernel"),
        (torch.zeros(1, 2, 3, 32), dict(codes=Codes(4, 9, 4, 8)), "stages=9 has no kernel; 1 to 8 have"),
        (torch.zeros(1, 2, 3, 32), dict(channels=torch.zeros(2, 32)), "channels is torch.float32"),
        (torch.zeros(1, 2, 3, 32), dict(mean=torch.zeros(32, 2).mT), "mean must be contiguous"),
        (torch.zeros(2, 2, 3, 32), {}, r"offset has shape \(1,\); it must be \(2,\)"),
    ],
    ids=lambda x: "" if isinstance(x, (str, torch.Tensor)) else "-".join(x),
)
def test_errors(keys, change, message):
    tables, _ = layer_tables(random_codec("d8b4", "d8b4", 2, 32), torch.float32)
    with pytest.raises(ValueError, match=message):
        encode_keys(keys, tables._replace(**change), 0, torch.zeros(1, dtype=torch.int64))


def test_errors_of_values():
    _, tables = layer_tables(random_codec("d8b4", "d8b4", 2, 32), torch.float32)
    with pytest.raises(ValueError, match="values are torch.int8"):
        encode_values(torch.zeros(1, 2, 3, 32, dtype=torch.int8), tables)
    with pytest.raises(ValueError, match=r"analysis has shape \(2, 16, 16\)"):
        encode_values(torch.zeros(1, 2, 3, 32), tables._replace(analysis=torch.zeros(2, 16, 16)))


@GPU
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize(
    "key, value, dim",
    [("d8b8", "d8b8", 128), ("d4b8", "d2b8", 64), ("d16b8s2", "d16b8s2", 256), ("d32b12", "d8b10", 96)],
)
@pytest.mark.parametrize("n", (7, 4099))
def test_on_gpu(key, value, dim, dtype, n):
    check(key, value, dtype, "cuda", n=n, dim=dim, kv_heads=8 if n == 4099 else 2, batch=1)
