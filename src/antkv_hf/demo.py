"""What ``antkv demo`` shows: one small chat model answers questions from a handbook, with two caches side by side.

Every question is asked after the whole handbook. Bytes, speed and the perplexity of the handbook itself are measured on
the way, nothing is quoted.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .cache.cache import AnTKVCache
from .cache.footprint import MemoryFootprint
from .cache.layer import AnTKVLayer
from .codebook import AnTKVCodebook
from .codebook_names import find_codebook
from .demo_model import load_demo_model
from .demo_text import HANDBOOK, QUESTIONS
from .evaluation.baselines import tensor_bytes
from .evaluation.perplexity import evaluate

LONG = 8192  # tokens of the cache that shows what remains of the window when the text is long


def run_demo(
    codebook: str | Path | AnTKVCodebook | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer=None,
    questions: tuple[str, ...] = QUESTIONS,
    max_new_tokens: int = 40,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answers `questions` about the handbook with both caches and measures them.

    Args:
        codebook: folder, Hub repo or loaded codebook; the shipped 1-bit codebook of SmolLM2-135M-Instruct by default.
        model, tokenizer: a chat model that the codebook was made for; SmolLM2-135M-Instruct by default.
        questions: asked one by one, each after the whole handbook.
        max_new_tokens: tokens of each answer at most.
        say: called with lines of progress.

    Returns:
        JSON-ready: model, prompt_tokens, questions with both answers, and for each cache its bytes, tokens a second,
        bits per element and perplexity of the handbook read back through it (see `format_demo`).

    Raises:
        FileNotFoundError: no codebook or no model to be found. ValueError: a codebook of another model.
    """
    start = time.perf_counter()
    where = "the model given"
    if not isinstance(codebook, AnTKVCodebook):
        codebook = AnTKVCodebook.from_pretrained(str(codebook or find_codebook()))
    book = codebook
    if model is None:
        say("Loading SmolLM2-135M-Instruct ...")
        model, tokenizer, where = load_demo_model()
    device = model.device
    before = model.config._attn_implementation
    answers: dict[str, list[str]] = {"dynamic": [], "antkv": []}
    new_tokens, seconds = dict.fromkeys(answers, 0), dict.fromkeys(answers, 0.0)
    last: dict[str, Any] = {}
    prompts = [_prompt(tokenizer, question).to(device) for question in questions]
    prompt_tokens = max(prompt["input_ids"].shape[1] for prompt in prompts)
    makers: dict[str, tuple[str, Callable[[], Cache]]] = {
        "dynamic": (before, lambda: DynamicCache(config=model.config)),
        "antkv": ("antkv", lambda: AnTKVCache(model.config, codebook=book)),
    }
    try:
        for name, (lane, make) in makers.items():
            label = "DynamicCache" if name == "dynamic" else "AnTKVCache"
            model.set_attn_implementation(lane)
            for question, inputs in zip(questions, prompts, strict=True):
                say(f"{label}: {question}")
                cache = last[name] = make()
                began = time.perf_counter()
                out = model.generate(  # type: ignore[operator]
                    **inputs, past_key_values=cache, do_sample=False, max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                seconds[name] += time.perf_counter() - began
                new = out[0, inputs["input_ids"].shape[1] :]
                new_tokens[name] += len(new)
                answers[name].append(tokenizer.decode(new, skip_special_tokens=True).strip())
    finally:
        model.set_attn_implementation(before)
    say("Measuring the perplexity of the handbook, 128 tokens at a time through each cache ...")
    ids = tokenizer(HANDBOOK, return_tensors="pt", add_special_tokens=False)["input_ids"]
    plain, coded = evaluate(model, None, ids, book, protocols=("FP", "cache"), text_name="handbook")
    footprint = last["antkv"].memory_footprint()
    say(f"Filling a cache with {LONG:,} tokens ...")
    long = _filled(model, book, LONG)
    dense = tensor_bytes([(layer.keys, layer.values) for layer in last["dynamic"].layers])
    return {
        "model": where,
        "codebook": f"{book.model['base_model']}, {book.config.name_codec(book.tables)}",
        "prompt_tokens": prompt_tokens,
        "cached_tokens": footprint.tokens,
        "long": long.to_dict(),
        "questions": [
            {"question": question, "dynamic": answers["dynamic"][i], "antkv": answers["antkv"][i]}
            for i, question in enumerate(questions)
        ],
        "dynamic": {
            "bytes": dense,
            "tokens_per_second": round(new_tokens["dynamic"] / seconds["dynamic"], 2),
            "bits_per_element": plain.bits,
            "perplexity": round(plain.perplexity, 3),
        },
        "antkv": {
            "bytes": footprint.total,
            "tokens_per_second": round(new_tokens["antkv"] / seconds["antkv"], 2),
            "bits_per_element": round(footprint.bits_per_element, 3),
            "bits_per_element_with_window": round(footprint.bits_per_element_with_window, 3),
            "exact_tokens": last["antkv"].anchor_count(),
            "footprint": footprint.to_dict(),
            "perplexity": round(coded.perplexity, 3),
        },
        "seconds": round(time.perf_counter() - start, 1),
    }


def format_demo(result: dict[str, Any], as_json: bool = False, width: int = 100) -> str:
    """The result of `run_demo` for people, or as JSON."""
    if as_json:
        return json.dumps(result, indent=2)
    dynamic, antkv = result["dynamic"], result["antkv"]
    lines = [f"Model: {result['model']}", f"Codebook: {result['codebook']}", ""]
    for item in result["questions"]:
        lines.append(f"Q: {item['question']}")
        for label, name in (("DynamicCache", "dynamic"), ("AnTKVCache", "antkv")):
            text, first = " ".join(item[name].split()), f"   {label:<14}"
            lines.append(textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * len(first)))
        lines.append("")
    footprint, long = antkv["footprint"], result["long"]
    rows = [
        ("", "DynamicCache", "AnTKVCache"),
        (f"bytes for {result['cached_tokens']:,} tokens", f"{dynamic['bytes']:,}", f"{antkv['bytes']:,}"),
        ("  codes", "", f"{footprint['codes']:,}"),
        ("  anchors and sinks", "", f"{footprint['anchors'] + footprint['sinks']:,}"),
        ("  exact window and scores", "", f"{footprint['window'] + footprint['scores']:,}"),
        (
            f"bytes for {result['long']['tokens']:,} tokens",
            *(f"{result['long'][n]:,}" for n in ("dense_bytes", "total")),
        ),
        ("bits per element, past the window", *(f"{side['bits_per_element']:.2f}" for side in (dynamic, antkv))),
        ("exact tokens (all layers and heads)", "all", f"{antkv['exact_tokens']:,}"),
        ("new tokens a second, prompt included", *(f"{side['tokens_per_second']:.1f}" for side in (dynamic, antkv))),
        ("perplexity of the handbook", *(f"{side['perplexity']:.3f}" for side in (dynamic, antkv))),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines += [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines += [
        "",
        f"The window stays exact whatever the length, so the cache is {footprint['compression']:.1f} times smaller at "
        f"{result['cached_tokens']:,} tokens and {long['compression']:.1f} times at {long['tokens']:,}.",
        f"Tables shared by all caches: {footprint['tables']:,} bytes. The demo took {result['seconds']:.0f} seconds.",
    ]
    return "\n".join(lines)


def _filled(model: PreTrainedModel, codebook: AnTKVCodebook, tokens: int) -> MemoryFootprint:
    """Footprint of a cache of `tokens` tokens: bytes do not depend on what they are, so they are noise."""
    cache, described = AnTKVCache(model.config, codebook=codebook), codebook.model
    batch = (1, described["kv_heads"], tokens)
    for i, layer in enumerate(cache.layers):
        keys, values = (
            torch.randn(*batch, described[dim], dtype=model.dtype, device=model.device)
            for dim in ("head_dim", "value_dim")
        )
        cache.update(keys, values, i)
        if isinstance(layer, AnTKVLayer) and layer.storage is not None:
            layer.storage.commit()  # what attention does once it has scored the tokens
    return cache.memory_footprint()


def _prompt(tokenizer, question: str):
    chat = [{"role": "user", "content": f"{HANDBOOK}\n\nAnswer from the handbook, in one short sentence. {question}"}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
