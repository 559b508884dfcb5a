"""Answer a question about a handbook with a 1-bit cache, and see what it takes.

python examples/quickstart.py [--model FOLDER_OR_HUB_ID --codebook FOLDER_OR_HUB_ID]
"""

import argparse

from antkv_hf import AnTKVCache
from antkv_hf.demo_model import load_model
from antkv_hf.demo_text import HANDBOOK

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("--codebook", default="smollm2-135m-instruct-1bit", help="a codebook of that model")
args = parser.parse_args()

model, tokenizer = load_model(args.model)  # or AutoModelForCausalLM.from_pretrained(...)
question = "How must the glass of the lens be cleaned?"
chat = [{"role": "user", "content": f"{HANDBOOK}\n\nAnswer from the handbook, in one short sentence. {question}"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

cache = AnTKVCache.from_pretrained(args.codebook, model=model)
out = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=40)

print("Q:", question)
print("A:", tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(cache.memory_footprint())
