"""Learn a codebook for your model from your text, and see what it costs on text that it has not seen.

python examples/calibrate_your_model.py MODEL TEXT ... --test TEXT -o FOLDER

Without arguments: SmolLM2 on Python's own source, with far too few tokens for a good codebook (a first look of some
minutes on two cores). For real use, 262,144 tokens of the kinds of text that you will use it for, on a GPU.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

from antkv_hf import AnTKVConfig, calibrate
from antkv_hf.demo_model import load_model
from antkv_hf.evaluation import evaluate, format_rows, save_codebook
from antkv_hf.texts import TextMix, load_texts

library = sysconfig.get_path("stdlib")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="smollm2", help="of transformers; smollm2 is SmolLM2-135M-Instruct")
parser.add_argument("texts", nargs="*", help="files, folders or data sets, each with an optional =share")
parser.add_argument("--test", default=f"{library}/json", help="text to measure on, none of those above")
parser.add_argument("--bits", default="1", help="4, 2, 1.25, 1, 0.75, 0.5 or 0.375")
parser.add_argument("--tokens", type=int, default=4096, help="tokens to learn from")
parser.add_argument("--window", type=int, default=512, help="tokens that the model sees at a time")
parser.add_argument("-o", "--output", type=Path, help="folder of the codebook (default: a temporary one)")
args = parser.parse_args()

model, tokenizer = load_model(args.model)
texts = TextMix.from_sources(args.texts or [f"{library}/email=0.5", f"{library}/asyncio=0.5"])
config = AnTKVConfig.preset(args.bits)
codebook = calibrate(model, tokenizer, texts, config, tokens=args.tokens, window=args.window, samples=args.tokens)
output = args.output or Path(tempfile.mkdtemp()) / f"my-codebook-{args.bits}bit"
save_codebook(codebook, output)
print(f"wrote {output}: {codebook.tables_bytes():,} bytes of tables, relative errors of the samples: ", end="")
print(codebook.calibration["relative_error"])

rows = evaluate(
    model, tokenizer, load_texts(args.test), codebook, protocols=("FP", "S128"), window=args.window, windows=2,
    text_name=Path(args.test).name,
)  # fmt: skip
print(format_rows(rows))
print(f"use it: AnTKVCache.from_pretrained({str(output)!r}, model=model)")
