"""A tiny random model, a byte tokenizer and two problems a task: shows that `tasks.py` runs, says nothing else."""

from __future__ import annotations

import dataclasses

import gsm8k
import humaneval
import passkey
import torch
from problems import Task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NEW_TOKENS = 10
FUNCTIONS = [
    ("double", "x: int", "Twice x.", "assert candidate(3) == 6"),
    ("largest", "numbers: list", "The largest number.", "assert candidate([1, 5, 2]) == 5"),
]
QUESTIONS = [
    {"question": "A box holds 12 eggs. How many eggs do 3 boxes hold?", "answer": "3 * 12 = <<3*12=36>>36\n#### 36"},
    {"question": "Ann has $1,500 and spends half. What is left?", "answer": "1500 / 2 = 750\n#### 750"},
]
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, bos_token_id=None, eos_token_id=257,
        pad_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A token a byte, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<|end|>", "<|user|>", "<|model|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE if chat else None
    return fast


def tiny_tasks(names: list[str], chat: bool, count_tokens) -> list[Task]:
    rows = [
        {
            "task_id": f"tiny/{name}", "entry_point": name,
            "prompt": f'def {name}({argument}):\n    """{told}"""\n',
            "test": f"def check(candidate):\n    {test}\n",
        }
        for name, argument, told, test in FUNCTIONS
    ]  # fmt: skip
    makers = {
        "humaneval": lambda: humaneval.task(rows, chat),
        "gsm8k": lambda: gsm8k.task(QUESTIONS, chat, QUESTIONS),
        "passkey": lambda: passkey.generated(500, count_tokens, chat, keys=1),
    }
    return [dataclasses.replace(makers[name](), max_new_tokens=NEW_TOKENS) for name in names]
