"""The command line: ``antkv demo | generate | calibrate | evaluate | inspect | budget``.

Results go to stdout (``--json`` for machines), progress to stderr. What the library raises becomes one line and exit
code 1; ``antkv --debug COMMAND`` shows where it came from.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .cli_budget import budget
from .cli_calibrate import calibrate
from .cli_common import (
    AsJson,
    Codebook,
    Device,
    DType,
    Model,
    Settings,
    _Bar,
    _check_model_folder,
    _codec,
    _given_prompt,
    _load_model,
    _quiet,
    _say,
)

# torch and transformers are imported inside the commands: --help answers at once.


class _OneLineErrors(TyperGroup):
    """A group whose commands fail with one clear line instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe (head, less) has had enough
            raise
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            # Of RuntimeErrors only a full GPU is the user's business; others are bugs and keep their traceback.
            ours = not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError"
            if ctx.params.get("debug") or not ours:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"antkv: error: {message}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A Hugging Face KV cache of 1 bit per element and below (AnTKV). Start with: antkv demo",
)


@app.callback(invoke_without_command=True)
def _antkv(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    codebook: Annotated[
        str | None,
        typer.Argument(metavar="[CODEBOOK]", help="Codebook of SmolLM2-135M-Instruct, if not the shipped one."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer at most.")] = 40,
    as_json: AsJson = False,
) -> None:
    """A small chat model answers questions from a handbook: with its usual cache, and with a 1-bit one.

    Prints both answers, bytes, speed and perplexity. Takes one or two minutes on two CPU cores.

    Example: antkv demo
    """
    _quiet()
    from .demo import format_demo, run_demo

    result = run_demo(codebook, max_new_tokens=max_new_tokens, say=_say)
    typer.echo(format_demo(result, as_json))


@app.command()
def generate(
    model: Model,
    codebook: Codebook,
    prompt: Annotated[str | None, typer.Option(help="What to continue or answer.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 file ('-' is stdin).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 0.0,
    settings: Settings = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Write text with a quantized cache (stdout), and say what the cache took (stderr).

    Example: antkv generate smollm2 smollm2-135m-instruct-2bit --prompt "What does a lighthouse keeper do?"
    """
    _quiet()
    prompt = _given_prompt(prompt, prompt_file)
    loaded, tokenizer = _load_model(model, device, dtype)
    from .cache.cache import AnTKVCache

    book, config = _codec(codebook, settings)
    cache = AnTKVCache(loaded.config, config, book)
    loaded.set_attn_implementation("antkv")
    if chat and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = loaded.generate(
        **inputs.to(loaded.device), past_key_values=cache, max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
    )  # fmt: skip
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if as_json:
        typer.echo(json.dumps({"text": answer, "footprint": cache.memory_footprint().to_dict()}, indent=2))
        return
    typer.echo(answer)
    _say(f"\n{cache.memory_footprint()}")


app.command()(calibrate)


@app.command()
def evaluate(
    model: Model,
    codebook: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODEBOOK]",
            help="As for generate; without it only the plain model and --baseline are measured.",
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text file, folder or data set; repeat for several.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 12,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    last: Annotated[int | None, typer.Option(help="Count only the last N tokens of each window.")] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="FP, W0, S128 (any window: S64) or cache; repeat. Default: all four.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="transformers' own caches: quanto-int4, hqq-int2, ...; repeat."),
    ] = None,
    settings: Settings = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 1,
    save: Annotated[bool, typer.Option("--save", help="Write the rows into the codebook's folder and card.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and real bits per element, under stated protocols.

    FP: the plain model. W0: every key and value through the codec, as papers report. S128: what a user gets, the last
    128 keys of each token exact. cache: the real cache, filled and read back 128 tokens at a time.

    Example: antkv evaluate smollm2 smollm2-135m-instruct-1bit --text my.txt --protocol FP --protocol S128
    """
    _quiet()
    if not text:
        raise ValueError("give at least one text to measure on: --text FILE")
    if save and (codebook is None or not Path(codebook).is_dir()):
        raise ValueError("--save needs CODEBOOK to be a local folder")
    if save and settings:
        raise ValueError("--save records the codebook's own settings; leave --set out")
    from .evaluation import evaluate as measure
    from .evaluation import format_rows, save_codebook, with_rows
    from .texts import load_texts

    book, config = (None, None) if codebook is None else _codec(codebook, settings)
    names = Counter(Path(source).name for source in text)  # two files of one name are told apart by their paths
    sources = {
        source if names[Path(source).name] > 1 else Path(source).name or source: load_texts(source) for source in text
    }
    loaded, tokenizer = _load_model(model, device, dtype)
    rows = []
    for name, texts in sources.items():
        rows += measure(
            loaded, tokenizer, texts, book, config, protocols=protocol, window=window, windows=windows, last=last,
            baselines=baseline or (), text_name=name, batch_size=batch, progress=_Bar(),
        )  # fmt: skip
    typer.echo(format_rows(rows, "json" if as_json else "markdown" if markdown else "text"))
    if save:
        assert book is not None and codebook is not None
        save_codebook(with_rows(book, rows), codebook)
        _say(f"saved {len(rows)} rows in {codebook}")


@app.command()
def inspect(
    codebook: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODEBOOK]", help="Codebook (folder, Hub id, shipped name), or a file of AnTKVCache.save."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or Hub id of a model: do they fit, or what could it have?")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repo of a codebook.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a codebook or a saved cache is, whether it fits a model, or what a model could have.

    Of a codebook: model, commit, bits, the tables of each layer, calibration, measured rows, hash.

    Examples: antkv inspect smollm2-135m-instruct-1bit; antkv inspect --model MODEL; antkv inspect CACHE_FILE
    """
    _quiet()
    from .codebook_names import find_codebook
    from .evaluation.inspection import format_cache, format_inspection, inspect_cache, inspect_codebook, inspect_model

    if codebook is None and model is None:
        raise ValueError("give a CODEBOOK (folder, Hub id, shipped name or cache file), or --model MODEL")
    if model is not None:
        _check_model_folder(model)
    if codebook is not None and Path(codebook).is_file():
        held = inspect_cache(codebook, model)
        typer.echo(json.dumps(held, indent=2) if as_json else format_cache(held))
        return
    if codebook is not None:
        found = inspect_codebook(find_codebook(codebook), model, revision)
    else:
        found = inspect_model(str(model))
    typer.echo(json.dumps(found, indent=2) if as_json else format_inspection(found))


app.command()(budget)


def main() -> None:
    """Entry point of the ``antkv`` command."""
    # Before torch is loaded: on a busy machine, threads that spin while they wait cost far more than they gain.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: gigabytes of statistics are cleared away
    app()


if __name__ == "__main__":  # for launchers: torchrun -m antkv_hf.cli
    main()
