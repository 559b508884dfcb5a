"""Every model family of the list, tiny and random, in both lanes and four ways of decoding.

With the identity codec tokens equal `DynamicCache`'s; with a random codebook, or scalar codes, both lanes give the
same text. Keys turn back to before RoPE.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from helpers import random_codebook
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
)

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, antkv_generate
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.config import AnchorConfig

BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
MOE = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
HYBRID = dict(head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
MULTI_HEAD = dict(num_key_value_heads=4)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=128)
GEMMA = dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=0)
LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip

# family -> (config changes, number of quantized layers of 2)
FAMILIES = {
    "llama": ({}, 2),
    "llama-yarn": (dict(rope_parameters=YARN), 2),
    "mistral": (dict(sliding_window=None), 2),
    "mixtral": (dict(num_local_experts=4), 2),
    "qwen2": ({}, 2),
    "qwen2_moe": (dict(**MOE, shared_expert_intermediate_size=16), 2),
    "qwen3": (dict(head_dim=8), 2),
    "qwen3_moe": (MOE, 2),
    "phi": ({}, 2),
    "phi3": ({}, 2),
    "gemma": (dict(head_dim=8), 2),
    "gemma2": (dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8), 1),
    "gemma3_text": (dict(query_pre_attn_scalar=8, **HYBRID), 1),
    "gemma3n_text": (dict(**GEMMA, **HYBRID, laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0]), 1),
    "gemma4_text": (dict(**GEMMA, **HYBRID, global_head_dim=8), 1),
    "gpt_oss": (dict(**HYBRID, num_local_experts=4, num_experts_per_tok=2), 1),
    "llama4_text": (
        dict(
            head_dim=8, intermediate_size_mlp=48, num_local_experts=4, attention_chunk_size=16,
            layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], use_qk_norm=False,
        ),
        1,
    ),
    "olmo2": ({}, 2),
    "cohere": ({}, 2),
    "cohere2": (HYBRID, 1),
    "glm4": (dict(head_dim=8), 2),
    "granite": ({}, 2),
    "stablelm": ({}, 2),
    "starcoder2": ({}, 2),
    "smollm3": ({}, 2),
    "qwen3_next": (dict(**MOE, **LINEAR), 1),
    "gpt_neox": (MULTI_HEAD, 2),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, **MULTI_HEAD), 2),
    "opt": (dict(ffn_dim=48, word_embed_proj_dim=32, **MULTI_HEAD), 2),
    "falcon": ({}, 2),
}  # fmt: skip

# mode -> (input, options of generate)
MODES = {
    "greedy": ("one", {}),
    "left_padded": ("batch", {}),
    "beams": ("batch", dict(num_beams=3)),
    "prompt_lookup": ("one", dict(prompt_lookup_num_tokens=4)),
}
# Cells that transformers itself refuses with any cache, and what it says.
REFUSED_BY_TRANSFORMERS = {("qwen3_next", "prompt_lookup"): "assisted generation is not supported with stateful models"}
# sdpa has no softcap and no attention sinks, so these come in the eager lane (Gemma 2 of transformers 5.17 in sdpa,
# without its softcap). There keys are materialised: anchors are chosen without queries, and padding is not seen.
EAGER = ("gemma2", "gpt_oss")
NEW_TOKENS = 6
CONFIG = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=8, chunk=8, anchors=AnchorConfig(fraction=0.13, sinks=2))


@dataclass
class Family:
    """A model, the lane it comes in, and what it says with `DynamicCache`, by mode."""

    name: str
    model: Any
    own_lane: str
    quantized: int
    codebook: AnTKVCodebook
    dense: dict[str, Any] = field(default_factory=dict)

    def generate(self, mode: str, lane: str, cache, repeats: int = 1):
        """The prompt `repeats` times over, padded once."""
        inputs, options = INPUTS[MODES[mode][0]], MODES[mode][1]
        if repeats > 1:
            inputs = {name: torch.cat([t, *[t[:, 9:]] * (repeats - 1)], 1) for name, t in inputs.items()}
        self.model.set_attn_implementation(self.own_lane if lane == "own" else lane)
        return self.model.generate(
            **inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip

    def expected(self, mode: str):
        """`DynamicCache`'s output; skips a mode that it has not, once it was seen to say so."""
        if mode not in self.dense:
            call = lambda: self.generate(mode, "own", DynamicCache(config=self.model.config))
            why = REFUSED_BY_TRANSFORMERS.get((self.name, mode))
            if why is not None:
                with pytest.raises(ValueError, match=why):
                    call()
                pytest.skip(f"transformers has no {mode} for {self.name}: {why}")
            self.dense[mode] = call()
        return self.dense[mode]

    def cache(self, config: AnTKVConfig) -> AnTKVCache:
        return AnTKVCache(self.model.config, config, self.codebook if isinstance(config.key, VQSpec) else None)


def build(name: str) -> Family:
    changes, quantized = FAMILIES[name]
    kind = name.split("-")[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**BASE, **changes})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    lane = "eager" if kind in EAGER else model.config._attn_implementation
    return Family(name, model, lane, quantized, random_codebook(model, CONFIG))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return build(request.param)


def _inputs() -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    one, batch = torch.randint(3, 64, (1, 20), generator=g), torch.randint(3, 64, (2, 28), generator=g)
    one = torch.cat([one, one[:, 4:12]], 1)  # repeats: prompt lookup finds candidates
    mask = torch.ones_like(batch)
    batch[1, :9] = mask[1, :9] = 0
    return {
        "one": dict(input_ids=one, attention_mask=torch.ones_like(one)),
        "batch": dict(input_ids=batch, attention_mask=mask),
    }


INPUTS = _inputs()
quiet = pytest.mark.filterwarnings("ignore:AnTKVCache quantizes", "ignore:.*decode all keys")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", ("own", "antkv"))
@quiet
def test_identity_equals_dynamic_cache(family, lane, mode):
    assert family.own_lane == ("eager" if family.name in EAGER else "sdpa")
    expected = family.expected(mode)
    cache = family.cache(AnTKVConfig.preset("identity", window=8, chunk=4))
    out = family.generate(mode, lane, cache)
    assert torch.equal(out.sequences, expected.sequences)
    if mode == "left_padded":
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=2e-4, rtol=2e-3)
    assert [layer.storage.coded_length > 20 for layer in cache.quantized_layers] == [True] * family.quantized


@pytest.mark.parametrize("mode", MODES)
@quiet
def test_lanes_agree_on_a_random_codebook(family, mode):
    if family.name in EAGER and MODES[mode][0] == "batch":
        pytest.skip("eager attention does not tell the cache of left padding: its keys are coded as if further on")
    expected = family.expected(mode)
    score = "key_norm" if family.name in EAGER else "error_aware"  # the second needs queries
    outs = []
    for lane in ("own", "antkv"):
        cache = family.cache(CONFIG.replace(anchor_score=score))
        outs.append(family.generate(mode, lane, cache))
        assert [layer.storage.coded_length > 15 for layer in cache.quantized_layers] == [True] * family.quantized
    own, fast = outs
    assert torch.equal(own.sequences, fast.sequences)
    assert not torch.equal(own.logits[-1], expected.logits[-1]), "nothing was quantized: the test shows nothing"


@pytest.mark.parametrize("mode", MODES)
@quiet
def test_lanes_agree_on_scalar_codes(family, mode):
    """The codec that needs no codebook; a chunk is 32 tokens there, so prompts are longer."""
    if family.name in EAGER and MODES[mode][0] == "batch":
        pytest.skip("eager attention does not tell the cache of left padding: its keys are coded as if further on")
    if (family.name, mode) in REFUSED_BY_TRANSFORMERS:
        pytest.skip(f"transformers has no {mode} for {family.name}")
    score = "key_norm" if family.name in EAGER else "error_aware"
    config = AnTKVConfig.preset("ott-4bit", group=32, window=8, chunk=32).replace(anchor_score=score)
    outs = []
    for lane in ("own", "antkv"):
        cache = family.cache(config)
        outs.append(family.generate(mode, lane, cache, repeats=2))
        assert [layer.storage.coded_length >= 32 for layer in cache.quantized_layers] == [True] * family.quantized
    own, fast = outs
    assert torch.equal(own.sequences, fast.sequences)


def test_says_how_many_layers(family):
    said = f"AnTKVCache quantizes {family.quantized} of 2 layers of {family.model.config.model_type}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = family.cache(AnTKVConfig.preset("identity"))
    assert len(cache.quantized_layers) == family.quantized
    hybrid = [str(w.message) for w in caught if str(w.message).startswith(said)]
    assert len(hybrid) == (family.quantized < 2), [str(w.message) for w in caught]


REFUSED = {
    # multi-head latent attention, without and with sparse attention over an index (DSA)
    "deepseek_v2": r"deepseek_v2 uses multi-head latent attention .kv_lora_rank=512.*latents.*Use DynamicCache",
    "deepseek_v3": r"deepseek_v3 uses multi-head latent attention .kv_lora_rank=512.*Use DynamicCache",
    "deepseek_v32": r"deepseek_v32 uses multi-head latent attention.*Use DynamicCache",
    "glm_moe_dsa": r"glm_moe_dsa uses multi-head latent attention.*Use DynamicCache",
    "qwen4_exp_text": r"none of the 4 layers .*\(3 linear attention, 1 indexed sparse attention\).*Use DynamicCache",
    "mistral": r"none of the 2 layers of mistral .*\(2 sliding window\).*Use DynamicCache",
    "mamba": r"none of the 2 layers of mamba .*\(2 linear attention\).*Use DynamicCache",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_families(kind):
    changes = dict(num_hidden_layers=4 if kind == "qwen4_exp_text" else 2)
    if kind == "mistral":
        changes["sliding_window"] = 4096  # as Mistral v0.1 has it
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    with pytest.raises(ValueError, match=REFUSED[kind]):
        AnTKVCache(AutoConfig.for_model(kind, **changes), AnTKVConfig.preset("identity"))


def test_other_cache_implementations_are_refused(llama):
    """Static and other caches beside ours, and paged ones in the fast lane; nothing is cached then."""
    cache = AnTKVCache(llama.config, AnTKVConfig.preset("identity"))
    ids = INPUTS["one"]["input_ids"]
    for name in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match="Passing both `cache_implementation`.*use only one"):
            llama.generate(ids, past_key_values=cache, cache_implementation=name, max_new_tokens=2)
    llama.set_attn_implementation("antkv")
    try:
        with pytest.raises(ValueError, match=r"antkv.*not supported.*paged\|eager"):
            llama.generate(ids, past_key_values=cache, cache_implementation="paged", max_new_tokens=2)
    finally:
        llama.set_attn_implementation("sdpa")
    assert cache.get_seq_length() == 0


def test_paged_caches_never_meet_ours_in_the_sdpa_lane(llama, monkeypatch):
    """There is no place to refuse it: transformers leaves for continuous batching before it looks at our cache."""
    taken = {}

    class Left(Exception): ...

    def generate_batch(self, *args, **options):
        taken.update(options)
        raise Left

    monkeypatch.setattr(type(llama), "generate_batch", generate_batch)
    cache = AnTKVCache(llama.config, AnTKVConfig.preset("identity"))
    with pytest.raises(Left):
        llama.generate(INPUTS["one"]["input_ids"], past_key_values=cache, cache_implementation="paged")
    assert taken["past_key_values"] is cache and not cache._is_user_defined and cache.get_seq_length() == 0


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
@pytest.mark.parametrize("options", ({}, dict(num_beams=3)), ids=("greedy", "beams"))
def test_self_attention_of_an_encoder_decoder(lane, options):
    """Bart: its own keys are coded, those of the encoder stay in the cache beside ours."""
    config = AutoConfig.for_model(
        "bart", vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128, init_std=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval().requires_grad_(False)
    settings = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False, **options)
    inputs = INPUTS["batch"]
    expected = model.generate(**inputs, **settings)
    model.set_attn_implementation(lane)
    ours = AnTKVCache(config, AnTKVConfig.preset("identity", window=8, chunk=4))
    with pytest.raises(ValueError, match=r"keeps two caches: give past_key_values=EncoderDecoderCache\(AnTKVCache"):
        model.generate(**inputs, past_key_values=ours, **settings)
    both = EncoderDecoderCache(ours, DynamicCache(config=config))
    for given in ({}, dict(past_key_values=both)):
        with pytest.raises(ValueError, match="leave custom_generate out, and give.*EncoderDecoderCache"):
            model.generate(**inputs, **given, custom_generate=antkv_generate(config=ours.antkv_config), **settings)
    assert torch.equal(model.generate(**inputs, past_key_values=both, **settings), expected)
    assert [layer.storage.coded_length for layer in ours.quantized_layers] == [20, 20]


WITHOUT_KEY_PROJECTION = ("phi3", "gpt_neox", "gpt2", "opt", "falcon")


def test_keys_turn_back_to_before_rope(family):
    """What the cache receives, unrotated, is what the key projection (or its norm) put out."""
    if family.name in WITHOUT_KEY_PROJECTION:
        pytest.skip(f"{family.name} has no key projection of its own to compare with")
    model = copy.deepcopy(family.model)  # hooks of its own
    projected: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        if not hasattr(layer, "self_attn"):  # linear attention
            continue
        source = getattr(layer.self_attn, "k_norm", None) or getattr(layer.self_attn, "k_layernorm", None)
        if not isinstance(source, torch.nn.Module):
            source = layer.self_attn.k_proj
        source.register_forward_hook(lambda _, __, out, i=i: projected.__setitem__(i, out))
    cache = DynamicCache(config=model.config)
    ids = INPUTS["one"]["input_ids"][:, :15]  # within the sliding windows
    model(ids, past_key_values=cache)
    for i, (layer, rotary) in enumerate(zip(cache.layers, model_rotary(model.config))):
        if not getattr(layer, "is_initialized", False):
            continue
        keys = layer.keys[:, :, -15:]
        plain = keys if rotary is None else rotary.unrotate(keys, torch.arange(keys.shape[2]).view(1, 1, -1))
        true = projected[i]
        if true.ndim == 3:
            true = true.unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
        elif true.shape != keys.shape:
            true = true.transpose(1, 2)
        torch.testing.assert_close(plain, true, atol=1e-5, rtol=1e-4)
