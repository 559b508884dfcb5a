"""Model families on tiny random models: identity equals DynamicCache in both lanes; keys turn back to before RoPE."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from antkv_hf import AnTKVCache, AnTKVConfig
from antkv_hf.cache.layer import AnTKVLayer
from antkv_hf.cache.model_rotary import model_rotary

BASE = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MOE = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
HYBRID = dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention"] * 3 + ["full_attention"])
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=128)

# family -> (config changes, number of quantized layers of 4)
FAMILIES = {
    "llama": ({}, 4),
    "llama-yarn": (dict(rope_parameters=YARN), 4),
    "mistral": (dict(sliding_window=None), 4),
    "mixtral": (dict(num_local_experts=4), 4),
    "qwen2": ({}, 4),
    "qwen3": (dict(head_dim=16), 4),
    "qwen3_moe": (MOE, 4),
    "phi": ({}, 4),
    "phi3": ({}, 4),
    "gemma": (dict(head_dim=16), 4),
    "gemma2": (dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16), 2),
    "gemma3_text": (dict(query_pre_attn_scalar=16, **HYBRID), 1),
    "gpt_oss": (dict(head_dim=16, sliding_window=16, num_local_experts=4, num_experts_per_tok=2), 2),
    "olmo2": ({}, 4),
    "cohere": ({}, 4),
    "cohere2": (dict(head_dim=16, sliding_window=16), 1),
    "glm4": (dict(head_dim=16), 4),
    "granite": ({}, 4),
    "stablelm": ({}, 4),
    "starcoder2": ({}, 4),
    "smollm3": ({}, 4),
    "gpt_neox": ({}, 4),
    "gpt2": (dict(n_embd=64, n_layer=4, n_head=4), 4),
    "opt": (dict(ffn_dim=96, word_embed_proj_dim=64), 4),
    "falcon": ({}, 4),
}


def build(name: str):
    changes, quantized = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **{**BASE, **changes})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), quantized


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :9] = mask[1, :9] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:AnTKVCache quantizes", "ignore:.*decode all keys")
def test_identity_equals_dynamic_cache(family, batch):
    model, quantized = build(family)
    options = dict(
        max_new_tokens=20, min_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    default = model.config._attn_implementation
    expected = model.generate(**batch, past_key_values=DynamicCache(config=model.config), **options)
    for lane in (default, "antkv"):
        model.set_attn_implementation(lane)
        cache = AnTKVCache(model.config, AnTKVConfig.preset("identity", window=8, chunk=4))
        assert len(cache.quantized_layers) == quantized
        out = model.generate(**batch, past_key_values=cache, **options)
        for ours, theirs in zip(out.logits, expected.logits):
            # sdpa ignores Gemma 2's softcap where the family allows it, so lanes are compared by their own reference
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-3)
        assert all(layer.storage.coded_length > 30 for layer in cache.layers if isinstance(layer, AnTKVLayer))


WITH_KEY_PROJECTION = [f for f in FAMILIES if f not in ("phi3", "gpt_neox", "gpt2", "opt", "falcon")]


@pytest.mark.parametrize("family", WITH_KEY_PROJECTION)
def test_keys_turn_back_to_before_rope(family, batch):
    """What the cache receives, unrotated, is what the key projection (or its norm) put out."""
    model, _ = build(family)
    projected: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        source = getattr(layer.self_attn, "k_norm", None) or getattr(layer.self_attn, "k_layernorm", None)
        if not isinstance(source, torch.nn.Module):
            source = layer.self_attn.k_proj
        source.register_forward_hook(lambda _, __, out, i=i: projected.__setitem__(i, out))
    cache = DynamicCache(config=model.config)
    ids = batch["input_ids"][:, :15]  # within the sliding windows
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
