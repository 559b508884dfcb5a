"""Dense keys and values from codes, against `Snapshot.dense`."""

import pytest
import torch
from antkv.dequantize import dequantize
from builders import assert_near, poison_empty, quantized_past, random_codec, random_snapshot

# Relative to the largest value. Rotations and the float32 basis leave only the output's rounding.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CPU, CUDA = "cpu", "cuda"


def check(device, dtype, key="d8b8", value="d8b8", dim=32, value_dim=None, rope="half", coded=160, span=None, **filled):
    """`dequantize` of `span` (all tokens by default) equals the same tokens of the snapshot's dense form."""
    codec = random_codec(key, value, 2, dim, value_dim, rope, device)
    snapshot = random_snapshot(codec, 2, coded, 1, dtype, **filled)
    past = quantized_past(snapshot)
    start, stop = span or (0, coded)
    expected = snapshot.dense()
    for actual, dense in zip(dequantize(past, start, stop, dtype), expected):
        assert actual.dtype == dtype
        assert_near(actual, dense[:, :, start:stop], TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", ["d8b8", "d4b8", "d2b8", "d8b4", "d16b6", "d8b10", "d32b12", "d16b8s2", "d16b6s3"])
def test_specs(spec, dtype):
    check(CPU, dtype, spec, spec, coded=96)


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial", "scaled", "none"])
@pytest.mark.parametrize("anchors", ["int8", "float16"])
def test_rope_and_anchors(rope, anchors):
    check(CPU, torch.float32, dim=64, rope=rope, anchor_dtype=anchors, coded=96)


@pytest.mark.parametrize("dim, value_dim", [(80, 80), (96, 64), (64, 128), (16, 16)])
def test_head_sizes(dim, value_dim):
    check(CPU, torch.float32, "d8b8", "d16b8", dim=dim, value_dim=value_dim, coded=64)


@pytest.mark.parametrize("span", [(0, 1), (31, 38), (63, 65), (7, 136), (159, 160), (5, 5)])
def test_spans(span):
    check(CPU, torch.float32, span=span)


def test_left_padding():
    check(CPU, torch.float32, offset=(0, 37))


def test_no_exact_tokens():
    check(CPU, torch.float32, sinks=0, fraction=0.0)


def test_writes_into_a_part_of_a_larger_tensor():
    snapshot = random_snapshot(random_codec("d8b8", "d8b8", 2, 32), 2, 96, 1)
    scratch = [torch.full((2, 2, 128, 32), float("nan")) for _ in range(2)]
    out = tuple(x[:, :, :40] for x in scratch)
    result = dequantize(quantized_past(snapshot), 30, 70, torch.float32, out=out)
    for whole, part, dense in zip(scratch, result, snapshot.dense()):
        assert part.data_ptr() == whole.data_ptr()
        assert_near(part, dense[:, :, 30:70], TOLERANCE[torch.float32])
        assert whole[:, :, 40:].isnan().all()


class TestErrors:
    @pytest.fixture(scope="class")
    def past(self):
        return quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 32), 1, 64, 1))

    @pytest.mark.parametrize("span", [(-1, 3), (5, 4), (0, 65)])
    def test_span(self, past, span):
        with pytest.raises(ValueError, match=r"do not lie within 0\.\.64"):
            dequantize(past, *span, torch.float32)

    def test_dtype(self, past):
        with pytest.raises(ValueError, match="float64 is not supported"):
            dequantize(past, 0, 64, torch.float64)

    def test_out(self, past):
        out = torch.zeros(1, 2, 63, 32), torch.zeros(1, 2, 64, 32)
        with pytest.raises(ValueError, match="out has shape"):
            dequantize(past, 0, 64, torch.float32, out=out)

    @pytest.mark.parametrize(
        "change, message",
        [(dict(code_bits=5), "codes of 5 bits"), (dict(sub_dim=64), "sub_dim=64"), (dict(groups=5), "make 40, not 32")],
    )
    def test_codes(self, past, change, message):
        tables = past.key_tables._replace(codes=past.key_tables.codes._replace(**change))
        with pytest.raises(ValueError, match=message):
            dequantize(past._replace(key_tables=tables), 0, 64, torch.float32)

    def test_layout(self, past):
        codes = past.value_codes.transpose(1, 2).contiguous().transpose(1, 2)
        with pytest.raises(ValueError, match="must be contiguous"):
            dequantize(past._replace(value_codes=codes), 0, 64, torch.float32)

    def test_width(self, past):
        with pytest.raises(ValueError, match="key_codes have shape"):
            dequantize(past._replace(key_codes=past.key_codes[..., :3].contiguous()), 0, 64, torch.float32)

    def test_scales(self, past):
        tokens = past.exact[-1]._replace(key_scale=None, value_scale=None)
        with pytest.raises(ValueError, match="need scales"):
            dequantize(past._replace(exact=(tokens,)), 0, 64, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "key, value, dim, value_dim",
    [("d8b8", "d8b8", 128, 128), ("d4b8", "d2b8", 64, 64), ("d16b8s2", "d32b12", 128, 128), ("d8b10", "d8b8", 80, 96),
     ("d16b8", "d16b8", 256, 256)],
)  # fmt: skip
def test_on_gpu(key, value, dim, value_dim, dtype):
    check(CUDA, dtype, key, value, dim, value_dim, coded=4096, span=(1000, 3999), chunk=128, offset=(0, 130))


@pytest.mark.gpu
def test_late_positions_on_gpu():
    """Angles beyond 1e5 radians take another path in the sine."""
    check(CUDA, torch.float32, dim=64, coded=128, span=(3, 120), offset=(-1_000_000, -120_000))
