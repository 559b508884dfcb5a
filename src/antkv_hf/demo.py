"""What ``antkv demo`` shows: one small chat model answers questions from a handbook, with two caches side by side.

The same prompts are answered with transformers' `DynamicCache` and with an `AnTKVCache`; bytes, speed and the
perplexity of the handbook itself are measured on the way, nothing is quoted.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .cache.cache import AnTKVCache
from .codebook import AnTKVCodebook
from .demo_model import load_demo_model
from .evaluation.baselines import tensor_bytes
from .evaluation.perplexity import evaluate

CODEBOOK = "smollm2-135m-instruct-1bit"

HANDBOOK = """\
Handbook of the Saltmarsh Lighthouse, for new keepers

1. The house and the people. The Saltmarsh Lighthouse stands on the northern tip of Gull Island, two miles from the \
village of Harrow. It was built in 1874 by the engineer Maria Lindqvist, who also designed the stone bridge over the \
river Tamsin. The tower is 41 metres high and has 216 steps. The head keeper is Oskar Brandt. He is responsible for \
the lamp and for the logbook. His deputy, Ines Calder, looks after the engine room and the supply boat. The cook is \
called Peter Moll, and he does not like to be asked what is for dinner. There is also a cat, whose name is Admiral. \
The cat sleeps in the lamp room in winter and in the boat house in summer, and nobody is allowed to move her.

2. The lamp. The lamp is lit every evening thirty minutes before sunset and put out thirty minutes after sunrise. It \
gives two white flashes every fifteen seconds, followed by a pause. In clear weather the light can be seen from a \
distance of 22 miles. The glass of the lens must be cleaned every Monday with warm water and vinegar. Never use soap, \
because soap leaves a film that scatters the light. If the main lamp fails, switch on the emergency lamp in the green \
cupboard on the third floor. The emergency lamp runs for nine hours on one battery. Two spare batteries are kept under \
the stairs. Write every failure down in the logbook, with the time, the weather and the name of the keeper on duty.

3. Fog. When the harbour wall cannot be seen from the balcony, start the fog horn. The horn sounds once every forty \
seconds. It takes six minutes to build up pressure, so do not wait until the fog has arrived. Ships that hear the horn \
may answer on radio channel 12. Answer them with the name of the lighthouse, the direction of the wind and the depth \
of the water at the pier. The depth is shown on the blue gauge next to the door of the engine room. In the great fog \
of 1931 the horn sounded for 57 hours without a pause, and the keepers took turns to sleep in the kitchen, which was \
the only room that was quiet enough.

4. Supplies. The supply boat is called Marigold. She comes every second Thursday with food, letters, lamp oil and \
diesel for the engine. In a storm she waits in Harrow until the wind is weaker than force six. The store room must \
always hold food for twenty days. Bread is baked on Tuesday and Saturday. Drinking water comes from the cistern behind \
the house, which holds 8,000 litres of rain water. The water has to be boiled for three minutes before it is drunk. If \
the cistern is less than a quarter full, tell Ines Calder, who will order water from the village. Letters that are to \
leave with the boat belong in the red box by the front door before eight o'clock in the morning.

5. Visitors. Visitors may climb the tower on Sunday between one and four o'clock in the afternoon. A ticket costs \
three crowns, and children under ten years climb for free. No more than twelve people may stand on the balcony at the \
same time. Visitors must not touch the lens, feed the cat or ring the bell. The bell is only rung when somebody is \
missing. If a visitor feels dizzy on the stairs, there is a bench on the second floor, and a bottle of water beside \
it. The money from the tickets is counted in the evening and put into the iron box in the office. In the year 1998 it \
paid for a new roof.

6. Birds. Gull Island is home to about four hundred pairs of terns and to a small colony of seals on the western \
beach. From April to July the western beach is closed, so that the birds can breed in peace. The warden of the reserve \
is Doctor Hanna Weiss. She visits the island on the first day of every month and counts the nests. Birds that have \
flown against the glass are put into the wooden box in the boat house, where it is dark and calm; most of them can fly \
again after an hour. Please write the kind of bird into the brown notebook.

7. Storms. When the barometer falls below 980, close the shutters on the west side first, then bring the boat into \
the boat house and tie down everything on the pier. Nobody leaves the house alone in a storm. The highest wave that \
was ever seen here reached the kitchen window, nine metres above the sea, in the night of 3 February 1953. Keep the \
radio switched on, fill the lanterns, and make tea. Most storms are over by the morning."""

QUESTIONS = (
    "How must the glass of the lens be cleaned?",
    "What is the name of the cat?",
    "Who built the lighthouse?",
    "What is the name of the supply boat?",
)


def find_codebook(name: str = CODEBOOK) -> str:
    """Folder of a codebook that ships with the project.

    Looks in ``codebooks/`` of the checkout this package was imported from, then for data packaged with the wheel
    (``antkv_hf/codebooks``); a folder or Hub repo id given as `name` is returned as it is.

    Raises:
        FileNotFoundError: naming what there is.
    """
    if Path(name).is_dir() or "/" in name:
        return name
    package = Path(__file__).resolve().parent
    places = (package.parents[1] / "codebooks", package / "codebooks")
    for place in places:
        if (place / name / "config.json").is_file():
            return str(place / name)
    shipped = [p.parent.name for place in places for p in sorted(place.glob("*/config.json"))]
    raise FileNotFoundError(
        f"no codebook {name!r}: it is no folder, no Hub repo id (owner/name) and not shipped "
        f"({', '.join(shipped) or 'none are'}); make one with `antkv calibrate`"
    )


def run_demo(
    codebook: str | Path | AnTKVCodebook | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer=None,
    questions: tuple[str, ...] = QUESTIONS,
    max_new_tokens: int = 40,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answers `questions` about the handbook with both caches and measures them.

    Args:
        codebook: folder, Hub repo or loaded codebook; the shipped 1-bit codebook of SmolLM2-135M-Instruct by default.
        model, tokenizer: a chat model that the codebook was made for; SmolLM2-135M-Instruct by default.
        questions: asked one by one, each after the whole handbook.
        max_new_tokens: tokens of each answer at most.
        say: called with lines of progress.

    Returns:
        JSON-ready: model, prompt_tokens, questions with both answers, and for each cache its bytes, tokens a second,
        bits per element and perplexity of the handbook read back through it (see `format_demo`).

    Raises:
        FileNotFoundError: no codebook or no model to be found. ValueError: a codebook of another model.
    """
    start = time.perf_counter()
    where = "the model given"
    if model is None:
        say("Loading SmolLM2-135M-Instruct ...")
        model, tokenizer, where = load_demo_model()
    if not isinstance(codebook, AnTKVCodebook):
        codebook = AnTKVCodebook.from_pretrained(str(codebook or find_codebook()))
    book = codebook
    device = model.device
    before = model.config._attn_implementation
    answers: dict[str, list[str]] = {"dynamic": [], "antkv": []}
    spent = {name: [0, 0.0] for name in answers}  # new tokens, seconds
    last: dict[str, Any] = {}
    prompt_tokens = 0
    makers: dict[str, tuple[str, Callable[[], Cache]]] = {
        "dynamic": (before, lambda: DynamicCache(config=model.config)),
        "antkv": ("antkv", lambda: AnTKVCache(model.config, codebook=book)),
    }
    try:
        for question in questions:
            inputs = _prompt(tokenizer, question).to(device)
            prompt_tokens = inputs["input_ids"].shape[1]
            for name, (lane, make) in makers.items():
                say(f"{question} ({'DynamicCache' if name == 'dynamic' else 'AnTKVCache'}, {prompt_tokens:,} tokens)")
                model.set_attn_implementation(lane)
                cache = last[name] = make()
                began = time.perf_counter()
                out = model.generate(  # type: ignore[operator]
                    **inputs, past_key_values=cache, do_sample=False, max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                spent[name][1] += time.perf_counter() - began
                new = out[0, prompt_tokens:]
                spent[name][0] += len(new)
                answers[name].append(tokenizer.decode(new, skip_special_tokens=True).strip())
    finally:
        model.set_attn_implementation(before)
    say("Measuring the perplexity of the handbook, 128 tokens at a time through each cache ...")
    ids = tokenizer(HANDBOOK, return_tensors="pt", add_special_tokens=False)["input_ids"]
    plain, coded = evaluate(model, None, ids, book, protocols=("FP", "cache"), text_name="handbook")
    footprint = last["antkv"].memory_footprint()
    dense = tensor_bytes([(layer.keys, layer.values) for layer in last["dynamic"].layers])
    seconds = {name: round(total, 2) for name, (_, total) in spent.items()}
    return {
        "model": where,
        "codebook": f"{book.model['base_model']}, keys {book.config.key}, values {book.config.value}",
        "prompt_tokens": prompt_tokens,
        "cached_tokens": footprint.tokens,
        "questions": [
            {"question": question, "dynamic": answers["dynamic"][i], "antkv": answers["antkv"][i]}
            for i, question in enumerate(questions)
        ],
        "dynamic": {
            "bytes": dense,
            "tokens_per_second": round(spent["dynamic"][0] / spent["dynamic"][1], 2),
            "bits_per_element": plain.bits,
            "perplexity": round(plain.perplexity, 3),
        },
        "antkv": {
            "bytes": footprint.total,
            "tokens_per_second": round(spent["antkv"][0] / spent["antkv"][1], 2),
            "bits_per_element": round(footprint.bits_per_element, 3),
            "bits_per_element_with_window": round(footprint.bits_per_element_with_window, 3),
            "exact_tokens": last["antkv"].anchor_count(),
            "footprint": footprint.to_dict(),
            "perplexity": round(coded.perplexity, 3),
        },
        "generate_seconds": seconds,
        "seconds": round(time.perf_counter() - start, 1),
    }


def format_demo(result: dict[str, Any], as_json: bool = False, width: int = 100) -> str:
    """The result of `run_demo` for people, or as JSON."""
    if as_json:
        return json.dumps(result, indent=2)
    dynamic, antkv = result["dynamic"], result["antkv"]
    lines = [f"Model: {result['model']}", f"Codebook: {result['codebook']}", ""]
    for item in result["questions"]:
        lines.append(f"Q: {item['question']}")
        for label, name in (("DynamicCache", "dynamic"), ("AnTKVCache", "antkv")):
            text, first = " ".join(item[name].split()), f"   {label:<14}"
            lines.append(textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * len(first)))
        lines.append("")
    footprint = antkv["footprint"]
    rows = [
        ("", "DynamicCache", "AnTKVCache"),
        (f"bytes for {result['cached_tokens']:,} tokens", f"{dynamic['bytes']:,}", f"{antkv['bytes']:,}"),
        ("  codes", "", f"{footprint['codes']:,}"),
        ("  anchors and sinks", "", f"{footprint['anchors'] + footprint['sinks']:,}"),
        ("  exact window and scores", "", f"{footprint['window'] + footprint['scores']:,}"),
        ("bits per element, past the window", *(f"{side['bits_per_element']:.2f}" for side in (dynamic, antkv))),
        ("exact tokens (all layers and heads)", "all", f"{antkv['exact_tokens']:,}"),
        ("new tokens a second, prompt included", *(f"{side['tokens_per_second']:.1f}" for side in (dynamic, antkv))),
        ("perplexity of the handbook", *(f"{side['perplexity']:.3f}" for side in (dynamic, antkv))),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines += [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines += [
        "",
        f"The window stays exact whatever the length: at {result['cached_tokens']:,} tokens it is most of the cache, "
        "at 32,000 next to nothing.",
        f"Tables shared by all caches: {footprint['tables']:,} bytes. The demo took {result['seconds']:.0f} seconds.",
    ]
    return "\n".join(lines)


def _prompt(tokenizer, question: str):
    chat = [{"role": "user", "content": f"{HANDBOOK}\n\nAnswer from the handbook, in one short sentence. {question}"}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
