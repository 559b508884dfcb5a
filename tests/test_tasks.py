"""Task benchmarks: the sandbox, what is read out of answers, prompts, and the script with a tiny model."""

from __future__ import annotations

import dataclasses
import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import answering
import gsm8k
import humaneval
import passkey
import tasks
from answering import Answer, CacheKind, answer_in_batches, append_answers, cache_kind, read_answers, tokenized
from helpers import random_codebook
from results import append_csv, read_csv, wilson
from sandbox import run_program
from tasks import Run
from tiny_tasks import QUESTIONS, tiny_model, tiny_tasks, tiny_tokenizer

from antkv_hf import AnTKVCache, AnTKVConfig

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")


# -------------------------------------------------------------------- sandbox
@linux
@pytest.mark.parametrize(
    "program, error",
    [
        ("assert sum([1, 2]) == 3", ""),
        ("assert sum([1, 2]) == 4", "AssertionError"),
        ("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass", "ran longer than 1 s"),
        ("hog = []\nwhile True: hog.append(bytes(1 << 24))", "MemoryError"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
        ("open('large', 'wb').write(bytes(1 << 24))", "OSError"),
        ("print('passed')\nexit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "without a verdict"),
        ("import os\nassert input() == ''", "EOFError"),
        ("import os\nassert not {'PATH', 'PYTHONPATH', 'ANTKV_DATA'} & set(os.environ) and not os.listdir()", ""),
    ],
)
def test_sandbox(program, error):
    passed, said = run_program(program, seconds=1 if "while True: pass" in program else 10)
    assert passed is (error == "") and error in said


# ------------------------------------------------------------------ HumanEval
ROW = {
    "task_id": "HumanEval/x",
    "entry_point": "decode",
    "prompt": 'import math\n\n\ndef encode(s: str):\n    return s[::-1]\n\n\ndef decode(s: str):\n    """Undo."""\n',
    "test": "def check(candidate):\n    assert candidate(encode('abc')) == 'abc' and math.pi > 3\n",
}
WHOLE = "def decode(s: str):\n    return s[::-1]\n"


@pytest.mark.parametrize(
    "answer, right, complete",
    [
        (f"```python\n{WHOLE}```", True, True),
        (f"Sure! Here it is:\n\n```python\nimport re\n\n{WHOLE}\nprint(decode('x'))\n```\nIt reverses.", True, True),
        (f"First:\n```bash\npip install x\n```\nthen\n  ```py\n{WHOLE}  ```\n", True, True),
        (f"```python\n{WHOLE}", True, False),  # cut off
        (f"{WHOLE}\n", True, False),  # no block at all
        ("```python\n    return s[::-1]\n```", True, False),  # only the body
        ("1. So:\n   ```python\n       return s[::-1]\n   ```", True, False),
        ("1. So:\n   ```python\n   def decode(s):\n       return s[::-1]\n   ```", True, True),
        (f"```python\nfrom __future__ import annotations\nimport re\n\n{WHOLE}```", True, True),
        ("```python\ndef decode(s):\n    return s\n```", False, True),
        ("I cannot do that.", False, False),
        ("", False, False),
    ],
)
def test_code_of_an_instruct_model(answer, right, complete):
    task = humaneval.task([ROW], chat=True)
    assert humaneval.finished(task.problems[0], answer) is complete
    assert _passes(humaneval.program(task.problems[0], answer)) is right


@pytest.mark.parametrize(
    "answer, right, complete",
    [
        ("    return s[::-1]\n", True, False),
        ("    return s[::-1]\n\n\ndef check(x):\n    broken(", True, True),
        ("    # reversed\n    return s[::-1]\n\n# Example\nprint(", True, True),
        ("    return s\n", False, False),
    ],
)
def test_code_of_a_base_model(answer, right, complete):
    task = humaneval.task([ROW], chat=False)
    assert task.problems[0].prompt == ROW["prompt"]
    assert humaneval.finished(task.problems[0], answer) is complete
    assert _passes(humaneval.program(task.problems[0], answer)) is right


def _passes(program: str) -> bool:
    try:
        exec(compile(program, "answer", "exec"), {})
    except Exception:
        return False
    return True


@linux
def test_canonical_solutions(antkv_data):
    task = humaneval.load(antkv_data / "humaneval" / "HumanEval.jsonl.gz", chat=True)
    assert len(task.problems) == 164
    for problem in (task.problems[i] for i in (0, 32, 38, 163)):
        row = problem.data
        answer = f"```python\n{row['prompt']}{row['canonical_solution']}```"
        assert task.score(problem, answer).correct
        assert not task.score(problem, answer.replace("return", "return None and")).correct


# ---------------------------------------------------------------------- GSM8K
@pytest.mark.parametrize(
    "answer, value",
    [
        ("16 - 7 = 9, so she makes \\boxed{18} dollars. Per week: 126.", "18"),
        ("Thus \\(\\boxed{\\$1,234.50}\\) and then \\boxed{2}.", "1234.5"),
        ("\\boxed{18\\text{ dollars}} a day for 7 days", "18"),
        ("\\boxed{1{,}200}", "1200"),
        ("It is \\(1\\,200\\)", "1200"),
        ("\\boxed{\\text{cut off} 3", "3"),
        ("10-4=6, i.e. 3-6", "6"),
        ("It fell to -6", "-6"),
        ("2.-5", "5"),
        ("It is \\boxed{50\\%}", "50"),
        ("#### 1,080", "1080"),
        ("The answer is $18.00. The next question has 3 parts.", "18"),
        ("The final answer is: **-7**", "-7"),
        ("She has 5 left, then 3.\n", "3"),
        ("half, .5", "0.5"),
        ("\\boxed{none} of them, 4 in all", "4"),
        ("No idea.", None),
    ],
)
def test_final_number(answer, value):
    assert gsm8k.final_number(answer) == (None if value is None else Decimal(value))


def test_gsm8k_prompts():
    chat, base = gsm8k.task(QUESTIONS, True, []), gsm8k.task(QUESTIONS, False, QUESTIONS)
    assert chat.problems[0].prompt.startswith(QUESTIONS[0]["question"]) and "\\boxed{}" in chat.problems[0].prompt
    prompt = base.problems[1].prompt
    assert "<<" not in prompt and "The answer is 36\n\nQuestion: Ann" in prompt and prompt.endswith("Answer:")
    assert base.score(base.problems[1], " 750\nThe answer is 750.00\n\nQuestion: What of 3?").correct
    assert not chat.score(chat.problems[0], "\\boxed{35}").correct
    assert chat.finished(chat.problems[0], "\\boxed{36\\text{ m}}") and not chat.finished(
        chat.problems[0], "\\boxed{x}"
    )
    assert chat.finished(chat.problems[0], "\\boxed{0}") and not chat.finished(chat.problems[0], "\\boxed{3")


# -------------------------------------------------------------------- passkey
@pytest.mark.parametrize("chat", [True, False])
def test_passkeys_are_where_they_should_be(chat):
    tokenizer = tiny_tokenizer(chat)
    length = 2000
    task = passkey.generated(length, _counter(tokenizer, chat), chat, keys=2)
    assert [p.group for p in task.problems] == ["0%"] * 2 + ["25%"] * 2 + ["50%"] * 2 + ["75%"] * 2 + ["100%"] * 2
    lines = task.problems[0].prompt.count(passkey.FILLER)
    for problem, depth in zip(task.problems, [d for d in passkey.DEPTHS for _ in range(2)]):
        needle = passkey.NEEDLE.format(problem.data["target"])
        before, after = problem.prompt.split(needle)
        assert before == passkey.INTRODUCTION + passkey.FILLER * round(depth * lines)
        assert before.count(passkey.FILLER) + after.count(passkey.FILLER) == lines
        ids, read = tokenized(tokenizer, problem)
        assert length - len(passkey.FILLER) < len(ids) <= length
        assert tokenizer.decode(ids[:read]).endswith(problem.read_first)
        assert "pass key?" in tokenizer.decode(ids[read:]) and needle not in tokenizer.decode(ids[read:])
    assert len({p.data["target"] for p in task.problems}) > 5
    with pytest.raises(ValueError, match="not 100"):
        passkey.generated(100, _counter(tokenizer, chat), chat)


def test_passkey_answers():
    problem = passkey.Problem("", "", True, {"target": "74509"})
    assert passkey.score(problem, "The pass key is 74509.").correct
    assert not passkey.score(problem, "74508, or 74509").correct and not passkey.score(problem, "none").correct
    assert passkey.finished(problem, "745 ") and passkey.finished(problem, "74509")
    assert not passkey.finished(problem, "It is 745")


def _counter(tokenizer, chat):
    return lambda prompt: len(tokenized(tokenizer, passkey.Problem("", prompt, chat))[0])


# ------------------------------------------------------------------- answering
@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_identity_cache_answers_as_dynamic_cache(model):
    """One by one, and in batches padded on the left; with and without a text that is read first."""
    tokenizer, identity = tiny_tokenizer(), AnTKVConfig.preset("identity")
    for task in tiny_tasks(["gsm8k", "passkey"], True, _counter(tokenizer, True)):
        del task.problems[3:]
        task.problems[0] = dataclasses.replace(task.problems[0], prompt=task.problems[0].prompt + " Think twice.")
        kinds = [
            cache_kind("fp", model.config),
            CacheKind("identity", "antkv", lambda length: AnTKVCache(model.config, identity), False),
        ]
        fp, own = (_texts(model, tokenizer, task, kind, batch) for kind, batch in zip(kinds, (1, 3)))
        assert fp == own and len(fp) == len(task.problems)


def test_memory_set_aside_gives_the_same_answers(model, tmp_path):
    """What --cuda-graphs does, here without a GPU: a cache of fixed length, decoded by `antkv_generate`."""
    random_codebook(model, AnTKVConfig.preset("1bit", window=32, chunk=32)).save_pretrained(tmp_path / "book")
    kind, tokenizer = cache_kind(str(tmp_path / "book"), model.config), tiny_tokenizer()
    assert kind.name == "book" and kind.can_replay and not cache_kind("ott-4bit", model.config).can_replay
    for task in tiny_tasks(["gsm8k", "passkey"], True, _counter(tokenizer, True)):
        del task.problems[2:]
        grown, fixed = (_texts(model, tokenizer, task, kind, 2, cuda_graphs=graphs) for graphs in (False, True))
        assert grown == fixed
    assert cache_kind(f"mine={tmp_path / 'book'}", model.config).name == "mine"
    with pytest.raises(FileNotFoundError, match="no codebook 'bok'"):
        cache_kind("bok", model.config)


def _texts(model, tokenizer, task, kind, batch, **options) -> dict[str, str]:
    found = answer_in_batches(model, tokenizer, task, task.problems, kind, batch=batch, batch_tokens=10**6, **options)
    return {answer.problem: answer.text for answers in found for answer in answers}


def test_answers_end_when_they_are_complete(model):
    tokenizer = tiny_tokenizer()
    (task,) = tiny_tasks(["gsm8k"], True, None)
    task = dataclasses.replace(task, max_new_tokens=40, finished=lambda problem, text: problem.name == "gsm8k/0")
    kind = cache_kind("fp", model.config)
    ((first, second),) = answer_in_batches(
        model, tokenizer, task, task.problems, kind, batch=2, batch_tokens=10**6
    )  # longest prompt first
    tokens = {first.problem: first.new_tokens, second.problem: second.new_tokens}
    assert tokens["gsm8k/0"] == answering.CHECK_EVERY and tokens["gsm8k/1"] > answering.CHECK_EVERY
    assert first.batch == 2 and first.bits == 32
    small = list(answer_in_batches(model, tokenizer, task, task.problems, kind, batch=2, batch_tokens=200))
    assert [len(answers) for answers in small] == [1, 1]


def test_torn_answers(tmp_path):
    path = tmp_path / "answers" / "a.jsonl"
    answers = [Answer(str(i), f"text {i}\n", i, 0.5, 2, 1.25, 3.5, {"gpu": "none"}) for i in range(3)]
    append_answers(path, answers[:2])
    path.write_text(path.read_text()[:-20])
    append_answers(path, answers[2:])
    assert list(read_answers(path).values()) == [answers[0], answers[2]]


# --------------------------------------------------------------------- script
def test_script_and_resume(tmp_path, monkeypatch, capsys):
    arguments = ["--tiny", "--out", str(tmp_path), "--caches", "fp", "ott-4bit", "--tasks", "gsm8k", "humaneval"]
    asked = []
    batches = answering._answer_batch

    def counted(model, tokenizer, task, prompts, *rest):
        asked.append(len(prompts))
        return batches(model, tokenizer, task, prompts, *rest)

    monkeypatch.setattr(answering, "_answer_batch", counted)
    tasks.main(arguments)
    rows = read_csv(tmp_path / "tasks.csv")
    assert [(r["task"], r["cache"]) for r in rows] == [
        (t, c) for t in ("gsm8k", "humaneval") for c in ("fp", "ott-4bit")
    ]
    assert {r["problems"] for r in rows} == {"2"} and float(rows[1]["bits"]) < 7 < float(rows[0]["bits"])
    assert "sandbox: no processes" in capsys.readouterr().out
    files = sorted((tmp_path / "answers").glob("*.jsonl"))
    scored = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(files) == 8 and files[1].name.endswith("scored.jsonl") and scored[0]["correct"] is False
    assert asked == [2, 2, 2, 2]

    tasks.main(arguments)  # nothing is left to do
    assert asked == [2, 2, 2, 2] and read_csv(tmp_path / "tasks.csv") == rows

    table = (tmp_path / "tasks.csv").read_text().splitlines(keepends=True)
    (tmp_path / "tasks.csv").write_text("".join(table[:-1]))  # as if killed after one answer of the last cache
    last = next(f for f in files if "humaneval" in f.name and "ott" in f.name and "scored" not in f.name)
    last.write_text(last.read_text().splitlines(keepends=True)[0] + '{"problem": "ti')
    tasks.main(arguments)
    assert asked == [2, 2, 2, 2, 1]
    again = read_csv(tmp_path / "tasks.csv")
    assert again[:3] == rows[:3] and again[3]["mean_new_tokens"] == rows[3]["mean_new_tokens"]


def test_shards(tmp_path):
    arguments = ["--tiny", "--out", str(tmp_path), "--caches", "fp", "--tasks", "gsm8k"]
    tasks.main([*arguments, "--shard", "0/2"])
    assert read_csv(tmp_path / "tasks.csv") == []
    tasks.main([*arguments, "--shard", "1/2", "--no-score"])
    tasks.main([*arguments, "--score-only"])
    (row,) = read_csv(tmp_path / "tasks.csv")
    assert row["problems"] == "2" and row["batch"] == "1"
    with pytest.raises(SystemExit):
        tasks.main([*arguments, "--shard", "2/2"])


def test_shards_that_end_together_write_one_row(tmp_path, monkeypatch):
    """Both saw no row before they answered; the second finds it when it holds the lock."""
    arguments = ["--tiny", "--out", str(tmp_path), "--caches", "fp", "--tasks", "gsm8k"]
    tasks.main([*arguments, "--no-score"])
    answers = Run.answers

    def late(run):
        found = answers(run)
        monkeypatch.setattr(Run, "answers", answers)
        tasks.main([*arguments, "--score-only"])
        return found

    monkeypatch.setattr(Run, "answers", late)
    tasks.main([*arguments, "--score-only"])
    assert len(read_csv(tmp_path / "tasks.csv")) == 1


def test_what_cannot_be_run_is_said(tmp_path):
    arguments = ["--tiny", "--out", str(tmp_path), "--tasks", "gsm8k"]
    with pytest.raises(SystemExit, match="--caches: two are called fp"):
        tasks.main([*arguments, "--caches", "fp", "fp"])
    with pytest.raises(SystemExit, match="tasks.py: no codebook 'bok'"):
        tasks.main([*arguments, "--caches", "bok"])


def test_against_fp(tmp_path):
    row = dict(model="m", task="t", prompt="chat", cache="my 1bit", dtype="float32", max_new_tokens="9", steps="graphs")
    for name, correct in (("m-t-chat-fp-float32-9-eager", "1101"), ("m-t-chat-my_1bit-float32-9-graphs", "1010")):
        lines = [json.dumps({"problem": str(i), "correct": c == "1"}) for i, c in enumerate(correct)]
        (tmp_path / f"{name}.scored.jsonl").write_text("\n".join(lines))
    assert tasks.against_fp(tmp_path, row) == "-2 +1"
    assert tasks.against_fp(tmp_path, row | {"cache": "fp", "steps": "eager"}) == ""
    assert tasks.against_fp(tmp_path, row | {"cache": "other"}) == ""


def test_table(tmp_path):
    assert wilson(0, 2) == pytest.approx((0, 0.6576), abs=1e-4)
    assert wilson(82, 164) == pytest.approx((0.4243, 0.5757), abs=1e-4)
    append_csv(tmp_path / "a.csv", {"a": 1, "b": "x, y"})
    append_csv(tmp_path / "a.csv", {"a": 2, "b": None})
    assert read_csv(tmp_path / "a.csv") == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    with pytest.raises(ValueError, match="a, b, not a, c"):
        append_csv(tmp_path / "a.csv", {"a": 1, "c": 2})
