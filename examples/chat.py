"""A chat whose cache lives over its turns: every turn reads only what is new. An empty line ends it.

python examples/chat.py [--model FOLDER_OR_HUB_ID --codebook FOLDER_OR_HUB_ID]
"""

import argparse
import sys

from transformers import TextStreamer

from antkv_hf import AnTKVCache
from antkv_hf.demo_model import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("--codebook", default="smollm2-135m-instruct-2bit", help="a codebook of that model")
parser.add_argument("--max-new-tokens", type=int, default=120, help="length of an answer at most")
args = parser.parse_args()

model, tokenizer = load_model(args.model)
# The whole history is in every prompt, and the cache goes on from the tokens that it holds. Where a history is not
# what was said (a tokenizer that joins characters otherwise, a template that drops thoughts), it reads all of it again.
cache = AnTKVCache.from_pretrained(args.codebook, model=model, on_new_prompt="reset")
history = []
print("you: ", end="", flush=True)
for line in sys.stdin:
    if not line.strip():
        break
    history.append({"role": "user", "content": line.strip()})
    inputs = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs, held = inputs.to(model.device), cache.get_seq_length()
    print("model: ", end="", flush=True)
    out = model.generate(
        **inputs, past_key_values=cache, do_sample=False, max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip
    prompt, footprint = inputs["input_ids"].shape[1], cache.memory_footprint()
    answer = tokenizer.decode(out[0, prompt:], skip_special_tokens=True)
    history.append({"role": "assistant", "content": answer})
    print(
        f"[{held} of {prompt} prompt tokens were in the cache; it holds {footprint.coded_tokens} tokens as codes ",
        end="",
    )
    print(
        f"and {footprint.tokens - footprint.coded_tokens} exact: {footprint.total:,} bytes]\nyou: ", end="", flush=True
    )
print()
