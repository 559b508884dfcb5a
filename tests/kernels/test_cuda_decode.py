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
from antkv.cuda_decode import SHARED_MEMORY, Arguments, Shape, find_shape, make_arguments, plan, shared_bytes, source
from antkv.merge_splits import merge_splits
from builders import assert_near, quantized_past, random_codec, random_snapshot

from antkv_hf.attention.cuda_backend import CudaBackend
from antkv_hf.attention.tables import UnsupportedTables, layer_tables
from antkv_hf.evaluation.inspection import fastest_kernels
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
    library, shape, query, past, tail, *, scale, splits=1, blocks=1, softcap=None, is_causal=True, hides_padding=False
):
    """Output and LSE of the kernel on the CPU."""
    batch, q_heads, q_len, dim = query.shape
    heads, rows = tail[0].shape[1], q_heads // tail[0].shape[1] * q_len
    partial = torch.full((batch, heads, 2 * splits, rows, dim), float("nan"))
    state = torch.full((2, batch, heads, 2 * splits, rows), float("nan"))
    image = cuda_decode.find_image(shape, *tables(past))
    arguments = make_arguments(
        query, past, image, *tail, partial, state, scale=scale, softcap=softcap, is_causal=is_causal,
        hides_padding=hides_padding, splits=splits, blocks=blocks,
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
    assert library.shared_bytes() == shared_bytes(shape) <= SHARED_MEMORY
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
    assert library.shared_bytes() == shared_bytes(shape) <= shared_bytes(one)
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
    ahead = 16 // shape.row_groups // shape.teams - 1
    assert coded > (2 if group > 4 or dim == 64 else 1) * 16 * ahead * shape.span  # spans until it begins anew
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


def test_plan_gives_every_team_work():
    one = Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False)
    for batch, coded in ((1, 1), (1, 4096), (1, 131072), (5, 8192), (16, 131072), (33, 100), (128, 4096), (1000, 128)):
        shape, splits, blocks = plan(one, coded, batch, 8, 132)
        assert shape in (one, one.in_teams) and 1 <= splits <= 16 and 1 <= blocks <= min(16, batch * splits)
        assert shape.teams * blocks <= batch * splits
    assert plan(one, 131072, 1, 8, 132) == (one, 16, 16) and plan(one, 131072, 16, 8, 132) == (one, 1, 16)


def test_plan_makes_teams_of_batches():
    """What one sequence of a block waits for, others hide; a few sequences are shared by all warps."""
    one = Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False)
    assert one.in_teams.teams == 3 and one._replace(warps=8).in_teams.teams == 2
    for coded in (4096, 16384, 65536):
        assert all(plan(one, coded, batch, 8, 132)[0].teams == 1 for batch in (1, 4, 16))
        assert all(plan(one, coded, batch, 8, 132)[0].teams == 3 for batch in (48, 128, 785))


def test_both_kernels_are_compiled_before_a_step_is_planned(monkeypatch):
    """A CUDA graph that is being captured can wait for no compiler."""
    made = []
    monkeypatch.setattr(cuda_decode, "obstacle", lambda device: None)
    monkeypatch.setattr(cuda_decode, "load_kernel", lambda shape, index: made.append(shape))
    one = Shape(64, 2, 8, 1, 8, 1, 2, 8, 1, True, False)
    assert cuda_decode._compiles.__wrapped__(one, 0) and made == [one, one._replace(teams=2)]


def test_what_has_no_kernel_is_refused():
    past = quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 64), 1, 32, 3, torch.float16))
    with pytest.raises(ValueError, match="9 query rows a kv head; 1 to 8 have a kernel"):
        find_shape(*tables(past), 9, False)
    for spec in ("d8b8s4", "d2b8s2", "d4b6"):
        other = quantized_past(random_snapshot(random_codec(spec, "d8b8", 2, 64), 1, 32, 3, torch.float16))
        with pytest.raises(
            ValueError, match="have no CUDA kernel; 8 bits for 2, 4, 8, 16, 32 channels have, in up to 3"
        ):
            find_shape(*tables(other), 4, False)
    small = quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 32), 1, 32, 3, torch.float16))
    with pytest.raises(ValueError, match="head sizes 32 and 32"):
        find_shape(*tables(small), 4, False)
    for key, value in (("d4b8s3", "d32b8"), ("d8b8", "d4b8s3")):  # not by their bytes, which a later GPU may have
        large = layer_tables(random_codec(key, value, 2, 128), torch.float16)
        with pytest.raises(ValueError, match="3 stages at head size 128 have no CUDA kernel; up to 2 stages have"):
            find_shape(*large, 4, False, 1 << 20)


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


def test_tables_that_do_not_fit_are_refused_with_their_bytes(monkeypatch):
    """Two stages of keys and of values fit at a head size of 64, and not at 128; what a GPU has decides."""
    small, large = (layer_tables(random_codec("d8b8s2", "d8b8s2", 2, dim), torch.float16) for dim in (64, 128))
    assert shared_bytes(find_shape(*small, 4, False)) == 148192
    message = (
        "2 stages of keys and 2 of values at head size 128 take 296352 bytes of shared memory a block, of which there "
        f"are {SHARED_MEMORY}; fewer stages take less$"
    )
    with pytest.raises(ValueError, match=message):
        find_shape(*large, 4, False)
    with pytest.raises(ValueError, match="148192 bytes of shared memory a block, of which there are 101376"):
        find_shape(*small, 4, False, 101376)
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: 101376)
    with pytest.raises(
        UnsupportedTables, match="148704 bytes .*fewer stages take less; use backend='triton' or 'auto'"
    ):
        CudaBackend(random_codec("d8b8s2", "d8b8s2", 2, 64), torch.float16)
    with pytest.raises(
        UnsupportedTables, match="1 stage of keys and 1 of .* there are 101376; use backend='triton' or"
    ):
        CudaBackend(random_codec("d8b8", "d8b8", 2, 128), torch.float16)


def test_a_step_finds_its_kernel_once(monkeypatch):
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: SHARED_MEMORY)
    codec = random_codec("d8b8", "d8b8", 2, 64)
    past = quantized_past(random_snapshot(codec, 1, 32, 3, torch.float16))
    shape, asked = find_shape(*tables(past), 4, True), []
    monkeypatch.setattr(cuda_decode, "kernel_for", lambda *arguments: asked.append(arguments[2]) or shape)
    monkeypatch.setattr(cuda_decode, "decode_attention", lambda *arguments, **options: options)
    query = torch.randn(1, 8, 1, 64).half()
    monkeypatch.setattr("antkv_hf.attention.cuda_backend.MIN_TOKENS", 32)
    answer = CudaBackend(codec, torch.float16).decode_attention(query, past, None, None, softcap=20.0, scale=0.125)
    assert answer == dict(shape=shape, softcap=20.0, scale=0.125) and asked == [True]


def test_no_step_needs_more_memory_than_a_backend_asks_for():
    """`CudaBackend` asks once, for the most rows: no step may be refused after it."""
    for key, value, dim in (("d8b8", "d8b8", 64), ("d2b8", "d2b8", 128), ("d4b8s3", "d4b8s3", 64)):
        pair = layer_tables(random_codec(key, value, 2, dim), torch.float16)
        asked = find_shape(*pair, cuda_decode.MAX_ROWS, False)._replace(value_copies=1)
        for rows in range(1, cuda_decode.MAX_ROWS + 1):
            for softcap in (False, True):
                assert shared_bytes(find_shape(*pair, rows, softcap, shared_bytes(asked))) <= shared_bytes(asked)


def test_inspect_names_the_kernels_of_stages():
    assert fastest_kernels(random_codec("d4b8s3", "d4b8s3", 2, 64), 3) == ("cuda", 213728)
    assert fastest_kernels(random_codec("d4b8s3", "d4b8s3", 2, 64), 3, 166912) == ("triton", 213728)
    assert fastest_kernels(random_codec("d8b8s2", "d8b8s2", 2, 128), 4) == ("triton", None)


def test_the_table_of_bytes_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) / (\d) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == [(key, value) for key in "123" for value in "123"]
    for key, value, *said in rows:
        for dim, cell in zip((64, 128), said):
            stages = int(key), int(value)
            two, one = (Shape(dim, 1, 8, stages[0], 8, stages[1], n, 12, 1, True, False) for n in (2, 1))
            kib = [-(-shared_bytes(shape) // 1024) for shape in (two, one)]
            fits = [shared_bytes(shape) <= SHARED_MEMORY for shape in (two, one)]
            if not fits[1] or stages[1] == 2:
                assert cell == f"{kib[1]} KiB" + ("" if fits[1] else ": no room")
            else:
                assert cell == (f"{kib[0]} KiB, with one copy {kib[1]}" if fits[0] else f"{kib[1]} KiB, with one copy")


# A shape, and bytes of registers that ptxas may put into memory for it.
COMPILED = [
    ("sm_80", Shape(128, 1, 8, 1, 8, 1, 1, 12, 1, True, False), 24),
    ("sm_80", Shape(128, 1, 8, 1, 8, 1, 1, 12, 3, True, False), 40),
    ("sm_89", Shape(64, 1, 8, 1, 8, 1, 1, 12, 3, True, False), 0),
    ("sm_90", Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False), 24),
    ("sm_90", Shape(128, 1, 8, 1, 8, 1, 2, 12, 3, True, False), 24),
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
