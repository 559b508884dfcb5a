"""Reads a model's RoPE off its config, in the canonical form of `antkv_hf.rotary`."""

from __future__ import annotations

import sys
import warnings

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..rotary import Rotary

_ROPE_IN_SLIDING_LAYERS = ("cohere2", "exaone4", "exaone_moe", "afmoe")  # model types; full attention has none there


def model_rotary(config: PreTrainedConfig) -> list[Rotary | None]:
    """RoPE of every layer; None for a layer (or model) without.

    The frequencies come from the model's own rotary embedding class, the channel pairing from applying its
    ``apply_rotary_pos_emb`` to unit vectors. RoPE whose frequencies change with the length (dynamic, longrope) is read
    at its initial ones: keys are still turned back and forth by the same angles, so only fidelity can suffer.

    RoPE of a model type that is not understood gives None for all layers, with a warning.

    Raises:
        ValueError: if channels are paired in a way that `Rotary` cannot say.
    """
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    module = _modeling_module(text)
    rotary_class = _rotary_class(module) if module is not None else None
    if rotary_class is None:
        if fields := [n for n in ("rope_parameters", "rope_theta", "rotary_dim") if getattr(text, n, None)]:
            warnings.warn(
                f"the RoPE of {text.model_type} ({fields[0]}={getattr(text, fields[0])}) is not understood: its keys "
                "are coded after it; calibrate this model with rope='none'",
                stacklevel=3,
            )
        return [None] * layers
    try:
        embedding = rotary_class(config=text)
    except TypeError:
        embedding = rotary_class(text)
    types = getattr(text, "layer_types", None) or ["full_attention"] * layers
    per_layer: list[Rotary | None] = []
    for layer, layer_type in enumerate(types):
        named = f"{layer_type}_inv_freq"
        prefix = f"{layer_type}_" if hasattr(embedding, named) else ""
        inv_freq = getattr(embedding, f"{prefix}inv_freq", None)
        if inv_freq is None or not _uses_rope(text, layer, layer_type):
            per_layer.append(None)
            continue
        scaling = float(getattr(embedding, f"{prefix}attention_scaling", 1.0))
        per_layer.append(Rotary(inv_freq.detach().float().clone(), _is_interleaved(module, inv_freq.shape[0]), scaling))
    return per_layer


def _modeling_module(config: PreTrainedConfig):
    try:
        return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    except KeyError:
        return None


def _rotary_class(module) -> type | None:
    names = [n for n, v in vars(module).items() if n.endswith("RotaryEmbedding") and isinstance(v, type)]
    texts = [n for n in names if "Text" in n]
    return getattr(module, (texts or names)[0]) if names else None


def _uses_rope(config: PreTrainedConfig, layer: int, layer_type: str) -> bool:
    """False for the layers that a model leaves without RoPE (SmolLM 3, Llama 4, Cohere 2, Falcon with ALiBi)."""
    if getattr(config, "alibi", False):
        return False
    flags = getattr(config, "no_rope_layers", None)
    if flags:
        return bool(flags[layer])
    return not (config.model_type.startswith(_ROPE_IN_SLIDING_LAYERS) and layer_type == "full_attention")


def _is_interleaved(module, pairs: int) -> bool:
    """Which channels turn together, seen by turning channel 0 by a right angle: channel 1, or channel `pairs`."""
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if apply is None or pairs == 1:
        return getattr(module, "apply_rotary_emb", None) is not None  # Llama 4's complex form pairs neighbours
    x = torch.zeros(1, 1, 1, 2 * pairs)
    x[..., 0] = 1.0
    turned = None
    for width in (2 * pairs, pairs):  # GPT-OSS takes cos and sin of one value a pair
        cos, sin = torch.zeros(1, 1, width), torch.ones(1, 1, width)
        for arguments in ((x, x, cos, sin), (x, cos, sin)):
            try:
                turned = apply(*arguments)
                break
            except (TypeError, RuntimeError):
                continue
        if turned is not None:
            break
    if turned is None:
        raise ValueError(
            f"apply_rotary_pos_emb of {module.__name__} takes arguments of an unknown form: its keys cannot be turned "
            "back to before RoPE; use DynamicCache for this model"
        )
    turned = (turned if isinstance(turned, torch.Tensor) else turned[0]).flatten()
    partner = int(turned.abs().argmax())
    if partner not in (1, pairs):
        raise ValueError(
            f"{module.__name__} pairs channel 0 with {partner} in RoPE, not with 1 or {pairs}, so its keys cannot be "
            "turned back to before RoPE: use DynamicCache for this model"
        )
    return partner == 1
