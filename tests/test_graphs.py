"""`antkv_generate` with replayed steps writes the tokens of plain `generate`; on a GPU with real CUDA graphs."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from transformers import StoppingCriteria, StoppingCriteriaList, pipeline
from transformers.generation.streamers import BaseStreamer

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec, antkv_generate, graphs
from antkv_hf.config import AnchorConfig

WINDOW, CHUNK, NEW = 4, 8, 28
CONFIG = AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8), AnchorConfig(fraction=0.13, sinks=2), window=WINDOW, chunk=CHUNK)
# What waits for a device; a step must not.
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy")


class EagerGraph:
    """Stands in for a CUDA graph on a CPU: a replay calls the function, which may ask no tensor for a number."""

    runs_python = True
    replays = made = 0

    def __init__(self):
        EagerGraph.made += 1

    def warm_up(self, function):
        return function()

    def capture(self, function):
        self.function = function

    def replay(self):
        EagerGraph.replays += 1
        with pytest.MonkeyPatch.context() as patch:
            for name in WAITS:
                patch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"asked a tensor for {name}"))
            return self.function()


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, CONFIG)


@pytest.fixture
def stand_in(monkeypatch):
    """Steps are replayed on the CPU."""
    monkeypatch.setattr("antkv_hf.generation._no_gpu", lambda model: None)
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: EagerGraph)
    monkeypatch.setattr(EagerGraph, "replays", 0)
    monkeypatch.setattr(EagerGraph, "made", 0)


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def put(self, value):
        self.seen.append(value.flatten())

    def end(self):
        self.seen.append(torch.tensor([-1]))


class StopsAt(StoppingCriteria):
    """Stops sequences in turn, the second one three tokens after the first."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(input_ids.shape[0], device=input_ids.device) * 3 + 50 <= input_ids.shape[1]


def inputs(*padding: int, n: int = 40, device: str = "cpu") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(n) >= torch.tensor(padding).unsqueeze(1)
    ids = torch.randint(3, 128, (len(padding), n), generator=g).masked_fill(~mask, 0)
    return dict(input_ids=ids.to(device), attention_mask=mask.long().to(device))


CASES = {
    "greedy": ((0,), {}),
    "left_padded": ((0, 17, 30), {}),
    "sampling": ((0, 4), dict(do_sample=True, top_p=0.9, temperature=0.8)),
    "processors": ((0, 0), dict(repetition_penalty=1.2, no_repeat_ngram_size=3)),
    "chunked_prefill": ((0, 9), dict(prefill_chunk_size=16)),
    "details": ((0,), dict(return_dict_in_generate=True, output_scores=True, output_logits=True)),
}


def run(model, batch, **options):
    torch.manual_seed(5)
    lengths = dict(max_new_tokens=NEW, min_new_tokens=NEW) | {
        k: options.pop(k) for k in ("eos_token_id",) if k in options
    }
    return model.generate(**batch, **{"do_sample": False, **lengths, **options})


def check_case(model, codebook, case: str, device: str = "cpu") -> None:
    padding, options = CASES[case]
    batch = inputs(*padding, device=device)
    expected = run(model, batch, past_key_values=AnTKVCache(model.config, codebook=codebook), **options)
    found = run(model, batch, custom_generate=antkv_generate(codebook, cuda_graphs=True), **options)
    if case != "details":
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert found.past_key_values.max_length == 40 + NEW
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("case", CASES)
def test_same_tokens(llama, codebook, stand_in, case):
    check_case(llama, codebook, case)
    assert EagerGraph.replays > NEW - 5


@pytest.mark.parametrize("lane", ["antkv", "sdpa"])
def test_streamer_and_stopping_criteria(llama, codebook, stand_in, lane):
    llama.set_attn_implementation(lane)
    try:
        seen = []
        for extra in (
            dict(past_key_values=AnTKVCache(llama.config, codebook=codebook)),
            dict(custom_generate=antkv_generate(codebook, cuda_graphs=True)),
        ):
            stops, streamer = StoppingCriteriaList([StopsAt()]), Recorder()
            tokens = run(llama, inputs(0, 5), stopping_criteria=stops, **extra)
            alone = run(llama, inputs(0), streamer=streamer, **extra | (
                {} if "custom_generate" in extra else dict(past_key_values=AnTKVCache(llama.config, codebook=codebook))
            ))  # fmt: skip
            seen.append((tokens, alone, torch.cat(streamer.seen)))
    finally:
        llama.set_attn_implementation("sdpa")
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    assert seen[1][0].shape == (2, 53) and seen[1][2][-1] == -1 and len(seen[1][2]) == 40 + NEW + 1


def test_other_modes_take_the_ordinary_way(llama, codebook, stand_in):
    batch = inputs(0)
    for extra in (dict(num_beams=3), dict(prompt_lookup_num_tokens=4), dict(assistant_model=llama)):
        expected = run(llama, batch, past_key_values=AnTKVCache(llama.config, codebook=codebook), **extra)
        assert torch.equal(run(llama, batch, custom_generate=antkv_generate(codebook), **extra), expected)
        with pytest.raises(RuntimeError, match="cannot be replayed: .* is not greedy decoding or sampling"):
            run(llama, batch, custom_generate=antkv_generate(codebook, cuda_graphs=True), **extra)
    assert EagerGraph.replays == 0


def test_in_a_pipeline_and_alone(llama, codebook, stand_in):
    generate = antkv_generate(codebook)
    expected = run(llama, inputs(0), past_key_values=AnTKVCache(llama.config, codebook=codebook))
    lengths = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(llama, inputs(0)["input_ids"], **lengths), expected)
    assert EagerGraph.replays > 0

    class Words:
        """Numbers as words: all that a text pipeline asks of a tokenizer here."""

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left")
    texts = [" ".join(f"w{i}" for i in row) for row in (range(5, 45), range(60, 90))]
    pipe = pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")
    plain = [pipe(t, past_key_values=AnTKVCache(llama.config, codebook=codebook), **lengths) for t in texts]
    assert pipe(texts, custom_generate=generate, **lengths) == plain


def test_turns_on_one_static_cache(llama, codebook, stand_in):
    static, grown = (AnTKVCache(llama.config, codebook=codebook, max_length=n) for n in (400, None))
    said = inputs(0)["input_ids"]
    for turn in range(2):
        before = EagerGraph.made
        batch = dict(input_ids=torch.cat([said, torch.full((1, turn + 1), 9)], 1))
        expected = run(llama, batch, past_key_values=grown)
        said = run(llama, batch, past_key_values=static, custom_generate=antkv_generate(cuda_graphs=True))
        assert torch.equal(said, expected)
    assert EagerGraph.made == before, "the second turn has captured again"
    assert copy.deepcopy(static)._graphed is None
    static.reset()
    batch = inputs(0, 7)
    expected = run(llama, batch, past_key_values=AnTKVCache(llama.config, codebook=codebook))
    assert torch.equal(run(llama, batch, past_key_values=static, custom_generate=antkv_generate()), expected)
    assert EagerGraph.made > before


def test_a_cache_takes_its_memory_and_graphs_with_it(llama, codebook, stand_in):
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=100)
    run(llama, inputs(0), past_key_values=cache, custom_generate=antkv_generate(cuda_graphs=True))
    gone = [weakref.ref(cache._graphed), weakref.ref(cache.layers[0].storage.buffers.key_codes)]
    gc.collect()
    gc.disable()
    try:
        del cache
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_max_length_is_reached(llama, codebook, stand_in):
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=50)
    wanted = "max_length=50 tokens, but 50 cached and 1 new ones are 51"
    with (
        pytest.warns(UserWarning, match="can need room for 67, but .* max_length=50"),
        pytest.raises(ValueError, match=wanted),
    ):
        run(llama, inputs(0), past_key_values=cache, custom_generate=antkv_generate())
    assert cache.get_seq_length() == 50
    with (
        pytest.warns(UserWarning, match="40 tokens of prompt and up to 28 new ones can need room for 67, .*=50"),
        pytest.raises(ValueError, match=wanted),
    ):
        run(llama, inputs(0), past_key_values=AnTKVCache(llama.config, codebook=codebook, max_length=50))
    kept = AnTKVCache(llama.config, codebook=codebook, max_length=60, on_new_prompt="reset")
    run(llama, inputs(0, n=20), past_key_values=kept)
    with pytest.raises(ValueError, match="80 tokens of prompt and up to 28 new ones need room for 107"):
        run(llama, inputs(0, n=80), past_key_values=kept)
    assert kept.get_seq_length() == 47, "a refused prompt costs nothing"
    small = AnTKVCache(llama.config, codebook=codebook, max_length=30)
    with pytest.raises(ValueError, match="up to 28 new ones need room for 67, .*=30: make it with max_length=67"):
        run(llama, inputs(0), past_key_values=small)
    assert small.get_seq_length() == 0
    limited = antkv_generate(codebook, max_length=30)
    with pytest.raises(
        ValueError, match="40 tokens of prompt and up to 28 new ones need room for 67, .*=30: make .*=67"
    ):
        run(llama, inputs(0), custom_generate=limited)


def test_what_is_in_the_way_is_said(llama, codebook, stand_in, monkeypatch):
    batch = inputs(0)

    def refused(match, model=llama, given=batch, book=codebook, config=None, **options):
        with pytest.raises(RuntimeError, match=f"cannot be replayed.*{match}"):
            run(model, given, custom_generate=antkv_generate(book, config, cuda_graphs=True), **options)

    refused("1 of 2 layers are not quantized", config=CONFIG.replace(skip_layers=(1,)))
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][0, 20] = 0
    refused("hides tokens after the first one", given=holes)
    eager = tiny_llama(num_hidden_layers=2, attn_implementation="eager")
    refused("attn_implementation='eager'", model=eager)
    growing = AnTKVCache(llama.config, codebook=codebook)
    refused("make it with max_length", past_key_values=growing)
    with pytest.warns(UserWarning, match="not replayed as CUDA graphs: the cache grows: make it with max_length"):
        run(llama, batch, past_key_values=AnTKVCache(llama.config, codebook=codebook), custom_generate=antkv_generate())
    with warnings.catch_warnings():  # what nobody could have had otherwise, or what is meant, needs no word
        warnings.simplefilter("error")
        run(llama, batch, custom_generate=antkv_generate(codebook), num_beams=2)
        switched_off = antkv_generate(cuda_graphs=False)
        run(llama, batch, past_key_values=AnTKVCache(llama.config, codebook=codebook), custom_generate=switched_off)
        run(llama, batch, custom_generate=antkv_generate(config=AnTKVConfig.preset("ott-2bit")))
        run(llama, batch, custom_generate=antkv_generate(codebook, CONFIG.replace(skip_layers=(1,))))
    monkeypatch.setattr(EagerGraph, "runs_python", False)
    refused("as CUDA graphs: backend 'reference' looks at lengths on the host; leave cuda_graphs out")
    with pytest.warns(UserWarning, match="backend 'reference' looks at lengths.*goes on without them"):
        tokens = run(llama, batch, custom_generate=antkv_generate(codebook))
    assert torch.equal(tokens, run(llama, batch, past_key_values=AnTKVCache(llama.config, codebook=codebook)))


@pytest.mark.parametrize(
    "settings, why",
    [
        (AnTKVConfig.preset("ott-4bit", group=32, window=WINDOW, chunk=32), "scalar codes \\(int4g32\\) grows"),
        (CONFIG.replace(anchor_max_tokens=3), "anchors.max_tokens=3 lets anchors go"),
    ],
    ids=("scalar", "budget"),
)
def test_configs_without_a_fixed_size_get_a_cache_that_grows(llama, codebook, stand_in, settings, why):
    tables = codebook if isinstance(settings.key, VQSpec) else None
    cache = AnTKVCache(llama.config, settings, tables)
    tokens = run(llama, inputs(0), past_key_values=cache)
    assert torch.equal(run(llama, inputs(0), custom_generate=antkv_generate(tables, settings)), tokens)
    assert EagerGraph.replays == 0
    for given in ({}, dict(past_key_values=AnTKVCache(llama.config, settings, tables))):
        with pytest.raises(RuntimeError, match=f"cannot be replayed: .*{why}"):
            run(llama, inputs(0), custom_generate=antkv_generate(tables, settings, cuda_graphs=True), **given)
    with pytest.raises(ValueError, match=f"max_length=90 cannot be kept: .*{why}"):
        run(llama, inputs(0), custom_generate=antkv_generate(tables, settings, max_length=90))


def test_a_capture_that_fails_leaves_no_trace(llama, codebook, stand_in, monkeypatch):
    def fail(self, function):
        storage = cache.layers[0].storage
        storage.note_counts(storage.counts._replace(tail=storage.counts.tail + 1))  # as Python in a capture would
        raise torch.OutOfMemoryError("no room\nfor it")

    works = EagerGraph.capture
    monkeypatch.setattr(EagerGraph, "capture", fail)
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=200)
    with pytest.warns(UserWarning, match="OutOfMemoryError: no room; decoding goes on without them"):
        tokens = run(llama, inputs(0), past_key_values=cache, custom_generate=antkv_generate())
    grown = AnTKVCache(llama.config, codebook=codebook)
    assert torch.equal(tokens, run(llama, inputs(0), past_key_values=grown))
    monkeypatch.setattr(EagerGraph, "capture", works)  # it is tried again in the next turn
    more = dict(input_ids=torch.cat([tokens, tokens[:, :3]], 1))
    again = run(llama, more, past_key_values=cache, custom_generate=antkv_generate(cuda_graphs=True))
    assert EagerGraph.replays > 0 and torch.equal(again, run(llama, more, past_key_values=grown))


def test_plans_follow_the_length(llama, codebook, stand_in, monkeypatch):
    """A graph for each bucket of lengths; the first step in one is run as it is, the second captured."""
    monkeypatch.setattr(graphs, "FIRST_BUCKET", CHUNK)
    monkeypatch.setattr(graphs, "GROWTH", 2)
    cache = AnTKVCache(llama.config, codebook=codebook, max_length=100)
    run(llama, inputs(0, n=10), past_key_values=cache, custom_generate=antkv_generate())
    assert cache.get_seq_length() == 9 + NEW and cache.layers[0].storage.coded_length == 4 * CHUNK
    steps, encodings = NEW - 1, 4
    graphs_made = 3 + 1  # steps planned for up to 8 coded tokens, 16 and 32; encoding
    assert EagerGraph.replays == steps + encodings - graphs_made
