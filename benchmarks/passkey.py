"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): a number hidden in filler text, asked for at the end.

The cache holds the text before the question is read, so every token of the answer comes out of the cache as stored.
Lengths count all tokens of the prompt, chat template included; depth 0 puts the needle before all filler lines, depth 1
after them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from problems import Problem, Score, Task

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key.\n"
QUESTION = "What is the pass key? Answer with the number only."
COMPLETION = "What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def generated(length: int, count_tokens: Callable[[str], int], chat: bool, keys: int = 4) -> Task:
    """`keys` numbers of 5 digits at each depth, in prompts of `length` tokens or up to a filler line less.

    Args:
        count_tokens: tokens of a prompt, chat template included.

    Raises:
        ValueError: `length` does not hold the prompt without filler.
    """
    lines = _lines_for(length, lambda n: count_tokens(text_with_key("00000", n, 0) + _question(chat)))
    problems = []
    for depth in DEPTHS:
        for i in range(keys):
            name = f"{length}/{depth:g}/{i}"
            key = str(random.Random(name).randrange(10000, 100000))
            problems.append(_problem(name, text_with_key(key, lines, round(depth * lines)), key, chat, f"{depth:.0%}"))
    return Task(f"passkey-{length}", problems, 16, finished, score)


def load(path: Path, chat: bool) -> Task:
    """Prompts from a file with the fields ``input`` and ``target`` (KIVI's ``passkey_examples.jsonl``)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    problems = [
        _problem(f"kivi/{i}", row["input"].rstrip() + "\n", row["target"], chat, "kivi") for i, row in enumerate(rows)
    ]
    return Task("passkey-kivi", problems, 16, finished, score)


def text_with_key(key: str, lines: int, needle_line: int) -> str:
    """`lines` filler lines with the needle after the first `needle_line` of them."""
    return INTRODUCTION + FILLER * needle_line + NEEDLE.format(key) + FILLER * (lines - needle_line)


def finished(problem: Problem, answer: str) -> bool:
    """Whether the first number is complete."""
    return re.search(r"\d\D|\d{5}", answer) is not None


def score(problem: Problem, answer: str) -> Score:
    """Right if the first number in the answer is the key."""
    found = re.search(r"\d+", answer)
    given = found[0] if found else "no number"
    return Score(given == problem.data["target"], f"{given} for {problem.data['target']}")


def _question(chat: bool) -> str:
    return QUESTION if chat else COMPLETION


def _problem(name: str, text: str, key: str, chat: bool, group: str) -> Problem:
    return Problem(
        name=name, prompt=text + _question(chat), chat=chat, data={"target": key}, read_first=text, group=group
    )


def _lines_for(length: int, tokens: Callable[[int], int]) -> int:
    """The most filler lines with which a prompt has at most `length` tokens."""
    empty = tokens(0)
    if empty > length:
        raise ValueError(
            f"a passkey prompt without filler has {empty} tokens; choose a length above that, not {length}"
        )
    low, high = 0, 1
    while tokens(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return low
