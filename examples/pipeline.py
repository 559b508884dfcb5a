"""A text-generation pipeline whose every prompt gets its own small cache: lists, batches, chats, streaming.

python examples/pipeline.py [--model FOLDER_OR_HUB_ID --codebook FOLDER_OR_HUB_ID]
"""

import argparse

from transformers import TextStreamer, pipeline

from antkv_hf import AnTKVCache, AnTKVCodebook, antkv_generate
from antkv_hf.demo_model import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("--codebook", default="smollm2-135m-instruct-1bit", help="a codebook of that model")
args = parser.parse_args()

model, tokenizer = load_model(args.model)
model.set_attn_implementation("antkv")  # the faster lane
codebook = AnTKVCodebook.from_pretrained(args.codebook)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
options = dict(do_sample=False, max_new_tokens=24, return_full_text=False)

# A fresh cache for every call, however many prompts there are.
generate = antkv_generate(codebook)
prompts = ["The lighthouse keeper", "In the harbour of Harrow", "Water boils", "Once upon a time"]
for prompt, found in zip(prompts, pipe(prompts, custom_generate=generate, batch_size=2, **options), strict=True):
    print(f"{prompt} ...{found[0]['generated_text']!r}")

chat = [{"role": "user", "content": "Name three things that a lighthouse keeper needs."}]
print("\nA chat, as it is written:")
pipe(chat, custom_generate=generate, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)

# One cache of your own, to look into afterwards. It starts afresh when a prompt is not the one that it holds; made
# without on_new_prompt="reset" it raises instead. It never goes on with another prompt's keys.
cache = AnTKVCache(model.config, codebook=codebook, on_new_prompt="reset")
for prompt in prompts[:2]:
    pipe(" ".join([prompt] * 100), past_key_values=cache, **options)
    held = cache.memory_footprint()
    print(
        f"\n{prompt!r} 100 times: {held.total:,} bytes for {held.tokens} tokens, {held.coded_tokens} of them codes; ",
        end="",
    )
    print(f"DynamicCache: {held.dense_bytes:,}")
