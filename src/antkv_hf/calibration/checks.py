"""What can be calibrated, and with how much text: refused before any work starts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..cache.layer import check_layer_numbers, quantizable_layers
from ..cache.model_rotary import model_rotary
from ..config import AnTKVConfig, VQSpec
from ..rotary import Rotary
from ..tensor_parallel import tp_size


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError if the model is not a causal language model whose attention can be seen."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model: only causal language models are calibrated")
    if not model.can_generate():
        raise ValueError(
            f"{name} does not generate text: load it with AutoModelForCausalLM; an encoder has no KV cache to quantize"
        )
    text = model.config.get_text_config(decoder=True)
    if rank := getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type} uses multi-head latent attention (kv_lora_rank={rank}): its cache holds latents, not "
            "keys and values"
        )
    if (processes := tp_size(model.config, getattr(model, "_device_mesh", None))) > 1:
        raise ValueError(
            f"{name} is spread over {processes} tensor-parallel processes, but calibration needs every head in one: "
            'load it whole in each process, or with device_map="auto" in a single one'
        )
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not use transformers' AttentionInterface: its keys cannot be seen")


def weights_digest(model: PreTrainedModel) -> str:
    """Hash by which a run knows its model again: the name and the first elements of each parameter."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(name.encode())
        if not parameter.is_meta:
            weights.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return weights.hexdigest()[:16]


def layers_to_learn(model: PreTrainedModel, config: AnTKVConfig) -> dict[int, Rotary | None]:
    """Full-attention layers that are not skipped, with the RoPE to take off their keys.

    Raises:
        ValueError: there is none, or `layer_specs` or `skip_layers` names a layer that is not one.
    """
    layers = list(DynamicCache(config=model.config).layers)
    check_layer_numbers(config, len(layers))
    found = quantizable_layers(layers, config)
    if not found:
        kinds = dict(Counter(type(layer).__name__ for layer in layers))
        raise ValueError(
            f"{type(model).__name__} has no layer to calibrate among its {len(layers)} ({kinds}, skip_layers="
            f"{config.skip_layers}): only full-attention layers are quantized"
        )
    if other := [i for i in config.layer_specs if i not in found]:
        kind = "skipped" if other[0] in config.skip_layers else f"a {type(layers[other[0]]).__name__}"
        raise ValueError(
            f"layer_specs names layer {other[0]}, which is {kind} and gets no tables: leave it out, or out of "
            "skip_layers"
        )
    rotary = model_rotary(model.config) if config.rope == "pre" else [None] * len(layers)
    return {i: rotary[i] for i in found}


def check_sizes(
    wanted: Sequence[tuple[int, str, VQSpec]],
    described: dict[str, Any],
    rotary: dict[int, Rotary | None],
    tokens: int,
    window: int,
    samples: int,
) -> None:
    """Raises ValueError if head sizes, tokens or samples do not suffice for the tables `wanted`: layer, role, spec."""
    for layer, role, spec in wanted:
        spec.groups(described["head_dim" if role == "key" else "value_dim"])
        if role == "key" and spec.sub_dim % 2 and rotary[layer] is not None:
            raise ValueError(
                f"key spec {spec} has an odd sub_dim {spec.sub_dim}, but both channels of a RoPE pair must "
                "stay in one sub-vector: choose an even one"
            )
    if window < 2:
        raise ValueError(f"window={window} must be at least 2 tokens")
    if tokens < window:
        raise ValueError(f"tokens={tokens} is less than one window of {window} tokens: raise tokens, or lower window")
    available = min(samples, tokens // window * window)
    for _, role, spec in wanted:
        if available < spec.centroids:
            raise ValueError(
                f"{available} samples (samples={samples}, tokens={tokens}) are fewer than the {spec.centroids} "
                f"centroids of the {role} spec {spec}: raise both to {spec.centroids} at the very least, better to "
                f"{64 * spec.centroids}"
            )
