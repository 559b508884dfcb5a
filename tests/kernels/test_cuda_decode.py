"""Decode attention in CUDA C++: run on the CPU by an emulator of a thread block, compiled for GPUs, run on one."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from antkv import cuda_decode
from antkv.cuda_decode import Arguments, Shape, find_shape, make_arguments, plan, shared_bytes, source
from antkv.merge_splits import merge_splits
from builders import assert_near, quantized_past, random_codec, random_snapshot

from antkv_hf.reference.attention import Visibility, attention

EMULATOR = Path(__file__).parent / "emulator"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator of CUDA needs g++")
# key, value, head_dim, query heads a kv head, q_len, batch, coded, tail, RoPE, softcap, anchors
CASES = [
    ("d8b8", "d8b8", 128, 4, 1, 1, 544, 17, "half", None, "int8"),
    ("d4b8", "d4b8", 128, 3, 1, 2, 160, 5, "interleaved", None, "float16"),
    ("d4b8", "d8b8", 128, 2, 4, 1, 416, 9, "scaled", 20.0, "int8"),
    ("d2b8", "d2b8", 128, 8, 1, 1, 168, 9, "half", None, "int8"),
    ("d2b8", "d4b8", 64, 3, 1, 2, 288, 5, "partial", None, "int8"),
    ("d16b8", "d16b8", 64, 7, 1, 1, 24, 1, "none", None, "float16"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A function that makes the shared library of a shape, once."""
    made: dict[Shape, ctypes.CDLL] = {}

    def make(shape: Shape) -> ctypes.CDLL:
        if shape not in made:
            library = tmp_path_factory.mktemp("emulator") / "decode.so"
            command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-w", f"-DSHAPE={shape}"]
            command += [f"-I{EMULATOR}", f"-I{cuda_decode.FOLDER}", str(EMULATOR / "decode.cpp"), "-o", str(library)]
            subprocess.run(command, check=True)
            made[shape] = ctypes.CDLL(str(library))
        return made[shape]

    return make


def tables(past):
    return past.key_tables, past.value_tables


def make_case(case, dtype, device="cpu", heads=2):
    key, value, dim, group, q_len, batch, coded, tail, rope, softcap, anchors = case
    codec = random_codec(key, value, heads, dim, None, rope, device)
    snapshot = random_snapshot(codec, batch, coded, tail, dtype, chunk=8, anchor_dtype=anchors)
    query = torch.randn(batch, q_len, heads * group, dim, device=device).to(dtype).transpose(1, 2)
    options = dict(scale=dim**-0.5, softcap=softcap)
    out, lse = attention(snapshot, query, Visibility(None, True, q_len, snapshot.length), options["scale"], softcap)
    return snapshot, query, options, out.flatten(1, 2), lse.flatten(1, 2)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_emulated_block_equals_the_reference(case, emulated):
    snapshot, query, options, expected, expected_lse = make_case(case, torch.float16)
    past = quantized_past(snapshot)
    batch, q_heads, q_len, dim = query.shape
    rows, splits = q_heads // 2 * q_len, 2
    shape = find_shape(*tables(past), rows, options["softcap"] is not None)
    library = emulated(shape)
    assert library.arguments_bytes() == ctypes.sizeof(Arguments)
    assert library.shared_bytes() == shared_bytes(shape) <= 232448
    partial = torch.full((batch, 2, 2 * splits, rows, dim), float("nan"))
    state = torch.full((2, batch, 2, 2 * splits, rows), float("nan"))
    arguments = make_arguments(
        shape, query, past, snapshot.tail_keys, snapshot.tail_values, partial, state, **options, is_causal=True,
        hides_padding=False, splits=splits, blocks=1,
    )  # fmt: skip
    library.run(ctypes.byref(arguments))
    least, wavefronts = ctypes.c_long(), ctypes.c_long()
    library.counters(ctypes.byref(least), ctypes.byref(wavefronts))
    assert least.value == wavefronts.value > 0  # no gather meets a bank conflict
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:3])
    merge_splits(partial, state, past.value_tables, None, out, lse, query, past.key_tables, options["scale"])
    assert_near(out, expected, 2e-3)
    assert_near(lse, expected_lse, 2e-3)


@needs_compiler
def test_sinks_alone_in_bfloat16(emulated):
    """The only set of exact tokens stands where anchors do, in the model's dtype."""
    snapshot = random_snapshot(random_codec("d8b8", "d8b8", 2, 64), 1, 96, 7, torch.bfloat16, fraction=0.0)
    query, past = torch.randn(1, 8, 1, 64).bfloat16(), quantized_past(snapshot)
    expected, _ = attention(snapshot, query, Visibility(None, False, 1, snapshot.length), 0.125)
    shape = find_shape(*tables(past), 4, False)
    partial, state = torch.full((1, 2, 2, 4, 64), float("nan")), torch.full((2, 1, 2, 2, 4), float("nan"))
    arguments = make_arguments(
        shape, query, past, snapshot.tail_keys, snapshot.tail_values, partial, state, scale=0.125, softcap=None,
        is_causal=False, hides_padding=False, splits=1, blocks=1,
    )  # fmt: skip
    emulated(shape).run(ctypes.byref(arguments))
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:3])
    merge_splits(partial, state, past.value_tables, None, out, lse, query, past.key_tables, 0.125)
    assert_near(out, expected.flatten(1, 2), 2e-3)


@needs_compiler
def test_lengths_on_the_device_and_hidden_padding(emulated):
    """Buffers larger than what they hold, with lengths read from memory, and padding hidden by `offset`."""
    case = ("d8b8", "d8b8", 64, 4, 1, 2, 96, 7, "half", None, "int8")
    codec = random_codec("d8b8", "d8b8", 2, 64)
    snapshot = random_snapshot(codec, 2, 96, 7, torch.float16, chunk=16, offset=(0, 21))
    query = torch.randn(2, 8, 1, 64).half()
    columns = torch.arange(snapshot.length)
    mask = (columns >= torch.tensor([0, 21]).view(2, 1, 1, 1)).expand(2, 1, 1, -1)
    expected, _ = attention(snapshot, query, Visibility(mask, False, 1, snapshot.length), case[2] ** -0.5)
    past = quantized_past(snapshot)
    shape = find_shape(*tables(past), 4, False)
    partial, state = torch.full((2, 2, 2, 4, 64), float("nan")), torch.full((2, 2, 2, 2, 4), float("nan"))

    def grown(x: torch.Tensor, extra: int) -> torch.Tensor:
        return torch.cat([x, torch.full_like(x[:, :, :1], 77).expand(-1, -1, extra, *x.shape[3:])], 2).contiguous()

    anchors = sum(tokens.positions.shape[2] for tokens in past.exact if tokens.key_scale is not None)
    roomy = past._replace(
        key_codes=grown(past.key_codes, 32), value_codes=grown(past.value_codes, 32),
        exact_bits=grown(past.exact_bits, 4), coded=96, lengths=torch.tensor([96, 7, anchors], dtype=torch.int32),
    )  # fmt: skip
    tail = [grown(x, 9) for x in (snapshot.tail_keys, snapshot.tail_values)]
    arguments = make_arguments(
        shape, query, roomy, *tail, partial, state, scale=case[2] ** -0.5, softcap=None, is_causal=False,
        hides_padding=True, splits=1, blocks=1,
    )  # fmt: skip
    emulated(shape).run(ctypes.byref(arguments))
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:3])
    merge_splits(partial, state, past.value_tables, None, out, lse, query, past.key_tables, case[2] ** -0.5)
    assert_near(out, expected.flatten(1, 2), 2e-3)


def test_plan_gives_every_block_work():
    shape = Shape(128, 1, 8, 8, 16, True, False)
    for batch, coded in ((1, 1), (1, 4096), (1, 131072), (5, 8192), (16, 131072), (128, 4096), (1000, 128)):
        splits, blocks = plan(shape, coded, batch, 8, 132)
        assert 1 <= splits <= 16 and 1 <= blocks <= min(16, batch * splits)
    assert plan(shape, 131072, 1, 8, 132) == (16, 16) and plan(shape, 131072, 16, 8, 132) == (1, 16)


def test_what_has_no_kernel_is_refused():
    past = quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 64), 1, 32, 3, torch.float16))
    with pytest.raises(ValueError, match="9 query rows a kv head; 1 to 8 have a kernel"):
        find_shape(*tables(past), 9, False)
    for spec in ("d8b8s2", "d32b8", "d4b6"):
        other = quantized_past(random_snapshot(random_codec(spec, "d8b8", 2, 64), 1, 32, 3, torch.float16))
        with pytest.raises(ValueError, match="have no CUDA kernel; one code of 8 bits for 2, 4, 8, 16 channels has"):
            find_shape(*tables(other), 4, False)
    small = quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 32), 1, 32, 3, torch.float16))
    with pytest.raises(ValueError, match="head sizes 32 and 32"):
        find_shape(*tables(small), 4, False)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_without_a_gpu(architecture):
    core = pytest.importorskip("cuda.core", reason="NVRTC comes with antkv-hf[cuda13]")
    options = core.ProgramOptions(arch=architecture, std="c++17")
    shape = Shape(128, 1, 4, 8, 16, True, False)
    assert core.Program(source(shape), "c++", options).compile("cubin").code


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_on_a_gpu(case, dtype):
    obstacle = cuda_decode.obstacle(torch.device("cuda"))
    if obstacle:
        pytest.skip(obstacle)
    if dtype == torch.bfloat16 and case[10] == "float16":
        pytest.skip("float16 anchors of a bfloat16 model have Triton's kernel only")
    case = (*case[:6], case[6] * 9, *case[7:])
    snapshot, query, options, expected, expected_lse = make_case(case, dtype, "cuda")
    out, lse = cuda_decode.decode_attention(
        query, quantized_past(snapshot), snapshot.tail_keys, snapshot.tail_values, **options
    )
    assert_near(out, expected, 1e-2 if dtype == torch.bfloat16 else 3e-3)
    assert_near(lse, expected_lse, 3e-3)
