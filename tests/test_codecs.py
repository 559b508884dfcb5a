"""Packing, vector quantization and rotary, each against a plain computation."""

from __future__ import annotations

import pytest
import torch
from helpers import random_tables

from antkv_hf.codecs import VectorQuantizer, VQTables
from antkv_hf.codecs.packing import pack_codes, unpack_codes
from antkv_hf.config import BITS_TO_SPEC, VQSpec
from antkv_hf.reference import vq as reference
from antkv_hf.rotary import Rotary


@pytest.mark.parametrize("bits", (4, 6, 8, 10, 12))
@pytest.mark.parametrize("n", (1, 2, 3, 7, 16))
def test_packing_round_trip(bits, n):
    codes = torch.randint(0, 1 << bits, (2, 3, 5, n))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == -(-n * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, n), codes)


def test_packing_layout_is_little_endian():
    packed = pack_codes(torch.tensor([0xABC, 0x123]), 12)
    assert packed.tolist() == [0xBC, 0x3A, 0x12]


@pytest.mark.parametrize("dense", (True, False))
@pytest.mark.parametrize(
    "spec", [VQSpec(8, 8), VQSpec(16, 4, 2), VQSpec(8, 10), VQSpec(2, 6), VQSpec(32, 4, 3)], ids=str
)
def test_encode_picks_the_nearest(spec, dense):
    heads, dim = 2, 32
    tables = random_tables(spec, heads, dim, dense, seed=3)
    codec = VectorQuantizer(spec, tables)
    x = torch.randn(2, heads, 9, dim)
    codes = codec.encode(x)
    assert codes.dtype == torch.uint8 and codes.shape == (2, heads, 9, spec.bytes_per_vector(dim))
    decoded = codec.decode(codes)
    # A brute-force search over every centroid, one vector at a time.
    for head in range(heads):
        for vector, ours in zip(x[:, head].reshape(-1, dim), decoded[:, head].reshape(-1, dim)):
            latent = vector - tables.mean[head]
            if dense:
                latent = latent @ torch.linalg.inv(tables.synthesis[head])
            else:
                latent = latent[tables.permutation[head].long()]
            best = []
            for group in range(spec.groups(dim)):
                rest = latent[group * spec.sub_dim : (group + 1) * spec.sub_dim]
                root = torch.eye(spec.sub_dim) if dense else tables.metric_root[head, group]
                total = torch.zeros_like(rest)
                for stage in range(spec.stages):
                    table = tables.centroids[head, group, stage]
                    pick = ((rest - total - table) @ root.T).square().sum(-1).argmin()
                    total = total + table[pick]
                best.append(total)
            plain = torch.cat(best)
            if dense:
                plain = plain @ tables.synthesis[head]
            else:
                plain = plain[tables.permutation[head].long().argsort()]
            torch.testing.assert_close(ours, plain + tables.mean[head], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dense", (True, False))
def test_weighted_sum_equals_decode(dense):
    codec = VectorQuantizer(VQSpec(8, 8), random_tables(VQSpec(8, 8), 3, 64, dense))
    codes = codec.encode(torch.randn(2, 3, 70, 64))
    weights = torch.rand(2, 3, 5, 70)
    torch.testing.assert_close(codec.weighted_sum(weights, codes), weights @ codec.decode(codes), atol=1e-4, rtol=1e-4)


def test_large_encode_is_done_in_blocks(monkeypatch):
    x, centroids = torch.randn(3, 1000, 8), torch.randn(3, 64, 8)
    whole = reference.nearest_centroid(x, centroids)
    monkeypatch.setitem(reference._MAX_DISTANCES, "cpu", 3 * 64 * 17)
    assert torch.equal(reference.nearest_centroid(x, centroids), whole)
    assert torch.equal(whole, torch.cdist(x, centroids).argmin(-1))


def test_presets_have_the_bits_they_are_named_after():
    for name, spec in BITS_TO_SPEC.items():
        assert spec.bits_per_element == float(name)
        assert 8 * spec.bytes_per_vector(128) / 128 == float(name)
        assert VQSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("rotary_dim", (8, 16))
def test_rotary_inverse_and_pairs(interleaved, rotary_dim):
    rotary = Rotary(torch.rand(rotary_dim // 2), interleaved, scaling=1.3)
    x, positions = torch.randn(2, 3, 11, 16, dtype=torch.float64).float(), torch.randint(-5, 9000, (2, 1, 11))
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(x, positions), positions), x, atol=1e-5, rtol=1e-5)
    pairs = rotary.channel_pairs(16)
    assert torch.equal(pairs.flatten().sort().values, torch.arange(16))
    # A rotation leaves the norm of each pair alone (up to the scaling of rotated channels).
    before, after = (t[..., pairs].norm(dim=-1) for t in (x, rotary.rotate(x, positions)))
    scale = torch.where(torch.arange(8) < rotary_dim // 2, 1.3, 1.0)
    torch.testing.assert_close(after, before * scale, atol=1e-4, rtol=1e-4)


def test_tables_are_checked():
    spec, tables = VQSpec(8, 8), random_tables(VQSpec(8, 8), 2, 32, dense=False)
    with pytest.raises(ValueError, match=r"centroids has shape \(2, 4, 1, 256, 8\), but \(3, 4, 1, 256, 8\)"):
        tables.check(spec, 3, 32)
    bad = VQTables(tables.centroids, tables.mean, permutation=torch.zeros(2, 32), metric_root=tables.metric_root)
    with pytest.raises(ValueError, match="not a permutation"):
        bad.check(spec, 2, 32)
    with pytest.raises(ValueError, match="not finite"):
        VQTables(tables.centroids / 0, tables.mean, tables.permutation, tables.metric_root).check(spec, 2, 32)
    with pytest.raises(ValueError, match="3 kv heads of size 32, but the codebook was made for 2"):
        VectorQuantizer(spec, tables).encode(torch.randn(1, 3, 4, 32))
