"""Pipelines, chats that go on with one cache, forks of a long document: never wrong text from a stale cache."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_cli import TEXT, character_tokenizer
from transformers import DynamicCache, TextIteratorStreamer, TextStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec, antkv_generate

IDENTITY = AnTKVConfig.preset("identity", window=8, chunk=4)
CODED = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=8, chunk=8)
GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
SPECIAL = [0, 1, 2, *range(98, 128)]  # no characters
PROMPTS = [TEXT[:25], TEXT[10:50], TEXT[:34]]
CHATS = [
    [{"role": "user", "content": TEXT[:30]}],
    [{"role": "system", "content": "Short."}, {"role": "user", "content": TEXT[40:60]}],
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2, hidden_size=32, head_dim=8, initializer_range=0.3)


@pytest.fixture(scope="module")
def codebook(model):
    return random_codebook(model, CODED)


@pytest.fixture(scope="module")
def pipe(model):
    return pipeline("text-generation", model=model, tokenizer=character_tokenizer(), device="cpu")


@pytest.fixture(params=("sdpa", "antkv"))
def lane(request, model):
    model.set_attn_implementation(request.param)
    yield request.param
    model.set_attn_implementation("sdpa")


CALLS = {
    "one": (PROMPTS[0], {}),
    "batches": (PROMPTS, dict(batch_size=2)),
    "chats": (CHATS, {}),
    "beams": (PROMPTS[:2], dict(num_beams=2, num_return_sequences=2)),
}


@pytest.mark.parametrize("call", CALLS)
def test_pipeline_equals_dynamic_cache(pipe, lane, call):
    inputs, options = CALLS[call]
    expected = pipe(inputs, **GREEDY, **options)
    assert pipe(inputs, custom_generate=antkv_generate(config=IDENTITY), **GREEDY, **options) == expected


def test_pipeline_with_codes_gives_every_prompt_its_own_cache(pipe, codebook):
    generate = antkv_generate(codebook)
    alone = [pipe(prompt, custom_generate=generate, **GREEDY) for prompt in PROMPTS]
    assert pipe(PROMPTS, custom_generate=generate, **GREEDY) == alone
    assert alone != pipe(PROMPTS, **GREEDY), "nothing was quantized: the test shows nothing"


class Silent(BaseStreamer):
    def put(self, value): ...
    def end(self): ...


def test_streamers_hear_every_token(pipe, lane, capsys):
    """transformers does not hand a streamer on to custom_generate: it is found all the same."""
    expected = pipe(PROMPTS[0], **GREEDY, return_full_text=False)[0]["generated_text"].strip()
    generate = antkv_generate(config=IDENTITY)
    for options in ({}, dict(prompt_lookup_num_tokens=3)):
        printing = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
        pipe(PROMPTS[0], custom_generate=generate, streamer=printing, **GREEDY, **options)
        assert capsys.readouterr().out.strip() == expected
    waiting = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    pipe(PROMPTS[0], custom_generate=generate, streamer=waiting, **GREEDY)
    assert "".join(waiting).strip() == expected
    with pytest.raises(ValueError, match="num_beams=2 beams: leave one out"):
        pipe(PROMPTS[0], custom_generate=generate, streamer=Silent(), num_beams=2, **GREEDY)


def test_an_assistant_is_used(model):
    drafts = []
    helper = tiny_llama(num_hidden_layers=1, hidden_size=32, head_dim=8)
    helper.register_forward_hook(lambda *_: drafts.append(1))
    prompt = dict(input_ids=ids(40), attention_mask=torch.ones(1, 40, dtype=torch.int64))
    expected = model.generate(**prompt, custom_generate=antkv_generate(config=IDENTITY), **GREEDY)
    out = model.generate(**prompt, custom_generate=antkv_generate(config=IDENTITY), assistant_model=helper, **GREEDY)
    assert drafts and torch.equal(out, expected)


# -------------------------------------------------------------------- one cache for many prompts
def test_pipeline_refuses_a_stale_cache(pipe, model, codebook):
    cache = AnTKVCache(model.config, codebook=codebook)
    with pytest.raises(ValueError, match=r"holds 32 tokens of another prompt .* token 0.*on_new_prompt"):
        pipe(PROMPTS[:2], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 32, "the first prompt and 7 of its 8 new tokens"


@pytest.mark.parametrize("options", (dict(num_beams=2), dict(prompt_lookup_num_tokens=3), dict(batch_size=2)))
def test_pipeline_with_a_cache_that_resets(pipe, model, codebook, options):
    expected = pipe(PROMPTS, custom_generate=antkv_generate(codebook), **GREEDY, **options)
    cache = AnTKVCache(model.config, codebook=codebook, on_new_prompt="reset")
    assert pipe(PROMPTS, past_key_values=cache, **GREEDY, **options) == expected


def ids(n: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 98, (batch, n), generator=torch.Generator().manual_seed(seed))


WAYS = {
    "greedy": {},
    "sampling": dict(do_sample=True),
    "beams": dict(num_beams=3),
    "prompt_lookup": dict(prompt_lookup_num_tokens=4),
    "chunked_prefill": dict(prefill_chunk_size=16),
}


@pytest.mark.parametrize("way", WAYS)
def test_generated_tokens_are_compared_too(model, lane, way):
    """A prompt that begins like the last one, and then goes on otherwise than its answer did."""
    prompt, cache = ids(40), AnTKVCache(model.config, IDENTITY)
    options = {**GREEDY, "suppress_tokens": SPECIAL}  # padding among them would be masked in the next prompt
    said = model.generate(prompt, past_key_values=cache, **{**options, **WAYS[way]})
    held = cache.get_seq_length()
    assert held > 40 and cache._guard.length == held
    if way != "beams":  # there the cache ends on other beams than the one that is returned
        assert torch.equal(cache._guard.ids, said[:, :held])
    other = torch.cat([said, said[:, :9]], 1)
    other[0, 43] = 3 + (other[0, 43] - 2) % 95
    with pytest.raises(ValueError, match=rf"holds {held} tokens of another prompt .*differ at token 4[0-3]"):
        model.generate(other, past_key_values=cache, **{**options, **WAYS[way]})
    assert cache.get_seq_length() == held
    if way != "beams":
        longer = torch.cat([said, said[:, :9]], 1)
        expected = model.generate(longer, past_key_values=DynamicCache(config=model.config), **options)
        assert torch.equal(model.generate(longer, past_key_values=cache, **options), expected)


def test_tokens_are_known_after_cache_operations(model):
    cache, prompt = AnTKVCache(model.config, IDENTITY), ids(30, batch=3)
    model(prompt, past_key_values=cache)
    known = prompt
    for name, argument, change in (
        ("reorder_cache", torch.tensor([2, 0, 2]), lambda t: t[[2, 0, 2]]),
        ("batch_repeat_interleave", 2, lambda t: t.repeat_interleave(2, 0)),
        ("batch_select_indices", torch.tensor([5, 1]), lambda t: t[[5, 1]]),
        ("crop", -7, lambda t: t[:, :-7]),
    ):
        getattr(cache, name)(argument)
        known = change(known)
        assert torch.equal(cache._guard.ids, known)
    for _ in range(140):  # more pieces than are kept loose
        model(known[:, :1], past_key_values=cache)
        known = torch.cat([known, known[:, :1]], 1)
    assert len(cache._guard._loose) < 128 and torch.equal(cache._guard.ids, known)
    cache.crop(-1000)
    assert cache._guard.ids is None


def test_unseen_tokens_leave_the_guard_silent(model):
    """Embeddings have no ids: what follows is not known, and nothing is refused that may be right."""
    cache, prompt = AnTKVCache(model.config, IDENTITY), ids(20)
    model(prompt, past_key_values=cache)
    model(inputs_embeds=model.get_input_embeddings()(ids(5, 1)), past_key_values=cache)
    model(ids(1, 2), past_key_values=cache)
    assert torch.equal(cache._guard.ids, prompt) and cache.get_seq_length() == 26
    longer = torch.cat([prompt, ids(20, 3)], 1)
    model.generate(longer, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="differ at token 0"):
        model.generate(ids(80, 4), past_key_values=cache, **GREEDY)


def test_hybrids_know_their_tokens():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=98, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    hybrid = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="1 of 2 layers of gemma3_text.*1 sliding window"):
        cache = AnTKVCache(config, IDENTITY)
    hybrid(ids(30), past_key_values=cache)
    hybrid(ids(4, 1), past_key_values=cache)
    assert torch.equal(cache._guard.ids, torch.cat([ids(30), ids(4, 1)], 1))


# -------------------------------------------------------------------- chats
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TURNS = [TEXT[:30], TEXT[40:66], TEXT[5:25]]


def chat(model, caches, users: list[str]) -> list[str]:
    """Answers turn by turn, each time with the whole history in the prompt; one of `caches` a turn."""
    tokenizer, turns = character_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    for user, cache in zip(users, caches, strict=True):
        turns.append({"role": "user", "content": user})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**prompt, past_key_values=cache, suppress_tokens=SPECIAL, **GREEDY)
        turns.append({"role": "assistant", "content": tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])})
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def counting_resets(monkeypatch) -> list[int]:
    resets, reset = [], AnTKVCache.reset
    monkeypatch.setattr(AnTKVCache, "reset", lambda self: (resets.append(1), reset(self))[1])
    return resets


def test_chat_with_one_cache_equals_reading_everything_again(model, lane, monkeypatch):
    expected = chat(model, [DynamicCache(config=model.config) for _ in TURNS], TURNS)
    cache, resets = AnTKVCache(model.config, IDENTITY, on_new_prompt="reset"), counting_resets(monkeypatch)
    assert chat(model, [cache] * 3, TURNS) == expected and not resets
    assert chat(model, [cache] * 3, TURNS) == expected and len(resets) == 1, "a new chat starts afresh"


def test_chat_over_codes_reads_each_turn_once(model, codebook, lane):
    cache = AnTKVCache(model.config, codebook=codebook)
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    chat(model, [cache] * 3, TURNS)
    hook.remove()
    history = len("".join(TURNS)) + 3 * 8 + 2 * len("u:|a:|") + len("u:|a:")
    assert sum(read) == history - 1 == cache.get_seq_length(), "no token is read twice, the last one never"


# -------------------------------------------------------------------- one document, many questions
def buffers(cache) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{name}": tensor
        for i, layer in enumerate(cache.quantized_layers)
        for name, tensor in {**layer.storage.tensors(), "exact_bits": layer.storage.exact_bits}.items()
    }


@pytest.mark.parametrize("make", (AnTKVCache.fork, copy.deepcopy))
def test_forks_share_every_buffer_and_go_on_alone(model, codebook, lane, make):
    document, questions = ids(100), [ids(9, 1), ids(23, 2)]
    cache = AnTKVCache(model.config, codebook=codebook)
    model(document, past_key_values=cache)
    before = buffers(cache)
    forks = [make(cache) for _ in questions]
    for fork in forks:
        assert {name: t.data_ptr() for name, t in buffers(fork).items()} == {n: t.data_ptr() for n, t in before.items()}
    for fork, question in zip(forks, questions):
        prompt = torch.cat([document, question], 1)
        fresh = AnTKVCache(model.config, codebook=codebook)
        model(document, past_key_values=fresh)
        expected = model.generate(prompt, past_key_values=fresh, **GREEDY)
        assert torch.equal(model.generate(prompt, past_key_values=fork, **GREEDY), expected)
        assert fork.get_seq_length() == 100 + question.shape[1] + 7
        with pytest.raises(ValueError, match="of another prompt"):
            model.generate(torch.cat([document, ids(60, 3)], 1), past_key_values=fork, **GREEDY)
    assert cache.get_seq_length() == 100
    for name, tensor in buffers(cache).items():
        assert tensor is before[name]


def test_forks_of_a_fork_crop_and_repeat_alone(model, codebook):
    cache = AnTKVCache(model.config, codebook=codebook)
    model(ids(100), past_key_values=cache)
    held = {name: tensor.clone() for name, tensor in buffers(cache).items()}
    one = cache.fork()
    two = one.fork()
    one.crop(-60)
    two.batch_repeat_interleave(3)
    two.reorder_cache(torch.tensor([2, 0, 0]))
    model(ids(40, 4), past_key_values=one)
    assert (one.get_seq_length(), two.get_seq_length(), two.layers[0].batch_size) == (80, 100, 3)
    for name, tensor in buffers(cache).items():
        assert torch.equal(tensor, held[name])
