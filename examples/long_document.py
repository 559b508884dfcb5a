"""One long document, many questions: it is read once, and every question goes on from a fork of its cache.

python examples/long_document.py [FILE --ask QUESTION --ask QUESTION] [--model ... --codebook ...]
"""

import argparse
import time
from itertools import takewhile
from pathlib import Path

import torch

from antkv_hf import AnTKVCache
from antkv_hf.demo_model import load_model
from antkv_hf.demo_text import HANDBOOK, QUESTIONS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", nargs="?", type=Path, help="the document, UTF-8 (default: the demo's handbook)")
parser.add_argument("--ask", action="append", help="a question about it; repeat for several")
parser.add_argument("--model", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("--codebook", default="smollm2-135m-instruct-2bit", help="a codebook of that model")
args = parser.parse_args()

model, tokenizer = load_model(args.model)
document = args.file.read_text(encoding="utf-8") if args.file else HANDBOOK
questions = args.ask or QUESTIONS

prompts = []
for question in questions:
    chat = [{"role": "user", "content": f"{document}\n\nAnswer from the text, in one short sentence. {question}"}]
    prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt"))
prompts = [prompt["input_ids"].to(model.device) for prompt in prompts]
columns = zip(*(prompt[0, :-1].tolist() for prompt in prompts))  # without the last token: generate needs a new one
shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))

cache = AnTKVCache.from_pretrained(args.codebook, model=model)
start = time.perf_counter()
with torch.no_grad():
    model(prompts[0][:, :shared], past_key_values=cache, logits_to_keep=1)
print(f"read {shared:,} tokens once, in {time.perf_counter() - start:.2f} s: {cache.memory_footprint()}\n")

for question, prompt in zip(questions, prompts, strict=True):
    start, fork = time.perf_counter(), cache.fork()  # codes are shared, not copied
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=fork, do_sample=False, max_new_tokens=40
    )
    answer = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    print(f"Q: {question}\nA: {answer}  [{time.perf_counter() - start:.2f} s]")
