"""Cases in which a cache went on silently with wrong text: stopped midway, padded, read twice."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_graphs import EagerGraph
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StoppingCriteriaList,
)

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec, antkv_generate, graphs, static_storage, storage
from antkv_hf.anchors import get_score
from antkv_hf.anchors.base import TokenContext
from antkv_hf.cache.interface import attention_implementation
from antkv_hf.config import AnchorConfig
from antkv_hf.evaluation import Protocol, ProtocolEvaluator
from antkv_hf.evaluation.perplexity import fast_lane

CONFIG = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), AnchorConfig(fraction=0.25), window=8, chunk=8)
GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, CONFIG)


def ids(n: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


@contextmanager
def stopped_in(layer, error: type[BaseException]):
    """Inside, a forward through `layer` stops."""

    def stop(*_):
        raise error("stopped")

    hook = layer.register_forward_pre_hook(stop)
    try:
        with pytest.raises(error):
            yield
    finally:
        hook.remove()


# ----------------------------------------------------------------------------------------------------------- a forward
@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
@pytest.mark.parametrize("max_length", (None, 200))
@pytest.mark.parametrize("filled", (True, False), ids=("in a later forward", "in the first"))
def test_a_forward_that_stopped_is_noticed(llama, codebook, lane, max_length, filled):
    """The first layers have taken tokens that the last ones have not: another forward would write wrong text."""
    text = ids(60)
    with attention_implementation(llama, lane):
        expected = llama.generate(text, past_key_values=AnTKVCache(llama.config, codebook=codebook), **GREEDY)
        for mode in ("error", "reset"):
            cache = AnTKVCache(llama.config, codebook=codebook, max_length=max_length, on_new_prompt=mode)
            if filled:
                llama(text[:, :40], past_key_values=cache)
            with stopped_in(llama.model.layers[1], KeyboardInterrupt):
                llama(text[:, 40 if filled else 0 : 50], past_key_values=cache)
            held = [layer.get_seq_length() for layer in cache.layers]
            assert held == [50, 40, 40] if filled else [50, 0, 0]
            with pytest.raises(ValueError, match="layers hold (0|40) to 50 tokens, since a forward stopped.*reset"):
                llama(text[:, 50:], past_key_values=cache)
            assert [layer.get_seq_length() for layer in cache.layers] == held, "refused before the first layer"
            if mode == "reset":
                assert torch.equal(llama.generate(text, past_key_values=cache, **GREEDY), expected)
                continue
            with pytest.raises(ValueError, match="cannot continue the prompt: its layers hold"):
                llama.generate(text, past_key_values=cache, **GREEDY)
            cache.reset()
            assert torch.equal(llama.generate(text, past_key_values=cache, **GREEDY), expected)


def test_a_model_of_fewer_layers_than_the_cache_is_noticed(llama, codebook):
    cache = AnTKVCache(llama.config, codebook=codebook)
    with pytest.raises(ValueError, match="or the model has fewer than its 3 layers"):
        tiny_llama(num_hidden_layers=2).generate(ids(20), past_key_values=cache, **GREEDY)


# ------------------------------------------------------------------------------------------------------------ encoding
@pytest.mark.parametrize("max_length", (None, 200))
@pytest.mark.parametrize("error", (torch.OutOfMemoryError, KeyboardInterrupt))
def test_encoding_that_stopped_can_be_tried_again(llama, codebook, max_length, error, monkeypatch):
    """In the second of three blocks: anchors and sinks of the first were kept twice, and each copy weighs."""
    for module in (storage, static_storage):
        monkeypatch.setattr(module, "ENCODE_BLOCK", 16)
    keys = torch.randn(2, 1, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for stops in (False, True):
        held = AnTKVCache(llama.config, codebook=codebook, max_length=max_length).layers[0]
        held.update(*keys, 0)
        kept, calls, code = held.storage, [], held.storage._code

        def stop(*arguments, calls=calls, code=code):
            calls.append(None)
            if len(calls) == 2:
                raise error("stopped")
            return code(*arguments)

        if stops:
            monkeypatch.setattr(kept, "_code", stop)
            with pytest.raises(error):
                kept.commit()
            assert (kept.coded_length, kept.length) == (0, 60)
        kept.commit()
        found.append(kept.tensors() | {"bits": kept.exact_bits})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_a_chunk_in_place_that_stopped_can_be_tried_again(llama, codebook, monkeypatch):
    """Encoding while a text is written, in place: bits of exact tokens are added, so that adding twice would carry."""
    found = []
    for stops in (False, True):
        layer = AnTKVCache(llama.config, codebook=codebook, max_length=200).layers[0]
        generator = torch.Generator().manual_seed(0)
        layer.update(*torch.randn(2, 1, 2, 9, 16, generator=generator), 0)
        layer.storage.commit()
        for _ in range(20):
            layer.update(*torch.randn(2, 1, 2, 1, 16, generator=generator), 0)
        layer.storage.append(*torch.randn(2, 1, 2, 1, 16, generator=generator))
        while not layer.storage.must_encode:
            layer.storage.append(*torch.randn(2, 1, 2, 1, 16, generator=generator))
        if stops:
            monkeypatch.setattr(layer.storage, "_write_codes", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                layer.storage.commit()
            monkeypatch.undo()
        layer.storage.commit()
        found.append(layer.storage.tensors() | {"bits": layer.storage.exact_bits})
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


# ----------------------------------------------------------------------------------------------------------- capturing
def test_ctrl_c_while_a_step_is_captured(llama, codebook, monkeypatch):
    """Capturing takes seconds; the next turn captures anew, and host and device count alike."""
    monkeypatch.setattr("antkv_hf.generation._no_gpu", lambda model: None)
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: EagerGraph)
    works = EagerGraph.capture

    def interrupt(self, function):
        kept = cache.layers[0].storage
        kept.note_counts(kept.counts._replace(tail=kept.counts.tail + 1))  # as Python in a capture does
        raise KeyboardInterrupt

    def generate(cache):
        return llama.generate(
            ids(30), past_key_values=cache, custom_generate=antkv_generate(cuda_graphs=True), **GREEDY
        )

    with attention_implementation(llama, "antkv"):
        expected = generate(AnTKVCache(llama.config, codebook=codebook, max_length=100))
        cache = AnTKVCache(llama.config, codebook=codebook, max_length=100)
        monkeypatch.setattr(EagerGraph, "capture", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(cache)
        held = cache.get_seq_length()
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
        assert cache.layers[0].storage.buffers.lengths.sum() - cache.layers[0].storage.counts.slots == held
        monkeypatch.setattr(EagerGraph, "capture", works)
        known = cache._guard.ids
        more = dict(GREEDY, max_new_tokens=38 - known.shape[1] - 1, min_new_tokens=0)
        went_on = llama.generate(
            expected[:, : known.shape[1] + 1], past_key_values=cache, custom_generate=antkv_generate(cuda_graphs=True),
            **more,
        )  # fmt: skip
    assert torch.equal(went_on, expected)


# ------------------------------------------------------------------------------------------------- refused, unchanged
def sliding_qwen() -> Qwen2ForCausalLM:
    kinds = ["full_attention", "sliding_attention"] * 2
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=kinds, use_sliding_window=True, sliding_window=8,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def test_a_crop_that_a_sliding_layer_refuses_changes_none():
    model = sliding_qwen()
    cache = AnTKVCache(model.config, AnTKVConfig.preset("identity"))
    model(ids(20), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 1 .20 tokens in a sliding window of 8.*activate_past_recording"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 4 and cache._guard.length == 20
    short = AnTKVCache(model.config, AnTKVConfig.preset("identity"))
    model(ids(6), past_key_values=short)
    short.crop(-3)
    assert [layer.get_seq_length() for layer in short.layers] == [3] * 4


def test_another_batch_is_refused_before_a_skipped_layer_changes(llama):
    config = AnTKVConfig.preset("identity").replace(skip_layers=(0,))
    cache = AnTKVCache(llama.config, config, max_length=100)
    llama(ids(20, batch=2), past_key_values=cache)
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([1]))):
        with pytest.raises(ValueError, match="max_length keeps its batch of 2, but [14] sequences"):
            change()
        assert {cache.layers[0].keys.shape[0], *(layer.batch_size for layer in cache.quantized_layers)} == {2}
    cache.batch_select_indices(torch.tensor([1, 0]))


# -------------------------------------------------------------------------------------------------------- padded text
def test_padding_says_nothing_of_the_values():
    """Anchors of a padded text are those of the text alone."""
    generator, padding = torch.Generator().manual_seed(0), 24
    alone = {name: torch.rand(1, 2, 16, generator=generator) for name in ("statistic", "key_error", "value_error")}
    wide = {name: torch.randn(1, 2, 16, 8, generator=generator) for name in ("keys", "values")}
    scores = []
    for padded in (0, padding):
        context = TokenContext(
            **{name: torch.nn.functional.pad(x, (padded, 0), value=3.0) for name, x in alone.items()},
            **{name: torch.nn.functional.pad(x, (0, 0, padded, 0), value=40.0) for name, x in wide.items()},
            logit_variance=torch.full((1, 2, 1), 0.7), positions=torch.arange(-padded, 16).unsqueeze(0),
        )  # fmt: skip
        scores.append(get_score("error_aware").score(context)[:, :, padded:])
    torch.testing.assert_close(*scores)
    spread = (wide["values"] - wide["values"].mean(2, keepdim=True)).square().sum(-1).mean(2, keepdim=True)
    expected = alone["statistic"] * (0.7 * spread * alone["key_error"] + alone["value_error"])
    torch.testing.assert_close(scores[0], expected)


@pytest.mark.parametrize("padding", (0, 20, 29, 31, 32))
def test_scales_of_a_padded_text_are_those_of_the_text(llama, padding):
    """Of its first 32 tokens, although few of them are in the chunk in which they begin."""
    config = AnTKVConfig.preset("ott-2bit", group=32, window=32, chunk=32)
    text = ids(100)
    found = []
    for padded in (0, padding):
        cache = AnTKVCache(llama.config, config)
        row = torch.cat([torch.zeros(1, padded, dtype=torch.int64), text], 1)
        mask = torch.cat([torch.zeros(1, padded, dtype=torch.int64), torch.ones_like(text)], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        llama(row, attention_mask=mask, position_ids=positions, past_key_values=cache)
        llama(text[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=cache)
        scales = cache.layers[0].storage.scales
        found.append({name: x for name, x in scales.tensors().items() if "mean" in name or "deviation" in name})
    assert found[0] and all(torch.isfinite(x).all() for x in found[0].values())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- what is put back
def test_every_part_of_a_model_gets_its_attention_back():
    config = Gemma3Config(
        text_config=dict(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, layer_types=["full_attention", "sliding_attention"], sliding_window=8,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager"})
    before = [x._attn_implementation for x in (config, config.text_config, config.vision_config)]
    assert before[1] == "eager" != before[2]
    evaluator = ProtocolEvaluator(model, Protocol.parse("W0"), AnTKVConfig.preset("identity"))
    for lane in (lambda: fast_lane(model), evaluator.active):
        with pytest.raises(MemoryError), lane():
            raise MemoryError
        assert [x._attn_implementation for x in (config, config.text_config, config.vision_config)] == before


# ------------------------------------------------------------------------------------------------- turns of one cache
IDENTITY = AnTKVConfig.preset("identity", window=16, chunk=16)


@pytest.mark.parametrize("max_length", (None, 200))
@pytest.mark.parametrize("way", (dict(prompt_lookup_num_tokens=3), "assistant"), ids=("prompt_lookup", "assistant"))
def test_assisted_decoding_reads_no_prompt_twice(llama, max_length, way):
    options = dict(GREEDY) | (dict(assistant_model=tiny_llama(num_hidden_layers=1)) if way == "assistant" else way)
    cache = AnTKVCache(llama.config, IDENTITY, max_length=max_length)
    text = torch.cat([llama.generate(ids(40), past_key_values=cache, **options), ids(5, seed=1)], 1)
    held = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=f"holds {held} tokens, and assisted decoding would read the whole prompt again"
    ):
        llama.generate(text, past_key_values=cache, **options)
    assert cache.get_seq_length() == held
    cache.on_new_prompt = "reset"
    expected = llama.generate(text, past_key_values=DynamicCache(config=llama.config), **options)
    assert torch.equal(llama.generate(text, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("mode", ("error", "reset"))
@pytest.mark.parametrize("max_length", (None, 200))
def test_new_tokens_alone_with_a_mask_over_all(llama, mode, max_length):
    caches = (
        AnTKVCache(llama.config, IDENTITY, max_length=max_length, on_new_prompt=mode),
        DynamicCache(config=llama.config),
    )
    texts = []
    for cache in caches:
        said = llama.generate(ids(40), past_key_values=cache, **GREEDY)
        new = torch.cat([said[:, -1:], ids(6, seed=1)], 1)  # the last token has not been read
        mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.int64)
        texts.append(llama.generate(new, attention_mask=mask, past_key_values=cache, **GREEDY))
    assert torch.equal(*texts) and caches[0].get_seq_length() == caches[1].get_seq_length() == 47 + 7 + 7
    assert caches[0]._guard.length == 61


def test_new_tokens_alone_need_room_for_what_is_held(llama):
    short = AnTKVCache(llama.config, IDENTITY, max_length=60)
    said = llama.generate(ids(40), past_key_values=short, **GREEDY)
    options = dict(attention_mask=torch.ones(1, 47 + 7, dtype=torch.int64), past_key_values=short)
    warned = pytest.warns(UserWarning, match="54 tokens of prompt and up to 8 new ones can need room for 61")
    with warned, pytest.raises(ValueError, match="make it with max_length=61"):
        llama.generate(said[:, -7:], **options, **GREEDY)


def test_antkv_generate_takes_what_generate_takes(llama):
    generate, prompt = antkv_generate(config=IDENTITY), ids(20)
    expected = llama.generate(prompt, **GREEDY)
    processors = dict(logits_processor=LogitsProcessorList(), stopping_criteria=StoppingCriteriaList())
    assert torch.equal(generate(llama, prompt, **processors, **GREEDY), expected)
    assert torch.equal(generate(llama, inputs=prompt, **GREEDY), expected)
    assert torch.equal(generate(llama, prompt, GenerationConfig(**GREEDY)), expected)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        antkv_generate(config=IDENTITY, max_length=0)
    with pytest.raises(ValueError, match="assistant has 130 tokens and the model 128.*past_key_values=AnTKVCache"):
        generate(llama, prompt, assistant_model=tiny_llama(vocab_size=130), **GREEDY)


def test_linear_attention_counts():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["linear_attention", "full_attention"], num_experts=0,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        decoder_sparse_step=1, mlp_only_layers=[0, 1],
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="1 linear attention"):
        cache = AnTKVCache(config, IDENTITY)
    model(ids(20) % 60, past_key_values=cache)
    held = [x for x in tree_leaves(vars(cache.layers[0])) if isinstance(x, torch.Tensor)]
    assert held and cache.memory_footprint().other_layers == sum(x.numel() * x.element_size() for x in held) > 0
