"""Read a text once, keep its cache in a file, and go on from there, today or in another process.

python examples/save_and_reload.py [--model FOLDER_OR_HUB_ID --codebook FOLDER_OR_HUB_ID --file CACHE]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from antkv_hf import AnTKVCache
from antkv_hf.demo_model import load_model
from antkv_hf.demo_text import HANDBOOK

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("--codebook", default="smollm2-135m-instruct-2bit", help="a codebook of that model")
parser.add_argument("--file", type=Path, help="where the cache goes (default: a temporary file)")
args = parser.parse_args()

model, tokenizer = load_model(args.model)
question = "Answer from the handbook, in one short sentence. How must the glass of the lens be cleaned?"
chat = [{"role": "user", "content": f"{HANDBOOK}\n\n{question}"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
path = args.file or Path(tempfile.mkdtemp()) / "handbook.safetensors"

cache = AnTKVCache.from_pretrained(args.codebook, model=model)
start = time.perf_counter()
with torch.no_grad():
    model(inputs["input_ids"][:, :-1], past_key_values=cache, logits_to_keep=1)  # generate needs one new token
read = time.perf_counter() - start
cache.save(path)
held = cache.memory_footprint()
print(f"read {held.tokens:,} tokens in {read:.2f} s; DynamicCache would hold {held.dense_bytes:,} bytes of them")
print(f"saved {path}: {path.stat().st_size:,} bytes (hash-checked, nothing pickled; `antkv inspect FILE` describes it)")

start = time.perf_counter()
loaded = AnTKVCache.load(path, model)  # in another process it finds its codebook by itself
print(f"loaded in {time.perf_counter() - start:.3f} s")

answers = [
    model.generate(**inputs, past_key_values=which, do_sample=False, max_new_tokens=20) for which in (cache, loaded)
]
print("A:", tokenizer.decode(answers[1][0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print("the same tokens from both:", torch.equal(*answers))
