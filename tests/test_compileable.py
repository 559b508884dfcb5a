"""A cache with `compileable=True`: a plain `generate` compiles one whole graph, and writes the same tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook, static_contents
from test_graphs import CONFIG, inputs
from torch._dynamo.utils import counters
from transformers import CompileConfig

from antkv_hf import AnTKVCache, graphs
from antkv_hf.cache.compiled_step import NewToken, attend_new_token, decode_step
from antkv_hf.cache.handle import SharedSnapshot

pytestmark = pytest.mark.usefixtures("fresh_compiler")
NEW = 28


@pytest.fixture(scope="module")
def llama():
    model = tiny_llama(num_hidden_layers=2)
    model.set_attn_implementation("antkv")
    return model


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, CONFIG)


def run(model, batch, cache, compiled: str | None = None, **options):
    torch.manual_seed(5)
    if compiled is not None:
        config = CompileConfig(backend=compiled, mode=None, fullgraph=True)
        config._compile_all_devices = True  # generate() compiles on a GPU only, unless a test asks for it
        options["compile_config"] = config
    lengths = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return model.generate(**batch, past_key_values=cache, **lengths | options)


@pytest.mark.parametrize(
    "backend, padding, options",
    [("eager", (0, 17, 30), {}), ("aot_eager", (0, 4), dict(do_sample=True, top_p=0.9))],
    ids=("left_padded", "sampling"),
)  # fmt: skip
def test_generate_compiles_one_graph(llama, codebook, backend, padding, options):
    batch = inputs(*padding)
    grown = AnTKVCache(llama.config, codebook=codebook)
    expected = run(llama, batch, grown, **options)
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=100, compileable=True)
    assert cache.is_compileable
    assert torch.equal(run(llama, batch, cache, backend, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert cache.get_seq_length() == grown.get_seq_length() == 40 + NEW - 1
    assert cache.layers[0].storage.coded_length >= 48  # chunks were encoded on the way
    another = AnTKVCache(llama.config, codebook=codebook, max_length=100, compileable=True)
    assert torch.equal(run(llama, batch, another, backend, **options), expected)
    assert counters["stats"]["unique_graphs"] <= 2  # the layers' numbers are variables from now on
    again = AnTKVCache(llama.config, codebook=codebook, max_length=100, compileable=True)
    assert torch.equal(run(llama, batch, again, backend, **options), expected)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("hole", [False, True], ids=("left_padded", "hole"))
def test_padding_is_no_mask(llama, codebook, monkeypatch, hole):
    """Kernels know left padding by themselves, and the fastest takes no mask; any other mask comes through."""
    batch = inputs(0, 17)
    if hole:
        batch["attention_mask"][0, 5] = 0
    expected = run(llama, batch, AnTKVCache(llama.config, codebook=codebook))
    masks, attend = [], SharedSnapshot.attend

    def noted(self, query, mask=None, **options):
        if query.shape[2] == 1:
            masks.append(mask is not None)
        return attend(self, query, mask, **options)

    monkeypatch.setattr(SharedSnapshot, "attend", noted)
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=100, compileable=True)
    assert torch.equal(run(llama, batch, cache, "eager"), expected)
    assert len(masks) == 2 * (NEW - 1) and set(masks) == {hole}


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_what_is_added_to_logits_is_no_padding(llama, codebook, bias):
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=42, compileable=True)
    grown = AnTKVCache(llama.config, codebook=codebook)
    model = torch.compile(llama, backend="eager", fullgraph=True)
    for each in (cache, grown):
        llama(**inputs(0), past_key_values=each)
    mask = torch.zeros(1, 1, 1, 42)
    mask[..., :7] = bias
    step = dict(input_ids=torch.full((1, 1), 5), position_ids=torch.full((1, 1), 40))
    expected = llama(**step, attention_mask=mask[..., :41], past_key_values=grown).logits
    found = model(**step, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected)


def test_without_a_compiler_and_in_turns(llama, codebook):
    grown = AnTKVCache(llama.config, codebook=codebook)
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=200, compileable=True)
    said = inputs(0)["input_ids"]
    for backend in (None, "eager"):
        batch = dict(input_ids=torch.cat([said, torch.full((1, 2), 9)], 1))
        fork = copy.deepcopy(cache)
        expected = run(llama, batch, grown)
        assert torch.equal(run(llama, batch, fork, backend), expected)
        said = run(llama, batch, cache, backend)
        assert torch.equal(said, expected)
    assert "make it without compileable" in graphs.obstacle(llama, cache)


def test_another_lane_is_told_what_to_do(codebook):
    model = tiny_llama(num_hidden_layers=2)
    cache = AnTKVCache(model.config, codebook=codebook, max_length=100, compileable=True)
    with pytest.raises(Exception, match="compiled in the .antkv. lane only"):
        run(model, inputs(0), cache, "eager")
    assert cache.get_seq_length() == 40, "as limits.md says"


def test_a_refused_step_changes_no_layer(llama, codebook):
    """What is refused outside of a compiler is refused in the operator: room, batch, dtype, mask, gradients."""
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=42, compileable=True)
    with pytest.raises(ValueError, match="max_length=42 tokens, but 42 cached and 1 new ones are 43"):
        run(llama, inputs(0), cache)
    model = torch.compile(llama, backend="eager", fullgraph=True)
    one = torch.full((1, 1), 5)
    step = dict(input_ids=one, position_ids=one + 40, attention_mask=torch.ones(1, 1, 1, 42, dtype=torch.bool))
    before = static_contents(cache)
    for each in (llama, model):
        with pytest.raises(ValueError, match="42 cached and 1 new ones are 43"):
            each(**step, past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, static_contents(cache), strict=True))
    cache.crop(-2)
    before, ticket = static_contents(cache), cache.layers[0]._ticket
    assert cache.fork().layers[0]._ticket.number not in (ticket.number, cache.layers[1]._ticket.number)
    query, kv = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
    for new, mask, message in (
        (kv.repeat(2, 1, 1, 1), None, "batch size changed from 1 to 2"),
        (kv.bfloat16(), None, "keys moved from torch.float32 on cpu to torch.bfloat16"),
        (kv, torch.ones(1, 1, 1, 30), "covers 30 keys, but the cache holds 41 with the new one and was made for .*=42"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_step(query, new, new, mask, None, ticket.order, ticket.number, None, None)
    wants = NewToken(ticket, kv.clone().requires_grad_())
    with torch.enable_grad(), pytest.raises(ValueError, match=r"require grad.*torch\.no_grad"):
        attend_new_token(query, wants, wants, None, None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(before, static_contents(cache), strict=True))
    expected = llama(**step, past_key_values=cache.fork()).logits
    torch.testing.assert_close(model(**step, past_key_values=cache).logits, expected)
    cache.crop(-1)
    with pytest.raises(ValueError, match="got 0 new tokens with 40 cached"):
        cache.get_mask_sizes(0, 0)
    cache.crop(-5)
    assert cache.get_mask_sizes(1, 0) == (42, 0) and cache.get_mask_sizes(2, 0) == (37, 0)
    with pytest.raises(ValueError, match="covers 42 keys, but the cache holds 37"):  # several tokens: no wider mask
        llama(torch.full((1, 2), 5), past_key_values=cache, attention_mask=torch.zeros(1, 1, 2, 42))


def test_another_lane_is_named(llama, codebook):
    """There transformers gives a prompt, or a token whose query heads are packed as rows, a compiled step's mask."""
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=100, compileable=True)
    llama(torch.full((1, 40), 5), past_key_values=cache)
    storage = cache.layers[0].storage
    shared = SharedSnapshot(storage.snapshot(), storage.backend, None, False, fixed_columns=100)
    with pytest.raises(ValueError, match=r"covers 100 keys, but the cache holds 40: .*set_attn_implementation\("):
        shared.attend(torch.zeros(1, 2, 2, 16), torch.zeros(1, 1, 1, 100))


def test_compileable_needs_max_length_and_every_layer(llama, codebook):
    with pytest.raises(ValueError, match="compileable=True needs max_length"):
        AnTKVCache(llama.config, codebook=codebook, compileable=True)
    config = CONFIG.replace(skip_layers=(1,))
    with pytest.raises(ValueError, match=r"every layer quantized, but of the 2 layers of llama .* 1 \(1 skipped\)"):
        AnTKVCache(llama.config, config, codebook, max_length=100, compileable=True)


def test_from_pretrained_takes_it(llama, codebook, tmp_path):
    codebook.save_pretrained(tmp_path)
    cache = AnTKVCache.from_pretrained(tmp_path, llama, max_length=100, compileable=True)
    assert cache.is_compileable and cache.max_length == 100


@pytest.mark.gpu
def test_plain_generate_compiles_on_a_gpu():
    """As transformers does by itself, with Inductor and CUDA graphs around the operator."""
    model = tiny_llama(num_hidden_layers=2).cuda()
    model.set_attn_implementation("antkv")
    book, batch = random_codebook(model, CONFIG), inputs(0, 7, device="cuda")
    expected = run(model, batch, AnTKVCache(model.config, codebook=book))
    for _ in range(3):
        cache = AnTKVCache(model.config, codebook=book, max_length=100, compileable=True)
        assert torch.equal(run(model, batch, cache), expected)
    assert counters["stats"]["unique_graphs"] in (1, 2)
