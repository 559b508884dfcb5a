"""The layers of a new `AnTKVCache`: which ones are quantized, and with what codec."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from ..anchors import get_score
from ..codebook import AnTKVCodebook
from ..codecs import CodecForDevice, IdentityCodec, LayerCodec, scalar_codecs
from ..config import AnTKVConfig, ScalarSpec, check_config
from .layer import AnTKVLayer, LayerPlan, check_layer_numbers, layers_kept_as_they_are, quantizable_layers
from .model_rotary import model_rotary


def check_arguments(model_config: Any, config: Any, codebook: Any) -> None:
    """Raises TypeError, saying what to give, for arguments of `AnTKVCache` that are of another kind."""
    if not isinstance(model_config, PreTrainedConfig):
        raise TypeError(
            f"model_config is a {type(model_config).__name__}: give the config, AnTKVCache(model.config, ...)"
        )
    if isinstance(config, AnTKVCodebook):
        raise TypeError("the second argument is an AnTKVConfig; pass the codebook as AnTKVCache(..., codebook=...)")
    check_config(config)
    if isinstance(codebook, (str, Path)):
        raise TypeError(
            f"codebook={str(codebook)!r} is a name: AnTKVCache.from_pretrained({str(codebook)!r}, model=model) loads "
            "it and makes a cache, AnTKVCodebook.from_pretrained gives the codebook alone"
        )
    if codebook is not None and not isinstance(codebook, AnTKVCodebook):
        raise TypeError(f"codebook is a {type(codebook).__name__}: give an AnTKVCodebook")


def check_model(
    model: Any, hint: str = "load it with AutoModelForCausalLM.from_pretrained", optional: bool = True
) -> None:
    """Raises TypeError with a `hint` for a model that is none; None is taken where it is `optional`."""
    if not (model is None and optional) and not hasattr(model, "set_attn_implementation"):
        what = repr(model) if model is None or isinstance(model, (str, Path)) else f"a {type(model).__name__}"
        raise TypeError(f"model is {what}, not a transformers model: {hint}")


def cache_layers(
    model_config, text, config: AnTKVConfig, codebook: AnTKVCodebook | None, max_length: int | None, device_mesh: Any,
    compileable: bool = False,
) -> list:  # fmt: skip
    """transformers' own layers for this model, with the plain full-attention ones replaced by quantized ones.

    Args:
        text: the text part of `model_config`. The others: as `AnTKVCache`.

    Raises:
        ValueError: as `AnTKVCache`, of the model, the config's specs and the codebook.
    """
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type} uses multi-head latent attention (kv_lora_rank={text.kv_lora_rank}): its cache holds "
            "latents, not keys and values. Use DynamicCache for this model."
        )
    score = get_score(config.anchors.score)
    try:
        layers = list(DynamicCache(config=model_config).layers)
    except KeyError as error:  # some models register their cache layers only when they are loaded
        raise ValueError(
            f"transformers knows no cache layer for the {error} layers of {text.model_type}: load the model first, or "
            "leave past_key_values out"
        ) from error
    plain = quantizable_layers(layers, config)
    kept = layers_kept_as_they_are(layers, config)
    if not plain:
        raise ValueError(
            f"none of the {len(layers)} layers of {text.model_type} can be quantized ({kept}): only those of full "
            "attention over all past tokens are. Use DynamicCache for this model"
            + (", or leave layers out of skip_layers." if config.skip_layers else ".")
        )
    if compileable and len(plain) < len(layers):  # transformers compiles all of a cache or nothing of it
        raise ValueError(
            f"compileable=True needs every layer quantized, but of the {len(layers)} layers of {text.model_type} "
            f"transformers keeps {len(layers) - len(plain)} ({kept}): leave compileable out"
        )
    if len(layers) - len(plain) > len(config.skip_layers):
        warnings.warn(
            f"AnTKVCache quantizes {len(plain)} of {len(layers)} layers of {text.model_type}, those of full attention; "
            f"the others stay as transformers keeps them ({kept})",
            stacklevel=3,
        )
    codec_for_device: CodecForDevice = _identity_codec
    if isinstance(config.key, ScalarSpec):
        if codebook is not None:
            raise ValueError(f"codec {config.key} needs no codebook: leave codebook out, or give a config of its bits")
        codec_for_device = scalar_codecs(config, model_rotary(model_config))
    elif not config.is_identity:
        if codebook is None:
            raise ValueError(
                f"codec {config.key} needs a codebook of this model: load one with AnTKVCache.from_pretrained(...), "
                'make one with `antkv calibrate`, or do without: AnTKVConfig.preset("ott-2bit")'
            )
        codebook.check(text, config, plain)
        codec_for_device = codebook.codec_factory(config, model_rotary(model_config), device_mesh)
    check_layer_numbers(config, len(layers))  # last: a codebook of another model has been named as such
    for i in plain:
        layers[i] = AnTKVLayer(LayerPlan(i, config, score, codec_for_device, max_length, compileable))
    return layers


_IDENTITY = LayerCodec(IdentityCodec(), IdentityCodec())


def _identity_codec(layer_idx: int, device: torch.device, kv_heads: int, key_dim: int, value_dim: int) -> LayerCodec:
    return _IDENTITY
