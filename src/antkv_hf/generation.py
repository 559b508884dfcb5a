"""`antkv_generate`: a `custom_generate` hook that gives every call its own fresh cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .cache.cache import AnTKVCache
from .cache.prompt_guard import locals_above
from .codebook import AnTKVCodebook
from .config import AnTKVConfig


def antkv_generate(codebook: str | Path | AnTKVCodebook | None = None, config: AnTKVConfig | None = None):
    """A function for ``model.generate(..., custom_generate=antkv_generate(repo))`` and for pipelines.

    Each call starts with an empty `AnTKVCache`, so one pipeline can serve any prompts in any order; then the usual
    decoding runs (greedy, sampling, beams, prompt lookup, assisted), with a streamer if there is one.

    Args:
        codebook: Hub repo, folder or loaded codebook; read once.
        config: replaces the codebook's defaults.
    """
    if isinstance(codebook, (str, Path)):
        codebook = AnTKVCodebook.from_pretrained(codebook)

    def generate(model, input_ids: torch.Tensor, *, generation_config, **model_kwargs: Any):
        # generate() has made a cache of its own by now: an empty one, replaced here.
        model_kwargs["past_key_values"] = AnTKVCache(
            model.config, config, codebook, device_mesh=getattr(model, "_device_mesh", None)
        )
        model_kwargs |= _left_out(generation_config, model_kwargs)
        mode = generation_config.get_generation_mode(model_kwargs.get("assistant_model"))
        decode = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
        if decode is None:
            raise ValueError(
                f"decoding mode {mode} is not part of this transformers; use greedy, sampling, beams or assisted"
            )
        return decode(model, input_ids, generation_config=generation_config, **model_kwargs)

    return generate


def _left_out(generation_config, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the calling `generate` that it gives its own decoding loops, but not to a `custom_generate`."""
    found = {}
    for name in ("streamer", "assistant_model"):
        value = model_kwargs.get(name) or next(locals_above("generate", name, 3), None)
        if value is not None:
            found[name] = value
    if "streamer" in found and generation_config.num_beams not in (None, 1):
        raise ValueError(f"a streamer cannot follow num_beams={generation_config.num_beams} beams: leave one out")
    return found
