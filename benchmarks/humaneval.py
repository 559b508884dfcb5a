"""HumanEval (Chen et al., arXiv 2107.03374): complete 164 Python functions; right if the hidden tests pass.

An instruct model is asked for the whole function in a code block; a base model goes on with the prompt. Answers run in
`sandbox`.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from textwrap import dedent, indent

from problems import Problem, Score, Task
from sandbox import run_program

INSTRUCTION = (
    "Complete the following Python function. Answer with the complete function, imports included, in one Python code "
    "block.\n\n```python\n{}```"
)
# At the beginning of a line, none of these belongs to the function any more.
STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint", "\nassert", "\n```", "\nimport ", "\nfrom ")
_BLOCK = re.compile(r"^[ \t]*```[ \t]*[\w+-]*[ \t]*\n(.*?)(^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
_CODE_LINE = re.compile(r"^(?:def |class |import |from |@)", re.MULTILINE)


def load(path: Path, chat: bool) -> Task:
    """The task from ``HumanEval.jsonl.gz``."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return task([json.loads(line) for line in file], chat)


def task(rows: list[dict], chat: bool) -> Task:
    """Of rows with the fields ``task_id``, ``prompt``, ``entry_point`` and ``test``."""
    problems = []
    for row in rows:
        prompt = INSTRUCTION.format(row["prompt"].rstrip() + "\n") if chat else row["prompt"]
        problems.append(Problem(row["task_id"], prompt, chat, data=row))
    return Task("humaneval", problems, 512, finished, score)


def finished(problem: Problem, answer: str) -> bool:
    """Whether the code block with the function is closed, or a base model has left the function."""
    if not problem.chat:
        return any(stop in answer for stop in STOPS)
    return any(closed and _defines(dedent(code), problem) for code, closed in _BLOCK.findall(answer))


def score(problem: Problem, answer: str) -> Score:
    verdict = run_program(program(problem, answer))
    return Score(verdict.passed, verdict.error or "passed")


def program(problem: Problem, answer: str) -> str:
    """Source that raises unless the answer passes the hidden tests."""
    row = problem.data
    code = _code(problem, answer) if problem.chat else _until_stop(answer)
    if problem.chat and _defines(code, problem):
        # Imports and helpers that the prompt gave; an answer need not repeat them.
        code = row["prompt"][: row["prompt"].index(f"def {row['entry_point']}")] + code
    else:
        code = row["prompt"] + code
    code = "".join(_FUTURE.findall(code)) + _FUTURE.sub("", code)  # nothing may stand before them
    return f"{code}\n{row['test']}\ncheck({row['entry_point']})\n"


def _code(problem: Problem, answer: str) -> str:
    """The first block that defines the function, else the first block, else the answer from its first line of code."""
    blocks = [dedent(code) for code, _ in _BLOCK.findall(answer)]  # those of a list's item are indented
    for code in blocks:
        if _defines(code, problem):
            return code
    if blocks:
        first = _BLOCK.findall(answer)[0][0]
        return first if first == blocks[0] else indent(blocks[0], "    ")  # the function's body alone
    found = _CODE_LINE.search(answer)
    return answer[found.start() :] if found else answer


def _defines(code: str, problem: Problem) -> bool:
    return re.search(rf"^def {re.escape(problem.data['entry_point'])}\b", code, re.MULTILINE) is not None


def _until_stop(answer: str) -> str:
    return answer[: min((at for at in map(answer.find, STOPS) if at >= 0), default=len(answer))]
