"""`antkv_generate`: a `custom_generate` hook that gives every call a cache of its own and decodes with CUDA graphs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from . import graphs
from .cache.cache import AnTKVCache
from .cache.prompt_guard import check_generate, check_room, locals_above
from .codebook import AnTKVCodebook
from .compiled_mlps import compile_options
from .config import AnTKVConfig, check_config
from .specs import whole_number
from .static_storage import size_obstacle

_STEPWISE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # one token a sequence and step, nothing reordered
_BY_GENERATE = {"stopping_criteria", "logits_processor", "use_cache"}  # what transformers' `generate` always passes on


def antkv_generate(
    codebook: str | Path | AnTKVCodebook | None = None,
    config: AnTKVConfig | None = None,
    *,
    max_length: int | None = None,
    cuda_graphs: bool | None = None,
    compile_mlps: bool | dict[str, Any] = False,
):
    """A function for ``model.generate(..., custom_generate=antkv_generate(repo))`` and for pipelines.

    Each call starts with an empty `AnTKVCache`, so one pipeline can serve any prompts in any order; then the usual
    decoding runs (greedy, sampling, beams, prompt lookup, assisted), with a streamer if there is one. A filled
    `AnTKVCache` given as `past_key_values` is used as it is. ``antkv_generate(repo)(model, input_ids, ...)`` is the
    same as ``model.generate(input_ids, ...)`` with it.

    On a GPU, greedy decoding and sampling replay a captured step (see `graphs`): memory for the cache is then set aside
    at once. The tokens are the same. Scalar codes and ``anchors.max_tokens`` get a cache that grows, and no replay.

    Args:
        codebook: Hub repo, folder or loaded codebook; read once.
        config: replaces the codebook's defaults.
        max_length: tokens, prompt included, that a cache is made for (`AnTKVCache`). By default as many as the call
            can give where steps are replayed, and a cache that grows elsewhere. Beams and assisted decoding always get
            one that grows; beside scalar codes and ``anchors.max_tokens``, which need one, it is an error.
        cuda_graphs: None: where they can be used, with a warning where only the call stands in the way; True: raise
            where they cannot; False: never.
        compile_mlps: whether `torch.compile` makes the MLPs of the model's layers faster in replayed steps (see
            `compiled_mlps`), or its arguments: ``dict(mode="max-autotune-no-cudagraphs")``. The model is left as it is.
            Compiling takes seconds to a minute, once a process; fused 16-bit sums round otherwise, so that a token can
            differ. Where it cannot be done, a warning says why.

    Raises:
        ValueError: `max_length` is below 1; and when it is called: `past_key_values` is a cache of another kind,
            ``use_cache=False``, or the model is an encoder-decoder.
        RuntimeError: ``cuda_graphs=True`` and steps cannot be replayed, or MLPs not compiled; the message says why.
        TypeError, ValueError: `compile_mlps` is neither a bool nor arguments that work within a captured step, or
            asked for with ``cuda_graphs=False``; another argument is of another kind.
    """
    if codebook is not None and not isinstance(codebook, (str, Path, AnTKVCodebook)):
        raise TypeError(
            f"codebook is a {type(codebook).__name__}: give a codebook or its name, antkv_generate(repo), and the "
            "model to what it returns: model.generate(..., custom_generate=antkv_generate(repo))"
        )
    check_config(config)
    if max_length is not None and whole_number("max_length", max_length, 4096) < 1:
        raise ValueError(f"max_length={max_length} must be at least 1: tokens of prompt and answer together")
    options = compile_options(compile_mlps)
    if options is not None and cuda_graphs is False:
        raise ValueError("compile_mlps compiles for replayed steps, but cuda_graphs=False: leave one of them out")
    if isinstance(codebook, (str, Path)):
        codebook = AnTKVCodebook.from_pretrained(codebook)

    def generate(model, input_ids: torch.Tensor | None = None, generation_config=None, **model_kwargs: Any):
        if generation_config is None or not model_kwargs.keys() >= _BY_GENERATE:  # called by itself
            if input_ids is not None:  # else they may be called `inputs`
                model_kwargs["inputs"] = input_ids
            return model.generate(generation_config=generation_config, custom_generate=generate, **model_kwargs)
        model_kwargs |= _left_out(model, generation_config, model_kwargs)
        mode = generation_config.get_generation_mode(model_kwargs.get("assistant_model"))
        decode = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
        if decode is None:
            raise ValueError(
                f"decoding mode {mode.value} is not part of this transformers; use greedy, sampling, beams or assisted"
            )
        if mode not in _STEPWISE:
            unusable: str | None = f"{mode.value} is not greedy decoding or sampling"
        else:
            unusable = "switched off" if cuda_graphs is False else _no_gpu(model)
        # generate() has made a cache of its own by now unless the user gave one: an empty one, replaced here.
        cache = model_kwargs.get("past_key_values")
        held: int | None = None  # tokens of the user's own cache
        if cache is not None and getattr(cache, "_is_user_defined", False):
            held = cache.get_seq_length()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                "antkv_generate gives a call one cache, and an encoder-decoder model keeps two: leave custom_generate "
                "out, and give generate past_key_values=EncoderDecoderCache(AnTKVCache(model.config, config), "
                "DynamicCache(config=model.config)) alone"
            )
        check_generate(generation_config.use_cache, held, False)
        if held is not None and not isinstance(cache, AnTKVCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} of {held} tokens, which antkv_generate "
                "would replace by a cache of its own: leave it out, give an AnTKVCache, or leave custom_generate out"
            )
        if not isinstance(cache, AnTKVCache):
            kept = config or getattr(codebook, "config", None)
            if unusable is None and kept is not None:
                unusable = size_obstacle(kept)
            limit = generation_config.max_length if max_length is None and unusable is None else max_length
            limit = limit if mode in _STEPWISE else None
            embedded = model_kwargs.get("inputs_embeds")
            if limit is not None and max_length is None and embedded is not None and not _tokens(input_ids):
                limit += embedded.shape[1]  # generate() counts new tokens only then
            mesh = getattr(model, "_device_mesh", None)
            cache = AnTKVCache(model.config, config, codebook, max_length=limit, device_mesh=mesh)
            model_kwargs["past_key_values"] = cache
            check_room(cache.max_length, _tokens(input_ids), generation_config.max_length)
        avoidable = False  # whether another call would have had replayed steps
        if unusable is None:
            unusable = graphs.obstacle(model, cache, model_kwargs.get("attention_mask"))
            avoidable = unusable is not None and graphs.lasting_obstacle(model, cache) is None
        if unusable is None:
            model = graphs.graphed(model, cache, strict=bool(cuda_graphs), compile_options=options)
        elif cuda_graphs:
            raise RuntimeError(
                f"cuda_graphs=True, but decode steps cannot be replayed: {unusable}; leave cuda_graphs out"
            )
        elif options is not None:
            warnings.warn(
                f"antkv_generate: compile_mlps is left out, since decode steps cannot be replayed: {unusable}",
                stacklevel=3,
            )
        elif avoidable:
            warnings.warn(
                f"antkv_generate: decode steps are not replayed as CUDA graphs: {unusable}; give cuda_graphs=False to "
                "say that this is meant", stacklevel=3,
            )  # fmt: skip
        return decode(model, input_ids, generation_config=generation_config, **model_kwargs)

    return generate


def _tokens(input_ids: torch.Tensor | None) -> int:
    return 0 if input_ids is None else input_ids.shape[1]


def _no_gpu(model) -> str | None:
    return None if model.device.type == "cuda" else f"the model is on {model.device}, not on a GPU"


def _vocabulary(model) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _left_out(model, generation_config, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the calling `generate` that it gives its own decoding loops, but not to a `custom_generate`."""
    found = {}
    for name in ("streamer", "synced_gpus", "assistant_model", "inputs_tensor"):
        value = model_kwargs.get(name) or next(locals_above("generate", name, 3), None)
        if value is not None:
            found[name] = value
    if "assistant_model" not in found:
        found.pop("inputs_tensor", None)
    assistant = found.get("assistant_model")
    if assistant is not None and _vocabulary(assistant) != _vocabulary(model):
        raise ValueError(
            f"the assistant has {_vocabulary(assistant)} tokens and the model {_vocabulary(model)}, and transformers "
            "keeps their tokenizers from a custom_generate: leave it out, and give past_key_values=AnTKVCache(...)"
        )
    if "streamer" in found and generation_config.num_beams not in (None, 1):
        raise ValueError(f"a streamer cannot follow num_beams={generation_config.num_beams} beams: leave one out")
    return found
