"""Greedy accuracy of a model under several caches: HumanEval, GSM8K, passkey retrieval.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/tasks.py --model FOLDER --out RESULTS --data DATA \\
        --caches fp quanto-int4 codebooks/my-1bit ott-4bit
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/tasks.py --tiny --out RESULTS

A cache is fp (DynamicCache), quanto-int4 or hqq-int4 (transformers' own), ott-4bit or ott-2bit, or a codebook by name
or path; NAME=PATH calls it otherwise. Appends a row to RESULTS/tasks.csv as each is done; RESULTS/answers holds every
answer. A rerun goes on where the last run stopped. Processes with other caches, or with --shard, can share a GPU and
RESULTS. DATA is laid out as benchmarks/README.md says. Programs that the model writes are run: see
benchmarks/sandbox.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import gsm8k
import humaneval
import passkey
import torch
from answering import Answer, CacheKind, answer_in_batches, append_answers, cache_kind, prompt_text, read_answers
from problems import Task
from results import append_csv, check_names, locked, print_table, read_csv, wilson
from sandbox import check_sandbox
from tiny_tasks import tiny_model, tiny_tasks, tiny_tokenizer
from transformers import GenerationConfig

from antkv_hf.demo_model import load_model

TASKS = ("humaneval", "gsm8k", "passkey")
KEY = ("model", "task", "prompt", "cache", "dtype", "max_new_tokens", "steps")
SHOWN = ("task", "cache", "percent", "low", "high", "correct", "problems", "bits", "tokens_a_second", "by_group")


def load_tasks(arguments: argparse.Namespace, chat: bool, count_tokens) -> list[Task]:
    tasks = []
    for name in arguments.tasks:
        if name == "humaneval":
            tasks.append(humaneval.load(arguments.data / "humaneval" / "HumanEval.jsonl.gz", chat))
        elif name == "gsm8k":
            tasks.append(gsm8k.load(arguments.data / "gsm8k", chat))
        else:
            kivi = arguments.data / "passkey" / "passkey_examples.jsonl"
            tasks += [passkey.generated(n, count_tokens, chat, arguments.keys) for n in arguments.lengths]
            tasks += [passkey.load(kivi, chat)] if kivi.exists() else []
    return tasks


class Run:
    """One cache on one task: where its answers are, and the row that they make."""

    def __init__(self, task: Task, kind: CacheKind, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
        self.task, self.kind, self.folder = task, kind, arguments.out / "answers"
        self.problems = task.problems[: arguments.limit]
        i, n = arguments.shard
        self.own = self.problems[i::n]
        self.shard = f"-{i}-of-{n}" if n > 1 else ""
        style = "chat" if self.problems[0].chat else "completion"
        self.key = dict(
            model=arguments.model.rstrip("/").rpartition("/")[2], task=task.name, prompt=style, cache=kind.name,
            dtype=str(dtype).removeprefix("torch."), max_new_tokens=task.max_new_tokens,
            steps="graphs" if arguments.cuda_graphs and kind.can_replay else "eager",
        )  # fmt: skip
        self.name = _file_name(self.key)

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}{self.shard}.jsonl"

    def answers(self) -> dict[str, Answer]:
        """Answers of all shards, by problem."""
        found: dict[str, Answer] = {}
        for path in [self.folder / f"{self.name}.jsonl", *sorted(self.folder.glob(f"{self.name}-*-of-*.jsonl"))]:
            found |= read_answers(path)
        return found

    def in_table(self, table: Path) -> bool:
        wanted = {name: str(value) for name, value in (self.key | {"problems": len(self.problems)}).items()}
        return any(wanted.items() <= row.items() for row in read_csv(table))

    def finish(self, table: Path, workers: int) -> None:
        """Scores the answers, writes them with their scores, and appends the row, unless another process was faster."""
        with locked(self.folder / f"{self.name}.lock"):
            if not self.in_table(table):
                self._score(table, workers)

    def _score(self, table: Path, workers: int) -> None:
        answers = self.answers()
        given = [answers[problem.name] for problem in self.problems]
        with ThreadPoolExecutor(workers) as pool:
            scores = list(pool.map(self.task.score, self.problems, [answer.text for answer in given]))
        with (self.folder / f"{self.name}.scored.jsonl").open("w", encoding="utf-8") as file:
            for answer, (correct, detail) in zip(given, scores):
                file.write(json.dumps({"correct": correct, "detail": detail, **answer._asdict()}) + "\n")
        correct = sum(score.correct for score in scores)
        low, high = wilson(correct, len(scores))
        tokens = sum(answer.new_tokens for answer in given)
        of = Counter(problem.group for problem in self.problems)
        right = Counter(problem.group for problem, score in zip(self.problems, scores) if score.correct)
        append_csv(
            table,
            dict(
                **self.key, problems=len(scores), correct=correct, percent=100 * correct / len(scores), low=100 * low,
                high=100 * high, bits=max(answer.bits for answer in given),
                bits_in_all=max(answer.bits_in_all for answer in given), mean_new_tokens=tokens / len(given),
                tokens_a_second=tokens / sum(answer.seconds for answer in given),
                batch=max(answer.batch for answer in given),
                by_group=" ".join(f"{group}:{right[group]}/{n}" for group, n in of.items() if group),
                **given[0].machine,
            ),
        )  # fmt: skip
        print(f"{self.task.name}, {self.kind.name}: {correct} of {len(scores)}", flush=True)


def against_fp(folder: Path, row: dict[str, str]) -> str:
    """``-3 +1``: of the problems, 3 that fp has right and this cache has not, and 1 the other way round."""
    key = {name: row[name] for name in KEY}
    own, fp = (
        folder / f"{_file_name(key | changes)}.scored.jsonl" for changes in ({}, {"cache": "fp", "steps": "eager"})
    )
    if own == fp or not own.exists() or not fp.exists():
        return ""
    scored = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (own, fp)]
    right, wanted = ({line["problem"]: line["correct"] for line in lines} for lines in scored)
    lost = sum(wanted[name] and not right[name] for name in right.keys() & wanted.keys())
    gained = sum(right[name] and not wanted[name] for name in right.keys() & wanted.keys())
    return f"-{lost} +{gained}"


def _file_name(key: dict) -> str:
    return re.sub(r"[^\w.-]+", "_", "-".join(map(str, key.values())))


def main(argv: list[str] | None = None) -> None:
    try:
        run(parsed(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.py: {error}")


def run(arguments: argparse.Namespace) -> None:
    if arguments.tiny:
        model, tokenizer = tiny_model(), tiny_tokenizer(not arguments.completion)
    else:
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
        model, tokenizer = load_model(arguments.model, dtype=getattr(torch, dtype))
        model = model.to(device)
    # transformers fills what a call leaves open from the model's own defaults, a repetition penalty for instance.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    chat = tokenizer.chat_template is not None and not arguments.completion

    def count_tokens(prompt: str) -> int:
        problem = passkey.Problem("", prompt, chat)
        return len(tokenizer(prompt_text(tokenizer, problem), add_special_tokens=not chat)["input_ids"])

    tasks = (tiny_tasks if arguments.tiny else lambda *_: load_tasks(arguments, chat, count_tokens))(
        arguments.tasks, chat, count_tokens
    )
    kinds = [cache_kind(name, model.config) for name in arguments.caches]
    check_names("--caches", [kind.name for kind in kinds])
    table = arguments.out / "tasks.csv"
    if "humaneval" in arguments.tasks and not arguments.no_score:
        print(check_sandbox(), flush=True)
    scoring: list[Future] = []
    with ThreadPoolExecutor(1) as scorer:  # the GPU goes on with the next cache meanwhile
        for task in tasks:
            for kind in kinds:
                run = Run(task, kind, arguments, model.dtype)
                if run.in_table(table):
                    print(f"{task.name}, {kind.name}: already in {table}", flush=True)
                    continue
                answer_rest(model, tokenizer, run, arguments)
                if not arguments.no_score and {problem.name for problem in run.problems} <= run.answers().keys():
                    scoring.append(scorer.submit(run.finish, table, arguments.workers))
        for done in scoring:
            done.result()
    if rows := read_csv(table):
        folder = arguments.out / "answers"
        print_table([{n: _rounded(row[n]) for n in SHOWN} | {"against_fp": against_fp(folder, row)} for row in rows])


def answer_rest(model, tokenizer, run: Run, arguments: argparse.Namespace) -> None:
    """Answers what this process's share of the problems lacks."""
    there = run.answers()
    rest = [] if arguments.score_only else [problem for problem in run.own if problem.name not in there]
    done = len(run.own) - len(rest)
    for answers in answer_in_batches(
        model, tokenizer, run.task, rest, run.kind, batch=arguments.batch, batch_tokens=arguments.batch_tokens,
        cuda_graphs=arguments.cuda_graphs,
    ):  # fmt: skip
        append_answers(run.file, answers)
        done += len(answers)
        tokens, seconds = sum(a.new_tokens for a in answers), sum(a.seconds for a in answers)
        speed = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second"
        print(f"{run.task.name}, {run.kind.name}: {done} of {len(run.own)} answered; {speed}", flush=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder or Hub id, or the word smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder of tasks.csv and answers/")
    parser.add_argument("--data", type=Path, default=os.environ.get("ANTKV_DATA"), help="default: $ANTKV_DATA")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--caches", nargs="+", default=["fp", "ott-4bit", "ott-2bit"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of passkey prompts")
    parser.add_argument("--keys", type=int, default=4, help="passkeys a depth; depths are 0, 25, 50, 75 and 100%%")
    parser.add_argument("--limit", type=int, help="only the first problems of each task")
    parser.add_argument("--completion", action="store_true", help="prompts of a base model, despite a chat template")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--batch-tokens", type=int, default=262144, help="most tokens of a batch, padding and new ones too"
    )
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="every N-th problem, from the I-th on"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="replay decode steps where the cache can")
    parser.add_argument("--no-score", action="store_true", help="only answer")
    parser.add_argument("--score-only", action="store_true", help="only score answers that are there")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="programs that run at a time")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, two problems: shows that it runs")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.model = "tiny"
    elif arguments.data is None:
        parser.error("--data or $ANTKV_DATA must name the folder with humaneval/, gsm8k/ and passkey/")
    if arguments.data is not None:
        arguments.data = Path(arguments.data)
    return arguments


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N with I from 0 to N - 1, e.g. 0/4")
    return int(match[1]), int(match[2])


def _rounded(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
