"""A model over all GPUs of a machine: every layer's codes and tables lie on the GPU that computes the layer.

python examples/multi_gpu.py [--model FOLDER_OR_HUB_ID --codebook FOLDER_OR_HUB_ID]
"""

import argparse
from collections import Counter

import torch

from antkv_hf import AnTKVCache
from antkv_hf.demo_model import load_model
from antkv_hf.demo_text import HANDBOOK

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("--codebook", default="smollm2-135m-instruct-1bit", help="a codebook of that model")
args = parser.parse_args()

gpus = torch.cuda.device_count()
if gpus < 2:
    print(f"This machine has {gpus} GPUs that PyTorch sees: all layers go to one device.")
model, tokenizer = load_model(args.model, dtype=torch.bfloat16 if gpus else torch.float32, device_map="auto")
cache = AnTKVCache.from_pretrained(args.codebook, model=model)

chat = [{"role": "user", "content": f"{HANDBOOK}\n\nWho is the warden of the reserve? Answer in one short sentence."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs.to(model.device), past_key_values=cache, do_sample=False, max_new_tokens=30)

print("A:", tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
for device, layers in Counter(str(layer.device) for layer in cache.quantized_layers).items():
    held = [layer.storage for layer in cache.quantized_layers if str(layer.device) == device]
    print(
        f"{device}: {layers} layers, {sum(sum(storage.memory_bytes().values()) for storage in held):,} bytes of cache"
    )
print(cache.memory_footprint())
