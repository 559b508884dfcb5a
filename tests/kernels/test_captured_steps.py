"""Captured decode steps: `antkv_generate` records what kernels do, and real CUDA graphs write the same tokens."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from antkv import cuda_decode
from builders import assert_near, rotary_of
from conftest import tiny_llama
from helpers import pair_tables, random_tables
from recorded_graph import RecordedGraph
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, antkv_generate, graphs
from antkv_hf.attention import beside, cuda_backend
from antkv_hf.attention.backends import CALLS
from antkv_hf.codebook import describe_model
from antkv_hf.config import AnchorConfig


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


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded on the CPU, and replayed without their Python."""
    monkeypatch.setattr("antkv_hf.generation._no_gpu", lambda model: None)
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: RecordedGraph)
    monkeypatch.setattr(graphs, "FIRST_BUCKET", 256)  # one split


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(0))


def decode(model, ids, cache, new: int, replayed: bool = True) -> torch.Tensor:
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        custom_generate=antkv_generate(cuda_graphs=replayed),
    )  # fmt: skip


def text_of_turns(model, codebook, replayed: bool, new: int = 20) -> torch.Tensor:
    """Two turns on one cache, which has to know every token that it holds."""
    cache, text = AnTKVCache(model.config, codebook=codebook, max_length=160), random_ids(2, 12).to(model.device)
    for _ in range(2):
        text = decode(model, torch.cat([text, text[:, :3]], 1), cache, new, replayed)
        assert torch.equal(cache._guard.ids, text[:, : cache.get_seq_length()].cpu())
    return text


def crop_between_anchors(model, codebook, ids) -> AnTKVCache:
    """A cache of `ids`, cropped into coded tokens where its layers keep different numbers of anchors."""
    cache = AnTKVCache(model.config, codebook=codebook, max_length=128)
    model(ids, past_key_values=cache)
    anchors = [layer.storage.buffers.anchors.positions for layer in cache.layers]

    def kept(length: int) -> list[int]:
        return [int(((p >= 0) & (p < length)).sum(-1).max()) for p in anchors]

    coded = cache.layers[0].storage.coded_length
    length = next(n for n in range(coded - 1, 8, -1) if kept(n)[0] < max(kept(n)))
    cache.crop(length - cache.get_seq_length())
    return cache


def check_anchors(cache: AnTKVCache) -> None:
    """Every token that is marked exact is held exactly, and host and device count the same slots."""
    for layer in cache.layers:
        storage, buffers = layer.storage, layer.storage.buffers
        slots = int(buffers.lengths[2])
        assert storage.counts.slots == slots
        held = int((buffers.anchors.positions[:, :, :slots] >= 0).sum() + (buffers.sinks.positions >= 0).sum())
        assert held == sum(int(byte).bit_count() for byte in buffers.exact_bits.flatten().tolist())


def test_a_cache_knows_the_tokens_of_replayed_steps(recorded):
    model, codebook = kernel_model()
    assert torch.equal(text_of_turns(model, codebook, True, 5), text_of_turns(model, codebook, False, 5))


def test_replays_count_the_anchors_of_each_layer(recorded):
    """After a crop into coded tokens layers have anchors in different numbers of slots."""
    model, codebook = kernel_model(layers=2)
    for parameter in model.parameters():  # as they are, layers choose alike
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)
    ids, found = random_ids(1, 45), []
    for replayed in (True, False):
        cache = crop_between_anchors(model, codebook, ids)
        assert len({layer.storage.counts.slots for layer in cache.layers}) > 1
        text = decode(model, ids[:, : cache.get_seq_length() + 1], cache, 5, replayed)
        check_anchors(cache)
        more = torch.cat([text[:, cache.get_seq_length() :], ids[:, :14]], 1)
        found.append((text, model(more, past_key_values=cache).logits))
        check_anchors(cache)
    assert torch.equal(found[0][0], found[1][0])
    assert_near(found[0][1], found[1][1], 1e-5)


def test_a_replayed_encoding_needs_room_for_its_anchors(recorded):
    model, codebook = kernel_model()
    cache = AnTKVCache(model.config, codebook=codebook, max_length=68)
    text = decode(model, random_ids(1, 9), cache, 13)  # the second chunk is encoded by a recording
    storage = cache.layers[0].storage
    storage.set_counts(storage.counts._replace(slots=8))  # as many crops between anchors leave it
    with pytest.raises(ValueError, match="8 slots of anchors are in use and 1 more are needed, but max_length=68"):
        decode(model, text, cache, 9)


@pytest.mark.parametrize("masked", (False, True), ids=("no-mask", "mask"))
def test_generation_replays_recorded_steps(masked, recorded, monkeypatch):
    model, codebook = kernel_model()
    ids = random_ids(1, 9)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(ids, past_key_values=AnTKVCache(model.config, codebook=codebook), **options)
    if masked:  # as transformers 5.17 does while a step is captured: it must not stay as it is
        monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "1")  # later ones then turn query heads into query tokens
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", causal_mask)
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


def test_a_captured_step_observes_beside_its_layers(recorded, monkeypatch):
    """Each layer of a step leaves one observation to the branch, and the encoding of chunks none."""
    branches: list[CountingBranch] = []
    capture = RecordedGraph.capture

    def branched(graph, function):
        branches.append(CountingBranch())
        with beside.branching(branches[-1]):
            capture(graph, function)

    monkeypatch.setattr(RecordedGraph, "capture", branched)
    model, codebook = kernel_model("cpu", layers=2)
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    ids = random_ids(1, 30)
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
    ids = random_ids(*mask.shape).masked_fill(~mask, 0)
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
@pytest.mark.parametrize("lane", ["antkv", "sdpa"])
def test_cuda_graphs_serve_several_turns(lane):
    model, codebook = kernel_model("cuda", layers=2, heads=2, backend="auto")
    model.set_attn_implementation(lane)
    assert torch.equal(text_of_turns(model, codebook, True), text_of_turns(model, codebook, False))


@pytest.mark.gpu
@pytest.mark.parametrize("teams", [False, True], ids=("blocks", "teams"))
@pytest.mark.parametrize("dim", [64, 128])
def test_cuda_graphs_capture_the_kernel_in_cuda(dim, teams, monkeypatch):
    """Captured steps in CUDA C++, several shares of a sequence, against the same steps that are not captured."""
    obstacle = cuda_decode.obstacle(torch.device("cuda"))
    if obstacle:
        pytest.skip(obstacle)
    monkeypatch.setattr(cuda_backend, "MIN_TOKENS", 0)
    monkeypatch.setattr(cuda_decode, "plan", lambda shape, *sizes: (shape.in_teams if teams else shape, 2, 3))
    monkeypatch.setattr(graphs, "FIRST_BUCKET", 32)
    model, codebook = kernel_model("cuda", layers=2, heads=2, backend="auto", dim=dim, dtype=torch.float16)
    ids = random_ids(5, 30).cuda()
    written, answered = [], []
    for replayed in (False, True):
        CALLS.clear()
        cache = AnTKVCache(model.config, codebook=codebook, max_length=420)
        logits = model.generate(
            ids, past_key_values=cache, max_new_tokens=380, min_new_tokens=380, do_sample=False, output_logits=True,
            return_dict_in_generate=True, custom_generate=antkv_generate(cuda_graphs=replayed),
        ).logits  # fmt: skip
        written.append(torch.stack(logits))
        counted = ("decode_attention", "tail_statistic")
        answered.append({name: calls for name, calls in CALLS.items() if name.endswith(counted)})
    assert_near(written[1], written[0], 1e-6)
    # A warm-up and a capture in each layer for each plan: of up to 32 coded tokens, of up to 128 and of up to 512.
    names = "cuda.decode_attention", "triton.tail_statistic"
    assert answered == [dict.fromkeys(names, 2 * 379), dict.fromkeys(names, 2 * 3 * 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("held", [beside.MOST_HELD, 0])
def test_observations_beside_a_captured_step(held, monkeypatch):
    """The branch leaves behind what steps without graphs do, joined at the end of a step or in every layer."""
    monkeypatch.setattr(beside, "MOST_HELD", held)
    model, codebook = kernel_model("cuda", layers=3, heads=2, backend="auto")
    ids = random_ids(2, 30).cuda()
    kept = []
    for replayed in (False, True):
        cache = AnTKVCache(model.config, codebook=codebook, max_length=120)
        decode(model, ids, cache, 80, replayed)
        kept.append([layer.storage for layer in cache.layers])
    for stepped, replayed in zip(*kept):
        assert torch.equal(stepped.buffers.anchors.positions, replayed.buffers.anchors.positions)
        assert_near(replayed.buffers.statistic, stepped.buffers.statistic, 1e-4)
        assert_near(replayed.query_moment, stepped.query_moment, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [True, dict(mode="max-autotune-no-cudagraphs")], ids=("default", "autotuned"))
def test_compiled_mlps_in_cuda_graphs(options):
    """Inductor's kernels in captured steps write the tokens of a float32 model, which is left as it was."""
    model, codebook = kernel_model("cuda", layers=2, heads=2, backend="auto")
    ids = random_ids(2, 30).cuda()
    lengths = dict(max_new_tokens=80, min_new_tokens=80, do_sample=False)
    written = []
    for compiled in (False, options):
        generate = antkv_generate(codebook, cuda_graphs=True, compile_mlps=compiled)
        written.append(model.generate(ids, custom_generate=generate, **lengths))
    assert torch.equal(*written)
    assert all("forward" not in module.__dict__ for module in model.modules())


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
