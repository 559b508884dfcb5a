"""`antkv_generate`: a `custom_generate` hook that gives every call its own fresh cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .cache.cache import AnTKVCache
from .codebook import AnTKVCodebook
from .config import AnTKVConfig


def antkv_generate(codebook: str | Path | AnTKVCodebook | None = None, config: AnTKVConfig | None = None):
    """A function for ``model.generate(..., custom_generate=antkv_generate(repo))`` and for pipelines.

    Each call starts with an empty `AnTKVCache`, so one pipeline can serve any prompts in any order; then the usual
    decoding runs (greedy, sampling, beams, prompt lookup).

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
        mode = generation_config.get_generation_mode(model_kwargs.get("assistant_model"))
        decode = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
        if decode is None:
            raise ValueError(
                f"decoding mode {mode} is not part of this transformers; use greedy, sampling, beams or assisted"
            )
        return decode(model, input_ids, generation_config=generation_config, **model_kwargs)

    return generate
