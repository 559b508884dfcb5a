"""Decode steps over preallocated buffers: kernels read lengths on the device, and a recorded step can be replayed."""

from __future__ import annotations

import pytest
import torch
from antkv.decode_attention import decode_attention
from antkv.static_step import add_column_statistic, add_query_moment, add_tail_statistic, append_token
from builders import assert_near, quantized_past, random_codec, random_snapshot
from recorded_graph import RecordedGraph

from antkv_hf import AnTKVConfig, graphs
from antkv_hf.anchors import get_score
from antkv_hf.attention.attend import attend
from antkv_hf.attention.backends import make_backend
from antkv_hf.attention.reference_backend import REFERENCE
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
    run, outputs = (step if graph is None else graphs._Replayed(step, lambda: graph)), []
    for i in range(PROMPT, PROMPT + STEPS):
        storage.commit()
        for buffer, x in zip(now, (queries, keys, values)):
            buffer.copy_(x[:, :, i : i + 1])
        after = storage.counts._replace(tail=storage.counts.tail + 1) if static else None
        outputs.append(run().clone())
        if static:
            storage.note_counts(after)
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


# term, query heads a group, head size, softcap
TAIL_STATISTICS = [
    ("squared_attention", 4, 32, None),
    ("accumulated_attention", 3, 24, None),
    ("squared_attention", 8, 64, 5.0),
    ("squared_attention", 1, 32, None),
    ("squared_attention", 6, 32, None),
]
MOMENTS = [(1, 32), (4, 64), (3, 24), (64, 128)]  # query heads a group, head size; the last has a launch of its own


@pytest.mark.parametrize("group, dim", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_moment_with_the_statistic(group, dim, dtype):
    check_moment(group, dim, dtype)


def check_tail_statistic(
    term: str, group: int, dim: int, softcap: float | None, dtype: torch.dtype = torch.float16, device: str = "cpu"
) -> None:
    """From logits, the statistic and the moment are those that the tail's keys give."""
    batch, heads, rows, tail, first = 2, 3, 500, 410, 96  # some keys are far from the query
    g = torch.Generator().manual_seed(group)
    query = torch.randn(batch, 1, heads * group, dim, generator=g).to(device, dtype).transpose(1, 2)
    tails = [torch.randn(batch, heads, rows, dim, generator=g).to(device, dtype) for _ in range(2)]
    offset = torch.tensor([0, first + 9], device=device)
    lengths = torch.tensor([first, tail, 0], dtype=torch.int32, device=device)
    logits = query.float().unflatten(1, (heads, group)).squeeze(3) @ tails[0].float().mT * 0.1
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    columns = first + torch.arange(rows, device=device)
    logits = logits.masked_fill(columns < offset.view(2, 1, 1, 1), float("-inf"))
    lse = logits[..., :tail].logsumexp(-1, keepdim=True).flatten(1, 2) + 0.3
    lse[0, 0] = float("-inf")  # a head that sees nothing
    kept = torch.full((batch, heads, rows, 8), float("nan"), device=device)
    kept[..., :group] = logits.mT * 1.4426950408889634
    kept[:, :, tail:] = float("nan")
    for stride in (1, 4):
        for last in (tail, tail + 2):  # with a stride of 4, one of them counts for the far keys
            lengths[1] = last
            found = []
            for from_logits in (False, True):
                statistic = torch.ones(batch, heads, rows, device=device)
                moment = torch.full((batch, heads, 2), 3.0, device=device)
                if from_logits:
                    options = dict(scale=0.1, stride=stride)
                    kept[:, :, tail:last, :group] = logits.mT[:, :, tail:last] * 1.4426950408889634
                    add_tail_statistic(term, kept, query, lse, statistic, moment, lengths, **options)
                else:
                    options = dict(scale=0.1, stride=stride, softcap=softcap, moment=moment)
                    add_column_statistic(term, query, *tails, query, lse, statistic, lengths, offset, **options)
                found.append((statistic, moment))
            assert_near(found[1][0], found[0][0], 2e-3)
            assert_near(found[1][1], found[0][1], 1e-6)


@pytest.mark.parametrize("term, group, dim, softcap", TAIL_STATISTICS)
def test_statistic_from_kept_logits(term, group, dim, softcap):
    check_tail_statistic(term, group, dim, softcap)


def test_statistic_from_logits_refuses_what_does_not_fit():
    query, lse, lengths = torch.zeros(2, 4, 1, 32), torch.zeros(2, 4, 1), torch.zeros(3, dtype=torch.int32)
    logits, statistic, moment = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8), torch.zeros(2, 2, 2)
    arguments = query, lse, statistic, moment, lengths
    with pytest.raises(ValueError, match="'anchor_score' needs more than logits"):
        add_tail_statistic("anchor_score", logits, *arguments, scale=1.0)
    with pytest.raises(ValueError, match="1 query tokens of 2 heads; one of up to 1 is taken"):
        add_tail_statistic("squared_attention", logits[..., :1], *arguments, scale=1.0)
    with pytest.raises(ValueError, match="logits of shape .1, 2, 8, 4. do not belong to 2 queries of 4 heads"):
        add_tail_statistic("squared_attention", logits[:1], *arguments, scale=1.0)
    with pytest.raises(ValueError, match="moment must be contiguous float32 .2, 2, 2."):
        add_tail_statistic("squared_attention", logits, query, lse, statistic, moment[:, :1], lengths, scale=1.0)
    with pytest.raises(ValueError, match="statistic must be contiguous float32 .2, 2, 7."):
        add_tail_statistic("squared_attention", logits[:, :, :7].contiguous(), *arguments, scale=1.0)


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
        encode = graphs._Replayed(storage.encode_chunk, RecordedGraph) if static else None
        for i in range(60):
            if not static:
                storage.commit()
            elif storage.must_encode:
                coded, tail, slots = storage.counts
                encode()
                storage.note_counts(Counts(coded + 8, tail - 8, slots + 2))
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_kernels_of_a_step_on_a_gpu(dtype):
    for batch, heads, dims in (*APPENDS, (1, 8, (128, 128)), (8, 8, (128, 128)), (64, 8, (128, 128))):
        check_append(batch, heads, dims, dtype, "cuda")
    for group, dim in (*MOMENTS, (4, 128), (8, 256)):
        check_moment(group, dim, dtype, "cuda")
    for case in (*TAIL_STATISTICS, ("squared_attention", 4, 128, None)):
        check_tail_statistic(*case, dtype, "cuda")


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
