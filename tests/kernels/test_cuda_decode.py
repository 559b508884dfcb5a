"""Decode attention in CUDA C++: run on the CPU by an emulator of a thread block, compiled for GPUs, run on one."""

import ctypes
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from antkv import cuda_decode
from antkv.cuda_decode import Arguments, make_arguments, source
from antkv.cuda_shape import SHARED_MEMORY, Shape, find_shape, shared_bytes
from antkv.merge_splits import merge_splits
from builders import assert_near, quantized_past, random_codec, random_snapshot

from antkv_hf.attention.cuda_backend import CudaBackend
from antkv_hf.attention.tables import UnsupportedTables
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
    ("d32b8", "d32b8", 64, 4, 1, 1, 216, 3, "half", None, "int8"),
    ("d32b8", "d32b8", 128, 3, 2, 1, 152, 7, "interleaved", None, "int8"),
    ("d16b8s2", "d32b8", 64, 1, 3, 2, 136, 5, "half", None, "float16"),
    ("d8b8s2", "d8b8s2", 64, 3, 1, 2, 168, 5, "half", None, "int8"),
    ("d4b8s2", "d4b8s2", 64, 4, 2, 1, 136, 9, "scaled", None, "int8"),
    ("d4b8s3", "d4b8s3", 64, 3, 1, 1, 216, 3, "interleaved", None, "int8"),
    ("d8b8s3", "d16b8s3", 64, 4, 1, 1, 136, 3, "partial", 20.0, "int8"),
    ("d16b8s3", "d32b8s3", 64, 3, 1, 1, 24, 1, "none", None, "int8"),
    ("d4b8s3", "d4b8s3", 64, 7, 1, 1, 152, 5, "half", None, "int8"),
    ("d4b8s2", "d8b8", 128, 3, 1, 1, 152, 3, "interleaved", None, "int8"),
    ("d8b8", "d8b8s2", 128, 3, 1, 1, 216, 5, "half", None, "float16"),
    ("d32b8", "d4b8s2", 128, 1, 7, 1, 136, 9, "half", None, "int8"),
    # two tiles together: more than four rows, and a softcap
    ("d32b8", "d32b8", 128, 3, 2, 1, 1304, 7, "interleaved", None, "int8"),
    ("d4b8s2", "d4b8s2", 64, 4, 2, 1, 1304, 9, "scaled", 20.0, "int8"),
]
# Of blocks in teams, with splits and blocks a head: more and fewer shares than teams, several turns of queries ahead.
IN_TEAMS = [
    (("d8b8", "d8b8", 128, 4, 1, 2, 872, 17, "half", None, "int8"), 2, 1),
    (("d8b8", "d8b8", 64, 3, 1, 5, 168, 5, "partial", None, "int8"), 3, 2),
    (("d2b8", "d2b8", 128, 3, 1, 1, 136, 9, "interleaved", None, "int8"), 3, 1),
    (("d4b8", "d16b8", 128, 2, 4, 3, 200, 3, "scaled", 20.0, "float16"), 1, 1),
    (("d4b8s3", "d8b8s3", 64, 4, 1, 2, 152, 5, "half", None, "int8"), 2, 3),
    (("d8b8", "d8b8", 64, 4, 1, 1, 744, 5, "half", None, "int8"), 1, 1),  # more spans than queries are turned for
]
# Those whose tables fit only without a second copy of the last stage of values.
ONE_COPY = [("d4b8s3", "d4b8s3", 64), ("d8b8s3", "d16b8s3", 64), ("d16b8s3", "d32b8s3", 64), ("d4b8s2", "d8b8", 128)]
# Of these kernels the emulator runs near relatives.
GPU_CASES = [
    ("d32b8s3", "d8b8s3", 64, 1, 5, 1, 136, 9, "half", None, "int8"),
    ("d4b8s2", "d4b8s3", 64, 3, 1, 2, 216, 5, "half", None, "int8"),
    ("d8b8s2", "d4b8", 128, 4, 2, 1, 136, 3, "interleaved", None, "int8"),
    ("d16b8s2", "d16b8", 128, 4, 1, 2, 216, 9, "half", None, "int8"),
    ("d8b8", "d4b8s2", 128, 4, 1, 1, 216, 9, "scaled", 20.0, "int8"),
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


def emulate(
    library, shape, query, past, tail, *, scale, splits=1, blocks=1, softcap=None, is_causal=True, hides_padding=False,
    tail_logits=None,
):  # fmt: skip
    """Output and LSE of the kernel on the CPU."""
    batch, q_heads, q_len, dim = query.shape
    heads, rows = tail[0].shape[1], q_heads // tail[0].shape[1] * q_len
    partial = torch.full((batch, heads, 2 * splits, rows, dim), float("nan"))
    state = torch.full((2, batch, heads, 2 * splits, rows), float("nan"))
    image = cuda_decode.find_image(shape, *tables(past))
    arguments = make_arguments(
        query, past, image, *tail, partial, state, scale=scale, softcap=softcap, is_causal=is_causal,
        hides_padding=hides_padding, splits=splits, blocks=blocks, tail_logits=tail_logits,
    )  # fmt: skip
    library.run(ctypes.byref(arguments))
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:3])
    merge_splits(partial, state, past.value_tables, None, out, lse, query, past.key_tables, scale)
    return out, lse


def gathers(library):
    """Wavefronts that the gathers of the last run take at least, and that they took: more are bank conflicts."""
    least, wavefronts = ctypes.c_long(), ctypes.c_long()
    library.counters(ctypes.byref(least), ctypes.byref(wavefronts))
    return least.value, wavefronts.value


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_emulated_block_equals_the_reference(case, emulated):
    snapshot, query, options, expected, expected_lse = make_case(case, torch.float16)
    past = quantized_past(snapshot)
    rows = query.shape[1] // 2 * query.shape[2]
    shape = find_shape(*tables(past), rows, options["softcap"] is not None)
    library = emulated(shape)
    assert library.arguments_bytes() == ctypes.sizeof(Arguments)
    assert library.shared_bytes() == shared_bytes(shape) <= SHARED_MEMORY and library.tiles() == shape.tiles
    tail = snapshot.tail_keys, snapshot.tail_values
    out, lse = emulate(library, shape, query, past, tail, splits=2, **options)
    least, wavefronts = gathers(library)
    if case[:3] in ONE_COPY:  # two lanes share a column there
        assert shape.value_copies == 1 and 0 < least < wavefronts < 1.5 * least
    else:  # no gather meets a bank conflict
        assert least == wavefronts > 0
    assert_near(out, expected, 2e-3)
    assert_near(lse, expected_lse, 2e-3)


@needs_compiler
@pytest.mark.parametrize("case, splits, blocks", IN_TEAMS)
def test_teams_of_a_block_take_shares_of_their_own(case, splits, blocks, emulated):
    snapshot, query, options, expected, expected_lse = make_case(case, torch.float16)
    past, tail = quantized_past(snapshot), (snapshot.tail_keys, snapshot.tail_values)
    one = find_shape(*tables(past), query.shape[1] // 2 * query.shape[2], options["softcap"] is not None)
    shape = one.in_teams
    assert one.teams == 1 and shape.teams == one.warps // 4 > 1 and shape.span == 64
    library = emulated(shape)
    assert library.shared_bytes() == shared_bytes(shape) <= shared_bytes(one) and library.tiles() == shape.tiles
    out, lse = emulate(library, shape, query, past, tail, splits=splits, blocks=blocks, **options)
    assert_near(out, expected, 2e-3)
    assert_near(lse, expected_lse, 2e-3)


@needs_compiler
@pytest.mark.parametrize("dim, group, coded", [(64, 3, 9416), (128, 4, 4808), (128, 7, 7208)])
def test_a_team_turns_its_query_on_and_begins_anew(dim, group, coded, emulated):
    """Past several beginnings: peaked logits, so that single tokens of every span would show."""
    torch.manual_seed(dim + group)
    case = ("d8b8", "d8b8", dim, group, 1, 1, coded, 3, "half", None, "int8")
    snapshot, query, options, _, _ = make_case(case, torch.float16)
    query, past = 4 * query, quantized_past(snapshot)
    visible = Visibility(None, True, 1, snapshot.length)
    expected, expected_lse = (x.flatten(1, 2) for x in attention(snapshot, query, visible, options["scale"], None))
    shape, tail = find_shape(*tables(past), group, False).in_teams, (snapshot.tail_keys, snapshot.tail_values)
    assert coded > (2 if group > 4 or dim == 64 else 1) * 16 * shape.ahead * shape.span  # spans until it begins anew
    out, lse = emulate(emulated(shape), shape, query, past, tail, **options)
    assert_near(out, expected, 4e-3)
    assert_near(lse, expected_lse, 4e-3)


@needs_compiler
@pytest.mark.parametrize("key, value", [("d8b8", "d8b8"), ("d8b8s2", "d32b8")])
def test_sinks_alone_in_bfloat16(key, value, emulated):
    """The only set of exact tokens stands where anchors do, in the model's dtype."""
    snapshot = random_snapshot(random_codec(key, value, 2, 64), 1, 96, 7, torch.bfloat16, fraction=0.0)
    query, past = torch.randn(1, 8, 1, 64).bfloat16(), quantized_past(snapshot)
    expected, _ = attention(snapshot, query, Visibility(None, False, 1, snapshot.length), 0.125)
    one, tail = find_shape(*tables(past), 4, False), (snapshot.tail_keys, snapshot.tail_values)
    for shape in (one, one.in_teams):
        out, _ = emulate(emulated(shape), shape, query, past, tail, scale=0.125, is_causal=False)
        assert_near(out, expected.flatten(1, 2), 2e-3)


@needs_compiler
def test_a_gpu_with_less_shared_memory_gets_one_copy(emulated):
    case = ("d8b8", "d2b8", 64, 3, 1, 1, 136, 5, "half", None, "int8")
    snapshot, query, options, expected, _ = make_case(case, torch.float16)
    past, tail = quantized_past(snapshot), (snapshot.tail_keys, snapshot.tail_values)
    shape = find_shape(*tables(past), 3, False, 101376)
    assert shape.value_copies == 1 and find_shape(*tables(past), 3, False).value_copies == 2
    out, _ = emulate(emulated(shape), shape, query, past, tail, **options)
    assert_near(out, expected, 2e-3)
    least, wavefronts = gathers(emulated(shape))
    assert least < wavefronts <= 2 * least  # values only, and two lanes at most


LENGTHS = [("d8b8", "d8b8"), ("d4b8s3", "d4b8s3"), ("d32b8s3", "d8b8s3")]


def padded_case(key, value, device="cpu"):
    """Buffers larger than what they hold, with lengths read from memory, and padding hidden by `offset`."""
    codec = random_codec(key, value, 2, 64, device=device)
    snapshot = random_snapshot(codec, 2, 96, 7, torch.float16, chunk=16, offset=(0, 21))
    query = torch.randn(2, 8, 1, 64, device=device).half()
    columns, offset = torch.arange(snapshot.length, device=device), torch.tensor([0, 21], device=device)
    mask = (columns >= offset.view(2, 1, 1, 1)).expand(2, 1, 1, -1)
    expected, _ = attention(snapshot, query, Visibility(mask, False, 1, snapshot.length), 0.125)
    past = quantized_past(snapshot)

    def grown(x: torch.Tensor, extra: int) -> torch.Tensor:
        return torch.cat([x, torch.full_like(x[:, :, :1], 77).expand(-1, -1, extra, *x.shape[3:])], 2).contiguous()

    anchors = sum(tokens.positions.shape[2] for tokens in past.exact if tokens.key_scale is not None)
    lengths = torch.tensor([96, 7, anchors], dtype=torch.int32, device=device)
    roomy = past._replace(
        key_codes=grown(past.key_codes, 32), value_codes=grown(past.value_codes, 32),
        exact_bits=grown(past.exact_bits, 4), coded=96, lengths=lengths,
    )  # fmt: skip
    return query, roomy, [grown(x, 9) for x in (snapshot.tail_keys, snapshot.tail_values)], expected.flatten(1, 2)


@needs_compiler
@pytest.mark.parametrize("key, value", LENGTHS)
def test_lengths_on_the_device_and_hidden_padding(key, value, emulated):
    query, past, tail, expected = padded_case(key, value)
    shape = find_shape(*tables(past), 4, False)
    options = dict(scale=0.125, is_causal=False, hides_padding=True)
    out, _ = emulate(emulated(shape), shape, query, past, tail, **options)
    assert_near(out, expected, 2e-3)
    if key == "d8b8":
        out, _ = emulate(emulated(shape.in_teams), shape.in_teams, query, past, tail, splits=3, blocks=2, **options)
        assert_near(out, expected, 2e-3)


@needs_compiler
def test_nothing_is_coded_yet(emulated):
    """A step that was planned for more tokens than there are: only the tail counts."""
    query, past, tail, _ = padded_case("d8b8", "d8b8")
    past = past._replace(lengths=torch.tensor([0, 7, 0], dtype=torch.int32), offset=torch.zeros(2, dtype=torch.int64))
    past = past._replace(exact=tuple(tokens for tokens in past.exact if tokens.key_scale is not None))
    keys, values = (x[:, :, :7].float().repeat_interleave(4, 1) for x in tail)
    expected = torch.softmax(query.float() @ keys.mT * 0.125, -1) @ values
    one = find_shape(*tables(past), 4, False)
    for shape in (one, one.in_teams):
        out, _ = emulate(emulated(shape), shape, query, past, tail, scale=0.125, splits=2)
        assert_near(out, expected, 2e-3)


def test_both_kernels_are_compiled_before_a_step_is_planned(monkeypatch):
    """A CUDA graph that is being captured can wait for no compiler."""
    made = []
    monkeypatch.setattr(cuda_decode, "obstacle", lambda device: None)
    monkeypatch.setattr(cuda_decode, "load_kernel", lambda shape, index: made.append(shape))
    one = Shape(64, 2, 8, 1, 8, 1, 2, 8, 1, True, False)
    assert cuda_decode._compiles.__wrapped__(one, 0) and made == [one, one._replace(teams=2)]


@needs_compiler
@pytest.mark.parametrize("stages", [(3, 1), (1, 3)])
def test_three_stages_of_large_heads_do_not_compile(stages):
    """Their windows would be read from the wrong places."""
    shape = Shape(128, 1, 4, stages[0], 4, stages[1], 1, 12, 1, True, False)
    command = ["g++", "-fsyntax-only", "-std=c++17", "-w", f"-DSHAPE={shape}", f"-I{EMULATOR}"]
    command += [f"-I{cuda_decode.FOLDER}", str(EMULATOR / "decode.cpp")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode and "more codes a lane than are read in order" in result.stderr


def test_a_float32_model_is_refused_before_a_gpu_is_asked():
    """On a machine without CUDA the answer is about the model, no error of torch.cuda."""
    with pytest.raises(UnsupportedTables, match="a torch.float32 model has no CUDA kernel.*; use backend='triton'"):
        CudaBackend(random_codec("d8b8", "d8b8", 2, 64), torch.float32)


def test_a_step_finds_its_kernel_once(monkeypatch):
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: SHARED_MEMORY)
    codec = random_codec("d8b8", "d8b8", 2, 64)
    past = quantized_past(random_snapshot(codec, 1, 32, 3, torch.float16))
    shape, asked = find_shape(*tables(past), 4, True), []
    monkeypatch.setattr(cuda_decode, "kernel_for", lambda *arguments: asked.append(arguments[2]) or shape)
    monkeypatch.setattr(cuda_decode, "decode_attention", lambda *arguments, **options: (options, "lse"))
    query = torch.randn(1, 8, 1, 64).half()
    monkeypatch.setattr("antkv_hf.attention.cuda_backend.MIN_TOKENS", 32)
    answer = CudaBackend(codec, torch.float16).decode_attention(query, past, None, None, softcap=20.0, scale=0.125)
    assert answer == (dict(shape=shape, tail_logits=None, softcap=20.0, scale=0.125), "lse") and asked == [True]


# A shape, and bytes of registers that ptxas may put into memory for it.
COMPILED = [
    ("sm_80", Shape(128, 1, 8, 1, 8, 1, 1, 12, 1, True, False), 24),
    ("sm_80", Shape(128, 1, 8, 1, 8, 1, 1, 12, 3, True, False), 40),
    ("sm_89", Shape(64, 1, 8, 1, 8, 1, 1, 12, 3, True, False), 0),
    ("sm_90", Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False), 0),
    ("sm_90", Shape(128, 1, 8, 1, 8, 1, 2, 12, 3, True, False), 8),
    ("sm_90", Shape(128, 1, 8, 1, 8, 1, 2, 12, 3, True, True), 40),
    ("sm_90", Shape(64, 1, 8, 1, 8, 1, 2, 12, 3, True, False), 0),
    ("sm_90", Shape(64, 1, 8, 1, 8, 1, 2, 12, 3, True, True), 0),
    ("sm_90", Shape(128, 2, 8, 1, 8, 1, 2, 8, 1, True, False), 0),
    ("sm_90", Shape(128, 2, 8, 1, 8, 1, 2, 8, 2, True, False), 0),
    ("sm_90", Shape(128, 1, 8, 2, 8, 1, 1, 12, 1, True, False), 24),
    ("sm_90", Shape(64, 1, 4, 3, 4, 3, 1, 12, 1, True, False), 0),
]


@pytest.mark.parametrize("architecture, shape, most", COMPILED, ids=str)
def test_compiles_without_a_gpu(architecture, shape, most):
    core = pytest.importorskip("cuda.core", reason="NVRTC comes with antkv-hf[cuda13]")
    options, log = core.ProgramOptions(arch=architecture, std="c++17", ptxas_options="-v"), io.StringIO()
    assert core.Program(source(shape), "c++", options).compile("cubin", logs=log).code
    frame = int(re.search(r"(\d+) bytes stack frame", log.getvalue())[1])
    assert frame <= most


@pytest.fixture
def gpu():
    obstacle = cuda_decode.obstacle(torch.device("cuda"))
    if obstacle:
        pytest.skip(obstacle)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES + GPU_CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_on_a_gpu(case, dtype, gpu):
    if dtype == torch.bfloat16 and case[10] == "float16":
        pytest.skip("float16 anchors of a bfloat16 model have Triton's kernel only")
    case = (*case[:6], case[6] * 9, *case[7:])
    snapshot, query, options, expected, expected_lse = make_case(case, dtype, "cuda")
    out, lse = cuda_decode.decode_attention(
        query, quantized_past(snapshot), snapshot.tail_keys, snapshot.tail_values, **options
    )
    assert_near(out, expected, 1e-2 if dtype == torch.bfloat16 else 3e-3)
    assert_near(lse, expected_lse, 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case, splits, blocks", IN_TEAMS)
def test_teams_on_a_gpu(case, splits, blocks, gpu, monkeypatch):
    """Also what `plan` would give to whole blocks."""
    monkeypatch.setattr(cuda_decode, "plan", lambda shape, *sizes: (shape.in_teams, splits, blocks))
    case = (*case[:6], case[6] * 9, *case[7:])
    snapshot, query, options, expected, expected_lse = make_case(case, torch.float16, "cuda")
    past, tail = quantized_past(snapshot), (snapshot.tail_keys, snapshot.tail_values)
    out, lse = cuda_decode.decode_attention(query, past, *tail, **options)
    assert_near(out, expected, 3e-3)
    assert_near(lse, expected_lse, 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("key, value", LENGTHS)
def test_lengths_on_a_gpu(key, value, gpu):
    query, past, tail, expected = padded_case(key, value, "cuda")
    out, _ = cuda_decode.decode_attention(query, past, *tail, scale=0.125, is_causal=False)
    assert_near(out, expected, 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dim, memory", [(64, 101376), (128, 166912)])
def test_one_copy_on_a_gpu(dim, memory, gpu, monkeypatch):
    """What a GPU with less shared memory would run."""
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: memory)
    case = ("d8b8", "d4b8", dim, 4, 1, 2, 4896, 5, "half", None, "int8")
    snapshot, query, options, expected, _ = make_case(case, torch.float16, "cuda")
    past, tail = quantized_past(snapshot), (snapshot.tail_keys, snapshot.tail_values)
    assert find_shape(*tables(past), 4, False, memory).value_copies == 1
    out, _ = cuda_decode.decode_attention(query, past, *tail, **options)
    assert_near(out, expected, 3e-3)
