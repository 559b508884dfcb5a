"""Decode steps over preallocated buffers: kernels read lengths on the device, and a recorded step can be replayed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from antkv import cuda_decode
from antkv.decode_attention import decode_attention
from antkv.static_step import add_column_statistic, add_query_moment, append_token
from builders import assert_near, quantized_past, random_codec, random_snapshot, rotary_of
from conftest import tiny_llama
from helpers import pair_tables, random_tables
from recorded_graph import RecordedGraph
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, antkv_generate, graphs
from antkv_hf.anchors import get_score
from antkv_hf.attention import beside, cuda_backend
from antkv_hf.attention.attend import attend
from antkv_hf.attention.backends import CALLS, make_backend
from antkv_hf.attention.reference_backend import REFERENCE
from antkv_hf.codebook import describe_model
from antkv_hf.config import AnchorConfig
from antkv_hf.static_storage import Counts, StaticStorage
from antkv_hf.storage import LayerStorage

CPU = torch.device("cpu")


def larger(x: torch.Tensor, rows: int, fill: float) -> torch.Tensor:
    """`x` in a buffer of `rows` along dimension 2; the rest must not be read."""
    out = x.new_full((*x.shape[:2], rows, *x.shape[3:]), fill)
    out[:, :, : x.shape[2]] = x
    return out


CASES = [(96, 40, (0, 13), "int8"), (96, 1, (95, 0), "float16"), (32, 7, (35, 3), "int8")]


@pytest.mark.parametrize("coded, tail, offset, anchor_dtype", CASES)
def test_decode_attention_reads_lengths_on_the_device(coded, tail, offset, anchor_dtype):
    """Larger buffers, lengths in a tensor and padding by offset equal exact buffers and a mask."""
    codec = random_codec("d8b8", "d8b8", 1, 32)
    snapshot = random_snapshot(codec, 2, coded, tail, anchor_dtype=anchor_dtype, offset=offset)
    past = quantized_past(snapshot)
    query = torch.randn(2, 2, 1, 32)
    expected = decode_attention(
        query, past, snapshot.tail_keys, snapshot.tail_values, scale=0.2, mask=snapshot.unpadded()
    )  # fmt: skip
    sinks, anchors = past.exact
    slots = anchors.positions.shape[2]
    anchors = type(anchors)(*(None if t is None else larger(t, slots + 9, -1) for t in anchors))
    static = past._replace(
        key_codes=larger(past.key_codes, 160, 255), value_codes=larger(past.value_codes, 160, 255),
        exact=(sinks, anchors), exact_bits=larger(past.exact_bits, 20, 255), coded=0,
        lengths=torch.tensor([coded, tail, slots], dtype=torch.int32),
    )  # fmt: skip
    tails = [larger(t, 64, float("nan")) for t in (snapshot.tail_keys, snapshot.tail_values)]
    for found, wanted in zip(decode_attention(query, static, *tails, scale=0.2), expected):
        assert_near(found, wanted, 1e-5)
    nothing = static._replace(
        lengths=torch.tensor([0, tail, 0], dtype=torch.int32), offset=torch.zeros_like(past.offset)
    )
    nothing = nothing._replace(exact=(sinks._replace(positions=torch.full_like(sinks.positions, -1)), anchors))
    out, _ = decode_attention(query, nothing, *tails, scale=0.2)
    keys, values = (t.repeat_interleave(2, 1) for t in (snapshot.tail_keys, snapshot.tail_values))
    assert_near(out, torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.2), 1e-5)


PROMPT, STEPS = 30, 6


def life(static: bool, graph: RecordedGraph | None = None) -> tuple[torch.Tensor, LayerStorage]:
    """A padded prompt and single tokens: outputs, and what is stored in the end."""
    config = AnTKVConfig(anchors=AnchorConfig(fraction=0.1, query_stride=4), window=8, chunk=8)
    codec, padding = random_codec("d8b8", "d8b8", 1, 32), torch.tensor([[11]])
    backend, score = make_backend("triton", codec, CPU, torch.float32), get_score("error_aware")
    g = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(1, 1, PROMPT + STEPS, 32, generator=g) for _ in range(2))
    queries = torch.randn(1, PROMPT + STEPS, 2, 32, generator=g).transpose(1, 2)
    start = codec, config, score, keys, values, REFERENCE
    storage = StaticStorage(*start, max_length=120) if static else LayerStorage(*start)
    now = [x[:, :, :1].clone() for x in (queries, keys, values)]

    def step() -> torch.Tensor:
        storage.append(*now[1:])
        snapshot = storage.snapshot()
        mask = None if static else (torch.arange(snapshot.length) >= padding)[:, None, None]
        return attend(snapshot, now[0], mask, backend=storage.backend, observer=storage)

    columns = torch.arange(PROMPT)
    mask = (columns <= columns[:, None]) & (columns >= padding)
    storage.append(keys[:, :, :PROMPT], values[:, :, :PROMPT])
    prompt = queries[:, :, :PROMPT], mask[None, None]
    attend(storage.snapshot(), *prompt, backend=REFERENCE, observer=storage, commit=True)
    storage.backend = backend
    run, outputs = (step if graph is None else graphs._Replayed(step, graph)), []
    for i in range(PROMPT, PROMPT + STEPS):
        storage.commit()
        for buffer, x in zip(now, (queries, keys, values)):
            buffer.copy_(x[:, :, i : i + 1])
        after = storage.counts._replace(tail=storage.counts.tail + 1) if static else None
        outputs.append(run().clone())
        if static:
            storage.count(after)
    storage.commit()
    return torch.cat(outputs, 2), storage


def test_a_recorded_step_lives_through_chunks():
    """Replays of one step, with a chunk encoded between them, equal a storage that grows and a mask."""
    expected, grown = life(False)
    graph = RecordedGraph()
    out, static = life(True, graph)
    assert_near(out, expected, 1e-5)
    assert static.coded_length == grown.coded_length == 24 and static.buffers.lengths.tolist() == [24, 12, 3]
    for name in ("key_codes", "value_codes", "exact_bits", "tail_keys", "tail_values", "offset"):
        assert torch.equal(getattr(static, name), getattr(grown, name)), name
    assert torch.equal(static.anchors.positions, grown.anchors.positions)
    assert_near(static.statistic, grown.statistic, 1e-5)
    assert_near(static.query_moment, grown.query_moment, 1e-6)
    # All that a step launches for a layer: these four; the rest are views and allocations.
    assert [name for name in graph.names if name.endswith("_kernel")] == [
        "append_token_kernel", "decode_kernel", "merge_splits_kernel", "column_statistic_kernel"
    ]  # fmt: skip
    free = {"empty", "view", "slice", "select", "alias", "detach", "_to_copy"}
    assert [name for name in graph.names if not name.endswith("_kernel") and name not in free] == []


def check_append(batch: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """New keys and values of any strides go behind the tail, which is one longer, and nowhere else."""
    rows, tail = 10, 7
    new = [torch.randn(batch, 1, heads, d, device=device).to(dtype).transpose(1, 2) for d in dims]
    buffers = [torch.randn(batch, heads, rows, d, device=device).to(dtype) for d in dims]
    expected = [buffer.clone() for buffer in buffers]
    lengths = torch.tensor([5, tail, 3], dtype=torch.int32, device=device)
    for step in range(2):
        for wanted, x in zip(expected, new):
            wanted[:, :, tail + step] = x[:, :, 0]
        append_token(*new, *buffers, lengths)
        assert all(torch.equal(a, b) for a, b in zip(buffers, expected))
        assert lengths.tolist() == [5, tail + step + 1, 3]


APPENDS = [(1, 1, (32, 32)), (3, 5, (24, 40)), (8, 8, (16, 16)), (5, 13, (16, 32))]  # the last takes many programs


@pytest.mark.parametrize("batch, heads, dims", APPENDS)
def test_append_token(batch, heads, dims):
    check_append(batch, heads, dims, torch.float16)


def check_moment(group: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """The moment that the statistic's kernel adds is that of its own kernel; the statistic stays what it is."""
    batch, heads, rows = 2, 3, 40
    g = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 1, heads * group, dim, generator=g).to(device, dtype).transpose(1, 2)
    tails = [torch.randn(batch, heads, rows, dim, generator=g).to(device, dtype) for _ in range(2)]
    lse = torch.randn(batch, heads * group, 1, generator=g).to(device)
    offset = torch.tensor([0, 100], device=device)
    lengths = torch.tensor([96, 29, 0], dtype=torch.int32, device=device)
    found = []
    for together in (False, True):
        statistic = torch.ones(batch, heads, rows, device=device)
        moment = torch.full((batch, heads, 2), 3.0, device=device)
        for _ in range(2):
            if not together:
                add_query_moment(query, 0.3, moment)
            add_column_statistic(
                "squared_attention", query, *tails, query, lse, statistic, lengths, offset, scale=0.3, stride=4,
                moment=moment if together else None,
            )  # fmt: skip
        found.append((statistic, moment))
    assert torch.equal(found[0][0], found[1][0])
    assert_near(found[1][1], found[0][1], 1e-6)
    squares = query.float().square().sum(-1).unflatten(1, (heads, group)).sum((2, 3)) * 0.3**2 / dim
    wanted = 3 + 2 * torch.stack([squares, torch.full_like(squares, group)], -1)
    assert_near(found[1][1], wanted, 1e-5)


MOMENTS = [(1, 32), (4, 64), (3, 24), (64, 128)]  # query heads a group, head size; the last has a launch of its own


@pytest.mark.parametrize("group, dim", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_moment_with_the_statistic(group, dim, dtype):
    check_moment(group, dim, dtype)


def test_encoding_is_replayed_too():
    """A recorded `encode_chunk` encodes other chunks at other places."""
    codec = random_codec("d8b8", "d8b8", 2, 32)
    config = AnTKVConfig(anchors=AnchorConfig(fraction=0.2, sinks=2), window=8, chunk=8)
    keys, values = (torch.randn(2, 2, 60, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found = []
    for static in (False, True):
        start = codec, config, get_score("error_aware"), keys, values
        storage = StaticStorage(*start, max_length=100) if static else LayerStorage(*start)
        storage.replace("offset", torch.tensor([0, 11]))
        storage.max_offset = 11
        encode = graphs._Replayed(storage.encode_chunk, RecordedGraph()) if static else None
        for i in range(60):
            if not static:
                storage.commit()
            elif storage.must_encode:
                coded, tail, slots = storage.counts
                encode()
                storage.count(Counts(coded + 8, tail - 8, slots + 2))
            storage.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
            storage.query_moment.add_(1.0)
            seen = torch.arange(storage.tail_keys.shape[2]).float().cos().abs().expand_as(storage.statistic)
            storage.replace("statistic", storage.statistic + seen)
        found.append(storage)
    grown, static = found
    assert grown.coded_length == static.coded_length == 48
    for name in ("key_codes", "value_codes", "exact_bits", "tail_keys", "tail_values", "statistic"):
        assert torch.equal(getattr(static, name), getattr(grown, name)), name
    for a, b in zip(static.anchors.tensors(), grown.anchors.tensors()):
        assert torch.equal(a, b)
    assert static.sinks.positions[:, 0].tolist() == [[0, 1], [11, 12]]


def test_append_refuses_what_does_not_fit():
    keys, new, lengths = torch.zeros(2, 2, 8, 32), torch.zeros(2, 2, 1, 32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="new values have shape .2, 2, 2, 32.; .2, 2, 1, 32. is needed"):
        append_token(new, torch.zeros(2, 2, 2, 32), keys, keys, lengths)
    with pytest.raises(ValueError, match="new keys are torch.float16, but the tail is torch.float32"):
        append_token(new.half(), new, keys, keys, lengths)
    with pytest.raises(ValueError, match="lengths are torch.int64"):
        append_token(new, new, keys, keys, lengths.long())


def kernel_model(
    device: str = "cpu", layers: int = 1, heads: int = 1, backend: str = "triton", dim: int = 32,
    dtype: torch.dtype = torch.float32,
):  # fmt: skip
    """A tiny Llama with a codebook that the kernels read."""
    model = tiny_llama(
        num_hidden_layers=layers, num_attention_heads=2 * heads, num_key_value_heads=heads, head_dim=dim
    ).to(device, dtype)  # fmt: skip
    spec = VQSpec(8, 8)
    config = AnTKVConfig(spec, spec, AnchorConfig(fraction=0.13, sinks=2), window=4, chunk=8, backend=backend)
    rotary = rotary_of("half", dim)
    tables = {
        i: (pair_tables(spec, heads, dim, rotary, i), random_tables(spec, heads, dim, dense=True, seed=i + 9))
        for i in range(layers)
    }
    return model, AnTKVCodebook(config, tables, describe_model(model.config, "test/model"))


def causal_mask(batch_size: int, q_length: int, kv_length: int, **kwargs) -> torch.Tensor:
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool).tril(kv_length - q_length)


@pytest.mark.parametrize("masked", (False, True), ids=("no-mask", "mask"))
def test_generation_replays_recorded_steps(masked, monkeypatch):
    model, codebook = kernel_model()
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(ids, past_key_values=AnTKVCache(model.config, codebook=codebook), **options)
    if masked:  # as transformers 5.17 does while a step is captured: it must not stay as it is
        monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "1")  # later ones then turn query heads into query tokens
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", causal_mask)
    monkeypatch.setattr("antkv_hf.generation._no_gpu", lambda model: None)
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: RecordedGraph)
    monkeypatch.setattr(graphs, "FIRST_BUCKET", 256)  # one split
    CALLS.clear()
    tokens = model.generate(ids, custom_generate=antkv_generate(codebook, cuda_graphs=True), **options)
    assert torch.equal(tokens, expected)
    assert CALLS["triton.decode_attention"] == 2  # the warm-up and the capture; all other steps ran no Python


class CountingBranch:
    """Stands in for a second stream: counts what is left to it."""

    readings = joined = 0

    @contextmanager
    def reading(self, *tensors):
        self.readings += 1
        yield

    def join(self):
        self.joined += 1


def test_a_captured_step_observes_beside_its_layers(monkeypatch):
    """Each layer of a step leaves one observation to the branch, and the encoding of chunks none."""
    branches: list[CountingBranch] = []
    capture = RecordedGraph.capture

    def branched(graph, function):
        branches.append(CountingBranch())
        with beside.branching(branches[-1]):
            capture(graph, function)

    monkeypatch.setattr(RecordedGraph, "capture", branched)
    monkeypatch.setattr("antkv_hf.generation._no_gpu", lambda model: None)
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: RecordedGraph)
    model, codebook = kernel_model("cpu", layers=2)
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    ids = torch.randint(3, 128, (1, 30), generator=torch.Generator().manual_seed(0))
    model.generate(ids, custom_generate=antkv_generate(codebook, cuda_graphs=True), **options)
    assert sorted((branch.readings, branch.joined) for branch in branches) == [(0, 1), (2, 1)]


# ------------------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("lane", ["antkv", "sdpa"])
@pytest.mark.parametrize("case", ["greedy", "padded", "sampling"])
def test_cuda_graphs_write_the_same_tokens(lane, case, monkeypatch):
    """Real graphs, over several chunks and plans, against a cache that grows."""
    monkeypatch.setattr(graphs, "FIRST_BUCKET", 32)
    model, codebook = kernel_model("cuda", layers=2, heads=2, backend="auto")
    model.set_attn_implementation(lane)
    mask = torch.arange(30) >= torch.tensor([[0], [17], [29]] if case == "padded" else [[0]])
    ids = torch.randint(3, 128, mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, 0)
    options = dict(attention_mask=mask.long().cuda(), max_new_tokens=80, min_new_tokens=80, do_sample=False)
    options |= dict(do_sample=True, top_p=0.9) if case == "sampling" else {}
    written = []
    for extra in (
        dict(past_key_values=AnTKVCache(model.config, codebook=codebook)),
        dict(custom_generate=antkv_generate(codebook, cuda_graphs=False, max_length=120)),
        dict(custom_generate=antkv_generate(codebook, cuda_graphs=True)),
    ):
        torch.manual_seed(1)
        CALLS.clear()
        written.append(model.generate(ids.cuda(), **extra, **options))
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
    # A warm-up and a capture in each layer for each plan: of up to 32 coded tokens and of up to 128.
    assert CALLS["triton.decode_attention"] == 2 * 2 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("dim", [64, 128])
def test_cuda_graphs_capture_the_kernel_in_cuda(dim, batch, monkeypatch):
    """Captured steps in CUDA C++, in whole blocks and in teams, against the same steps that are not captured."""
    obstacle = cuda_decode.obstacle(torch.device("cuda"))
    if obstacle:
        pytest.skip(obstacle)
    monkeypatch.setattr(cuda_backend, "MIN_TOKENS", 0)
    monkeypatch.setattr(graphs, "FIRST_BUCKET", 32)
    model, codebook = kernel_model("cuda", layers=2, heads=2, backend="auto", dim=dim, dtype=torch.float16)
    ids = torch.randint(3, 128, (batch, 30), generator=torch.Generator().manual_seed(0)).cuda()
    written, answered = [], []
    for replayed in (False, True):
        CALLS.clear()
        cache = AnTKVCache(model.config, codebook=codebook, max_length=120)
        logits = model.generate(
            ids, past_key_values=cache, max_new_tokens=80, min_new_tokens=80, do_sample=False, output_logits=True,
            return_dict_in_generate=True, custom_generate=antkv_generate(cuda_graphs=replayed),
        ).logits  # fmt: skip
        written.append(torch.stack(logits))
        answered.append({name: calls for name, calls in CALLS.items() if name.endswith("decode_attention")})
    assert_near(written[1], written[0], 1e-6)
    # A warm-up and a capture in each layer for each plan: of up to 32 coded tokens and of up to 128.
    assert answered == [{"cuda.decode_attention": 2 * 79}, {"cuda.decode_attention": 2 * 2 * 2}]


@pytest.mark.gpu
@pytest.mark.parametrize("held", [beside.MOST_HELD, 0])
def test_observations_beside_a_captured_step(held, monkeypatch):
    """The branch leaves behind what steps without graphs do, joined at the end of a step or in every layer."""
    monkeypatch.setattr(beside, "MOST_HELD", held)
    model, codebook = kernel_model("cuda", layers=3, heads=2, backend="auto")
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(0)).cuda()
    kept = []
    for replayed in (False, True):
        cache = AnTKVCache(model.config, codebook=codebook, max_length=120)
        model.generate(
            ids, past_key_values=cache, max_new_tokens=80, min_new_tokens=80, do_sample=False,
            custom_generate=antkv_generate(cuda_graphs=replayed),
        )  # fmt: skip
        kept.append([layer.storage for layer in cache.layers])
    for stepped, replayed in zip(*kept):
        assert torch.equal(stepped.buffers.anchors.positions, replayed.buffers.anchors.positions)
        assert_near(replayed.buffers.statistic, stepped.buffers.statistic, 1e-4)
        assert_near(replayed.query_moment, stepped.query_moment, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_kernels_of_a_step_on_a_gpu(dtype):
    for batch, heads, dims in (*APPENDS, (1, 8, (128, 128)), (8, 8, (128, 128)), (64, 8, (128, 128))):
        check_append(batch, heads, dims, dtype, "cuda")
    for group, dim in (*MOMENTS, (4, 128), (8, 256)):
        check_moment(group, dim, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [True, dict(mode="max-autotune-no-cudagraphs")], ids=("default", "autotuned"))
def test_compiled_mlps_in_cuda_graphs(options):
    """Inductor's kernels in captured steps write the tokens of a float32 model, which is left as it was."""
    model, codebook = kernel_model("cuda", layers=2, heads=2, backend="auto")
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(0)).cuda()
    lengths = dict(max_new_tokens=80, min_new_tokens=80, do_sample=False)
    written = []
    for compiled in (False, options):
        generate = antkv_generate(codebook, cuda_graphs=True, compile_mlps=compiled)
        written.append(model.generate(ids, custom_generate=generate, **lengths))
    assert torch.equal(*written)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_static_decode_attention_on_a_gpu(dtype):
    codec = random_codec("d8b8", "d8b8", 8, 128, device="cuda")
    snapshot = random_snapshot(codec, 3, 4096, 150, dtype, chunk=128, offset=(0, 100, 2000))
    past = quantized_past(snapshot)
    assert past is not None
    query = torch.randn(3, 32, 1, 128, device="cuda", dtype=dtype)
    tails = snapshot.tail_keys.contiguous(), snapshot.tail_values.contiguous()
    expected = decode_attention(query, past, *tails, scale=0.09, mask=snapshot.unpadded())
    sinks, anchors = past.exact
    slots = anchors.positions.shape[2]
    anchors = type(anchors)(*(None if t is None else larger(t, slots + 500, -1) for t in anchors))
    static = past._replace(
        key_codes=larger(past.key_codes, 9024, 255), value_codes=larger(past.value_codes, 9024, 255),
        exact=(sinks, anchors), exact_bits=larger(past.exact_bits, 1128, 255), coded=9000,
        lengths=torch.tensor([4096, 150, slots], dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    tails = tuple(larger(t, 256, float("nan")) for t in tails)
    for found, wanted in zip(decode_attention(query, static, *tails, scale=0.09), expected):
        assert_near(found, wanted, 1e-2)


@pytest.mark.gpu
def test_smollm2_with_cuda_graphs():
    from antkv_hf.demo import find_codebook
    from antkv_hf.demo_model import load_demo_model
    from antkv_hf.demo_text import HANDBOOK

    try:
        model, tokenizer, _ = load_demo_model()
    except (ImportError, OSError) as error:
        pytest.skip(f"SmolLM2 is not installed: {error}")
    model = model.cuda()
    model.set_attn_implementation("antkv")
    codebook = AnTKVCodebook.from_pretrained(find_codebook("smollm2-135m-instruct-1bit"))
    inputs = tokenizer(HANDBOOK, return_tensors="pt").to("cuda")
    options = dict(max_new_tokens=300, min_new_tokens=300, do_sample=False)
    eager = model.generate(**inputs, past_key_values=AnTKVCache(model.config, codebook=codebook), **options)
    replayed = model.generate(**inputs, custom_generate=antkv_generate(codebook, cuda_graphs=True), **options)
    assert torch.equal(eager, replayed)
