"""benchmarks/tradeoff.py: which rows of the two tables belong together."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from tradeoff import SLICE, Point, points


def kernel(name, spec, speedup, n=131072, head_dim=64):
    row = dict(kernel=f"decode_attention {name}", batch=16, n=n, head_dim=head_dim, spec=spec)
    return {k: str(v) for k, v in (row | dict(speedup_over_sdpa=speedup)).items()}


def test_points_take_the_kernel_in_cuda_of_one_size_and_what_was_measured_of_its_tables():
    kernels = [
        kernel("CUDA", "d8b8", 2.5), kernel("Triton", "d8b8", 0.8), kernel("CUDA", "d8b8", 1.1, n=4096),
        kernel("CUDA", "d4b8", 2.2, head_dim=128), kernel("CUDA", "d2b8", 1.5), kernel("CUDA", "d8b8s2/d8b8", 2.0),
    ]  # fmt: skip
    quality = [
        SLICE | dict(method="1bit-kmeans", ratio="1.05"), SLICE | dict(method="1bit-tuned", ratio="1.03"),
        SLICE | dict(method="1bit-tuned", ratio="1.4", protocol="W0"), SLICE | dict(method="2bit-kmeans", ratio="1.01"),
    ]  # fmt: skip
    expected = [Point("d8b8", "k-means", 2.5, 1.05), Point("d8b8", "fine-tuned", 2.5, 1.03)]
    assert points(kernels, quality, 16, 131072) == expected


def test_a_size_that_is_missing_is_named_with_those_that_are_there():
    with pytest.raises(ValueError, match="no row of 1 x 131072 tokens with heads of 64; there are 16x131072"):
        points([kernel("CUDA", "d8b8", 2.5)], [], 1, 131072)
