"""What a task is made of: problems, how long an answer may be, when it is complete, and what makes it right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Score(NamedTuple):
    """`detail` says what was compared or what went wrong."""

    correct: bool
    detail: str


@dataclass(frozen=True)
class Problem:
    """One question.

    Args:
        name: unique within its task.
        prompt: a user's message (`chat`) or text that a base model goes on with.
        data: what the task's functions need to judge an answer.
        read_first: the prompt's part that the cache holds before the rest is read ("": all is read at once).
        group: what results are also counted by, e.g. a depth.
    """

    name: str
    prompt: str
    chat: bool
    data: dict[str, Any] = field(default_factory=dict)
    read_first: str = ""
    group: str = ""


@dataclass(frozen=True)
class Task:
    """Problems of one kind; `finished` and `score` take a problem and the text of its answer.

    Args:
        max_new_tokens: most tokens of an answer.
        finished: whether what follows can no longer change the score.
    """

    name: str
    problems: list[Problem]
    max_new_tokens: int
    finished: Callable[[Problem, str], bool]
    score: Callable[[Problem, str], Score]
