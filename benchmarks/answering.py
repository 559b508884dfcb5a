"""Greedy answers of a model under a cache, in batches padded on the left, and the file that they are kept in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from problems import Problem, Task
from results import environment
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, antkv_generate
from antkv_hf.demo import find_codebook
from antkv_hf.evaluation.baselines import cache_bits, quantized_cache
from antkv_hf.static_storage import size_obstacle

CHECK_EVERY = 8  # steps between looks at whether an answer is complete: looking decodes its text


class CacheKind(NamedTuple):
    """A cache by name, and the attention implementation that serves it.

    `make` takes the tokens that a sequence can come to, or None for a cache that grows.
    """

    name: str
    implementation: str
    make: Callable[[int | None], Cache]
    can_replay: bool  # decode steps as CUDA graphs


def cache_kind(name: str, model_config) -> CacheKind:
    """The cache called `name`: ``fp`` (`DynamicCache`), ``quanto-int4`` and the like, ``ott-4bit``, or a codebook.

    ``NAME=PATH`` calls a codebook otherwise than its folder.

    Raises:
        FileNotFoundError, ValueError, ImportError: there is none of that name; it does not fit the model; its package
            is missing.
    """
    if name == "fp":
        return CacheKind(name, "sdpa", lambda length: DynamicCache(config=model_config), False)
    if name.startswith(("quanto-", "hqq-")):
        make = quantized_cache(name, model_config)
        return CacheKind(name, "sdpa", lambda length: make(), False)
    if name.startswith("ott-"):
        codebook, config = None, AnTKVConfig.preset(name)
    else:
        name, equals, path = name.rpartition("=")
        codebook = AnTKVCodebook.from_pretrained(find_codebook(path))
        name = name if equals else Path(path).name
        config = codebook.config
    AnTKVCache(model_config, config, codebook)  # a codebook that does not fit is told before the first batch
    return CacheKind(
        name, "antkv", lambda length: AnTKVCache(model_config, config, codebook, max_length=length),
        size_obstacle(config) is None,
    )  # fmt: skip


class Answer(NamedTuple):
    """What came out, and of what.

    `seconds`: the batch's time divided by its size. `bits`: those of an element of the quantized tokens; `bits_in_all`:
    on average, the exact window counted. `machine`: GPU and versions.
    """

    problem: str
    text: str
    new_tokens: int
    seconds: float
    batch: int
    bits: float
    bits_in_all: float
    machine: dict[str, str]


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by problem; the last line may be cut off, as a kill leaves it."""
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            answer = Answer(**json.loads(line))
        except ValueError:
            continue
        answers[answer.problem] = answer
    return answers


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if torn else "")
        file.writelines(json.dumps(answer._asdict()) + "\n" for answer in answers)


def prompt_text(tokenizer, problem: Problem) -> str:
    if not problem.chat:
        return problem.prompt
    messages = [{"role": "user", "content": problem.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def tokenized(tokenizer, problem: Problem) -> tuple[list[int], int]:
    """Token ids of the prompt, and how many of them the cache reads before the rest."""
    text = prompt_text(tokenizer, problem)
    found = tokenizer(text, add_special_tokens=not problem.chat, return_offsets_mapping=bool(problem.read_first))
    if not problem.read_first:
        return found["input_ids"], 0
    end = text.index(problem.read_first) + len(problem.read_first)
    return found["input_ids"], sum(stop <= end for _, stop in found["offset_mapping"])


def answer_in_batches(
    model, tokenizer, task: Task, problems: Sequence[Problem], kind: CacheKind, *, batch: int, batch_tokens: int,
    cuda_graphs: bool = False,
) -> Iterator[list[Answer]]:  # fmt: skip
    """Answers batch by batch, longest prompts first; every batch has a cache of its own.

    Args:
        batch: most problems of a batch.
        batch_tokens: most tokens of a batch, padding and new ones counted.
        cuda_graphs: decode steps are captured and replayed where the cache can; memory is then set aside at once.
    """
    prompts = sorted(((*tokenized(tokenizer, p), p) for p in problems), key=lambda found: -len(found[0]))
    while prompts:
        width = len(prompts[0][0]) + task.max_new_tokens
        size = max(1, min(batch, batch_tokens // width))
        yield _answer_batch(model, tokenizer, task, prompts[:size], kind, cuda_graphs and kind.can_replay)
        prompts = prompts[size:]


@torch.no_grad()
def _answer_batch(model, tokenizer, task: Task, prompts, kind: CacheKind, replay: bool) -> list[Answer]:
    problems = [problem for _, _, problem in prompts]
    width = max(len(ids) for ids, _, _ in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(own)) + own for own, _, _ in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own, _, _ in prompts], device=model.device)
    read = min(first + width - len(own) if first else 0 for own, first, _ in prompts)
    began = time.perf_counter()
    model.set_attn_implementation(kind.implementation)
    cache = kind.make(width + task.max_new_tokens if replay else None)
    if read:
        positions = (mask[:, :read].cumsum(1) - 1).clamp(min=0)
        model(
            ids[:, :read],
            attention_mask=mask[:, :read],
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
    complete = _Complete(tokenizer, task, problems, width, pad)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=task.max_new_tokens, pad_token_id=pad, eos_token_id=_ends(model, tokenizer)
        ),
        stopping_criteria=StoppingCriteriaList([complete]),
        **({"custom_generate": antkv_generate()} if replay else {}),
    )[:, width:].cpu()  # fmt: skip
    seconds = (time.perf_counter() - began) / len(problems)
    bits, machine = _bits(cache), environment(model.device)
    return [
        Answer(
            problem.name, tokenizer.decode(row, skip_special_tokens=True), int((row != pad).sum()), seconds,
            len(problems), *bits, machine,
        )
        for problem, row in zip(problems, out)
    ]  # fmt: skip


def _ends(model, tokenizer) -> list[int]:
    """End tokens of the model's own generation config and of its tokenizer (an instruct model's end of turn)."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends)


def _bits(cache: Cache) -> tuple[float, float]:
    if isinstance(cache, AnTKVCache):
        footprint = cache.memory_footprint()
        return footprint.bits_per_element, footprint.bits_per_element_with_window
    if isinstance(cache, DynamicCache):
        return (bits := 8.0 * cache.layers[0].keys.element_size()), bits
    return cache_bits(cache)


class _Complete(StoppingCriteria):
    """True for the sequences whose answer is complete, looked at every few steps."""

    def __init__(self, tokenizer, task: Task, problems: Sequence[Problem], start: int, pad: int) -> None:
        self.tokenizer, self.task, self.problems, self.start, self.pad = tokenizer, task, problems, start, pad
        self.done = [False] * len(problems)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        if (input_ids.shape[1] - self.start) % CHECK_EVERY == 0:
            for i, row in enumerate(input_ids[:, self.start :].tolist()):
                if not self.done[i] and row[-1] != self.pad:
                    text = self.tokenizer.decode(row, skip_special_tokens=True)
                    self.done[i] = self.task.finished(self.problems[i], text)
        return torch.tensor(self.done, device=input_ids.device)
