"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school maths; right if the final number is equal.

An instruct model gets the question alone and is asked for steps and a boxed number; a base model gets 8 solved
questions of the training split first, without their calculator annotations. The number of an answer is that of the
first ``\\boxed{...}`` that holds one, else the last after ``####``, else after "answer is", else the last number in the
text; $, %, commas and a final period do not count, and 18.00 equals 18.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from problems import Problem, Score, Task

SHOTS = 8
INSTRUCTION = "{}\n\nReason step by step, and put the final number into \\boxed{{}}."
_MINUS = r"(?:(?<![\d.])-)?"  # after a digit or a dot it is a dash, or takes one number from another
_NUMBER = rf"{_MINUS}\$?\d[\d,]*(?:\.\d+)?|{_MINUS}\$?\.\d+"
_MARKED = (rf"####\s*({_NUMBER})", rf"answer is:?\s*\**\s*({_NUMBER})")


def load(folder: Path, chat: bool, count: int = 200) -> Task:
    """The first `count` questions of ``test.jsonl``; examples are from ``train_first64.jsonl``."""
    return task(_rows(folder / "test.jsonl")[:count], chat, [] if chat else _rows(folder / "train_first64.jsonl"))


def task(rows: list[dict], chat: bool, examples: list[dict]) -> Task:
    """Of rows with the fields ``question`` and ``answer``, whose number comes after ``####``."""
    solved = "".join(f"Question: {row['question']}\nAnswer: {_solution(row)}\n\n" for row in examples[:SHOTS])
    problems = []
    for i, row in enumerate(rows):
        prompt = INSTRUCTION.format(row["question"]) if chat else f"{solved}Question: {row['question']}\nAnswer:"
        target = row["answer"].split("####")[1].strip()
        problems.append(Problem(name=f"gsm8k/{i}", prompt=prompt, chat=chat, data={"target": target}))
    return Task("gsm8k", problems, 400, finished, score)


def finished(problem: Problem, answer: str) -> bool:
    """Whether the boxed number is complete, or a base model has begun a question of its own."""
    return any(_last_number(text) is not None for text in boxes(answer)) if problem.chat else "\nQuestion:" in answer


def score(problem: Problem, answer: str) -> Score:
    if not problem.chat:
        answer = answer.split("\nQuestion:")[0]
    found, target = final_number(answer), number(problem.data["target"])
    return Score(found is not None and found == target, f"{found} for {target}")


def final_number(answer: str) -> Decimal | None:
    """The number that an answer ends with, found as the module says; None if there is none."""
    answer = _plain(answer)
    for text in boxes(answer):
        if (value := _last_number(text)) is not None:
            return value
    for pattern in _MARKED:
        for text in reversed(re.findall(pattern, answer)):
            if (value := _last_number(text)) is not None:
                return value
    return _last_number(answer)


def boxes(answer: str) -> list[str]:
    """What the complete ``\\boxed{...}`` hold, which may have braces of its own, in order."""
    found = []
    for begin in re.finditer(r"\\boxed\s*\{", answer):
        depth = 1
        for at in range(begin.end(), len(answer)):
            depth += (answer[at] == "{") - (answer[at] == "}")
            if depth == 0:
                found.append(answer[begin.end() : at])
                break
    return found


def _plain(text: str) -> str:
    """Without the marks that LaTeX sets between thousands: ``1{,}200`` and ``1\\,200``."""
    return re.sub(r"(?<=\d)(?:\{,\}|\\[,!]|,\\!)\s?(?=\d{3})", ",", text)


def number(text: str) -> Decimal | None:
    """``"$1,234.50"`` -> 1234.5."""
    try:
        return Decimal(text.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None


def _last_number(text: str) -> Decimal | None:
    found = re.findall(_NUMBER, text)
    return number(found[-1]) if found else None


def _solution(row: dict) -> str:
    return re.sub(r"<<.*?>>", "", row["answer"]).replace("####", "The answer is")


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
