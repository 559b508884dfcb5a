"""`AnTKVCache.save` and `load`: the loaded cache goes on as the saved one; damage, other models, kills."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import pickle
import signal
import stat
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from conftest import tiny_llama
from helpers import random_codebook
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import build
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec
from antkv_hf.cache import persistence
from antkv_hf.cli import app
from antkv_hf.config import AnchorConfig
from antkv_hf.hashing import tensors_sha256

SPEC = VQSpec(4, 8)
CONFIG = AnTKVConfig(SPEC, SPEC, window=8, chunk=16, anchors=AnchorConfig(fraction=0.13, sinks=2))
GREEDY = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, CONFIG)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture(autouse=True)
def same_lane(llama):
    """`load(path, model)` switches the model's lane; other tests want it as it was."""
    yield
    llama.set_attn_implementation("sdpa")


def ids(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def tensors_of(cache) -> dict[str, torch.Tensor]:
    return {f"{i}.{n}": t for i, layer in enumerate(cache.quantized_layers) if layer.storage is not None
            for n, t in layer.storage.tensors().items()}  # fmt: skip


def assert_same(one: AnTKVCache, two: AnTKVCache) -> None:
    """Same buffers bit for bit, same state around them."""
    ours, theirs = tensors_of(one), tensors_of(two)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert (one.antkv_config, one.on_new_prompt) == (two.antkv_config, two.on_new_prompt)
    assert [x.record_past for x in one.quantized_layers] == [x.record_past for x in two.quantized_layers]
    # 5.17 counts the tokens of a cropped sliding layer in a tensor: 8 bytes that a loaded one does not have
    ours, theirs = (replace(c.memory_footprint(), other_layers=0, dense_bytes=0) for c in (one, two))
    assert ours == theirs


def resign(path, edit) -> None:
    """Changes a saved cache by ``edit(header, tensors)`` and signs it again: what a hash cannot notice."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["antkv_cache"])
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    edit(header, tensors)
    text = json.dumps(header)
    save_file(tensors, path, metadata={"antkv_cache": text, "sha256": tensors_sha256(tensors, text)})


CASES = {
    "greedy": {},
    "float16_anchors": dict(anchors=AnchorConfig(fraction=0.13, dtype="float16")),
    "no_anchors": dict(anchors=AnchorConfig(score="none", sinks=0)),
    "key_norm": dict(anchors=AnchorConfig(score="key_norm", fraction=0.1)),
    "nothing_coded": dict(window=500),
    "budget": dict(anchors=AnchorConfig(fraction=0.13, max_tokens=7)),
}
SCALAR = AnTKVConfig.preset("ott-2bit", window=8, chunk=32)


@pytest.mark.parametrize("case", [*CASES, "scalar"])
def test_goes_on_with_identical_tokens(llama, codebook, path, case):
    config, book = (SCALAR, None) if case == "scalar" else (CONFIG.replace(**CASES[case]), codebook)
    cache = AnTKVCache(llama.config, config, book)
    said = llama.generate(ids(90), past_key_values=cache, **GREEDY)
    cache.save(path)
    loaded = AnTKVCache.load(path, codebook=book)
    assert_same(cache, loaded)
    longer = torch.cat([said, ids(5)], 1)
    expected = llama.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(llama.generate(longer, past_key_values=loaded, **GREEDY), expected)
    assert_same(cache, loaded)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_left_padded_batch_in_the_fast_lane(codebook, path, dtype):
    model = tiny_llama().to(dtype)
    batch, mask = ids(60, 3), torch.ones(3, 60, dtype=torch.int64)
    mask[1, :37] = mask[2, :9] = 0
    model.set_attn_implementation("antkv")
    cache = AnTKVCache(model.config, codebook=codebook)
    said = model.generate(batch, attention_mask=mask, past_key_values=cache, **GREEDY)
    cache.save(path)
    loaded = AnTKVCache.load(path, model, codebook)
    assert model.config._attn_implementation == "antkv"
    assert loaded.quantized_layers[0].storage.tail_keys.dtype == dtype
    longer, mask = torch.cat([said, ids(4, 3)], 1), torch.cat([mask, torch.ones(3, 28, dtype=torch.int64)], 1)
    expected = model.generate(longer, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(longer, attention_mask=mask, past_key_values=loaded, **GREEDY), expected)


def test_32k_tokens(path):
    """32,768 tokens of random keys in every layer, then greedy decoding: logits and tokens equal bit for bit."""
    model = tiny_llama(max_position_embeddings=33_000, num_hidden_layers=2)
    codebook = random_codebook(model, AnTKVConfig.preset("1bit"))
    cache, g = AnTKVCache(model.config, codebook=codebook), torch.Generator().manual_seed(0)
    for _ in range(4):
        for layer in range(2):
            keys, values = cache.update(*(torch.randn(1, 2, 8192, 16, generator=g) for _ in range(2)), layer)
            query = torch.randn(1, 4, 2, 16, generator=g)
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert cache.get_seq_length() == 32_768 and cache.layers[0].storage.coded_length > 32_500
    cache.save(path)
    loaded, outs = AnTKVCache.load(path, codebook=codebook), []
    for c in (cache, loaded):
        token, logits = torch.tensor([[7]]), []
        for _ in range(16):
            logits.append(model(token, past_key_values=c).logits)
            token = logits[-1][:, -1:].argmax(-1)
        outs.append(torch.cat(logits, 1))
    assert torch.equal(*outs)
    assert_same(cache, loaded)


def test_empty_cache_and_reset_cache(llama, codebook, path):
    cache = AnTKVCache(llama.config, codebook=codebook, on_new_prompt="reset")
    for _ in range(2):
        cache.save(path)
        loaded = AnTKVCache.load(path, codebook=codebook)
        assert_same(cache, loaded)
        assert loaded.get_seq_length() == 0 and loaded.on_new_prompt == "reset"
        out = llama.generate(ids(50), past_key_values=loaded, **GREEDY)
        assert torch.equal(out, llama.generate(ids(50), past_key_values=cache, **GREEDY))
        cache.reset()


def test_after_crop_to_nothing_coded(llama, codebook, path):
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(90), past_key_values=cache)
    for left in (61, 1, 0):
        cache.crop(left - cache.get_seq_length())
        cache.save(path)
        loaded = AnTKVCache.load(path, codebook=codebook)
        assert_same(cache, loaded)
        assert loaded.get_seq_length() == left
    out = [llama(ids(70), past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*out)


def test_in_the_middle_of_assisted_decoding(llama, codebook, path):
    """While the past is recorded nothing is coded: the long exact tail is saved, and recording goes on."""
    cache = AnTKVCache(llama.config, codebook=codebook)
    cache.activate_past_recording()
    llama(ids(90), past_key_values=cache)
    cache.save(path)
    loaded = AnTKVCache.load(path, codebook=codebook)
    assert_same(cache, loaded)
    for c in (cache, loaded):
        assert c.layers[0].storage.coded_length == 0
        llama(ids(6), past_key_values=c)
        c.crop(-3)
        assert c.layers[0].storage.coded_length == 80
    assert_same(cache, loaded)


def test_prompt_guard_is_kept(llama, codebook, path):
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama.generate(ids(40), past_key_values=cache, **GREEDY)
    cache.save(path)
    loaded = AnTKVCache.load(path, codebook=codebook)
    with pytest.raises(ValueError, match="tokens of another prompt"):
        llama.generate(ids(90, seed=1), past_key_values=loaded, **GREEDY)


HYBRID = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    query_pre_attn_scalar=16, sliding_window=16, layer_types=["sliding_attention"] * 3 + ["full_attention"],
)  # fmt: skip


@pytest.mark.parametrize("options", ({}, dict(prompt_lookup_num_tokens=4)))
@pytest.mark.parametrize("tokens", (9, 50))
@pytest.mark.filterwarnings("ignore:AnTKVCache quantizes")
def test_hybrids_keep_their_sliding_layers(path, options, tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **HYBRID)).eval()
    cache = AnTKVCache(model.config, AnTKVConfig.preset("identity", window=8, chunk=4))
    said = model.generate(ids(tokens), past_key_values=cache, **GREEDY, **options)
    cache.save(path)
    loaded = AnTKVCache.load(path)  # an identity cache says itself what its model is
    for one, two in zip(cache.layers[:3], loaded.layers[:3]):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
        assert (one.cumulative_length, one.record_past) == (two.cumulative_length, two.record_past)
    assert_same(cache, loaded)
    if options:  # transformers' next step would read all of the prompt again
        for held in (cache, loaded):
            with pytest.raises(ValueError, match="assisted decoding would read the whole prompt again"):
                model.generate(said, past_key_values=held, **GREEDY, **options)
        return
    expected, out = (model.generate(said, past_key_values=c, **GREEDY) for c in (cache, loaded))
    assert torch.equal(out, expected)


def test_skipped_layers_are_kept(llama, codebook, path):
    cache = AnTKVCache(llama.config, CONFIG.replace(skip_layers=(1,)), codebook)
    llama(ids(60), past_key_values=cache)
    cache.save(path)
    loaded = AnTKVCache.load(path, codebook=codebook)
    assert torch.equal(cache.layers[1].keys, loaded.layers[1].keys)
    outs = [llama(ids(20), past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*outs)


@pytest.mark.filterwarnings("ignore:AnTKVCache quantizes")
def test_linear_attention_is_refused_by_name(path):
    config = AutoConfig.for_model(
        "qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], hidden_size=32
    )
    cache = AnTKVCache(config, AnTKVConfig.preset("identity"))
    with pytest.raises(ValueError, match="layer 0 is a LinearAttentionLayer, whose state cannot be saved"):
        cache.save(path)
    assert os.listdir(path.parent) == []


def test_layers_go_where_accelerate_computes_them(codebook, path):
    model = tiny_llama()
    cache = AnTKVCache(model.config, codebook=codebook)
    expected = model(ids(60), past_key_values=cache).logits
    cache.save(path)
    cpu_offload(model, execution_device="cpu")  # parameters are on "meta" between calls
    loaded = AnTKVCache.load(path, model, codebook)
    assert {layer.device.type for layer in loaded.layers} == {"cpu"}
    assert model(ids(9), past_key_values=loaded).logits.shape[1] == 9 and expected.shape[1] == 60


# -------------------------------------------------------------------- codebook and model
def test_codebook_is_found_again_and_recognised(llama, codebook, path, tmp_path):
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(60), past_key_values=cache)
    cache.save(path)
    with pytest.raises(ValueError, match="never loaded from anywhere.*pass codebook="):
        AnTKVCache.load(path)
    codebook.save_pretrained(tmp_path / "book")
    assert_same(cache, AnTKVCache.load(path, codebook=tmp_path / "book"))

    cache = AnTKVCache.from_pretrained(tmp_path / "book")
    llama(ids(60), past_key_values=cache)
    cache.save(path)
    assert_same(cache, AnTKVCache.load(path))
    (tmp_path / "book").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="not where it was; pass codebook="):
        AnTKVCache.load(path)
    assert_same(cache, AnTKVCache.load(path, codebook=tmp_path / "moved"))
    other = random_codebook(llama, CONFIG, seed=1)
    with pytest.raises(ValueError, match=f"{codebook.sha256[:12]}.*{other.sha256[:12]}.*their own tables"):
        AnTKVCache.load(path, codebook=other)


def test_shipped_codebooks_are_remembered_by_name():
    book = AnTKVCodebook.from_pretrained("smollm2-135m-instruct-1bit")
    assert book.source == {"name_or_path": "smollm2-135m-instruct-1bit", "revision": None}
    assert len(book.sha256) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=64), "vocab_size 128.*vocab_size 64"),
        (dict(num_hidden_layers=2), "num_hidden_layers 3.*num_hidden_layers 2"),
        (dict(num_attention_heads=2), "num_attention_heads 4.*num_attention_heads 2"),
    ],
)
def test_another_model(llama, codebook, path, changes, message):
    AnTKVCache(llama.config, codebook=codebook).save(path)
    other = tiny_llama(**changes)
    with pytest.raises(ValueError, match=message):
        AnTKVCache.load(path, other, codebook)
    assert other.config._attn_implementation != "antkv", "a refused load must not touch the model"


def test_a_model_of_another_dtype(llama, codebook, path):
    """Named when it is loaded; its first step is refused, unless it computes under the autocast of the first fill."""
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(20), past_key_values=cache)
    cache.save(path)
    other = tiny_llama().bfloat16()
    with pytest.warns(UserWarning, match="filled in torch.float32, but the model is torch.bfloat16: unless it goes on"):
        loaded = AnTKVCache.load(path, other, codebook)
    with pytest.raises(ValueError, match="keys moved from torch.float32 on cpu to torch.bfloat16"):
        other(ids(1), past_key_values=loaded)
    assert loaded.get_seq_length() == 20


def test_filled_under_autocast(path):
    """Without RoPE keys come in autocast's dtype, which the model's own does not tell before it is entered."""
    opt = build("opt").model
    cache = AnTKVCache(opt.config, AnTKVConfig.preset("identity"))
    with torch.autocast("cpu", torch.bfloat16):
        opt(ids(20) % 60, past_key_values=cache)
        cache.save(path)
    with pytest.warns(UserWarning, match="filled in torch.bfloat16, but the model is torch.float32: unless it goes on"):
        loaded = AnTKVCache.load(path, opt)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*(opt(ids(2) % 60, past_key_values=held).logits for held in (cache, loaded)))


@pytest.mark.parametrize("skip", [(), (0,)], ids=("all", "skipped"))
@pytest.mark.parametrize("kind", ["identity", "ott-2bit", "codebook"])
def test_autocast_with_rope(codebook, path, kind, skip):
    """Keys come in float32 and values in bfloat16: coded, saved and gone on from, near what float32 gives."""
    model = tiny_llama()
    if kind == "codebook":
        config, book = codebook.config.replace(skip_layers=skip), codebook
    else:
        sizes = {} if kind == "ott-2bit" else dict(window=8, chunk=8)
        config, book = AnTKVConfig.preset(kind, skip_layers=skip, **sizes), None
    plain, cache = (AnTKVCache(model.config, config, book) for _ in range(2))
    n = config.window + 2 * config.chunk + 4
    expected = [model(step, past_key_values=plain).logits for step in (ids(n), ids(3))]
    with torch.autocast("cpu", torch.bfloat16):
        model(ids(n), past_key_values=cache)
        cache.save(path)
        loaded = AnTKVCache.load(path, model, book)
        found = [model(ids(3), past_key_values=held).logits.float() for held in (cache, loaded)]
    assert torch.equal(*found) and cache.quantized_layers[0].storage.coded_length
    assert (found[0] - expected[1]).norm() < 0.1 * expected[1].norm()


def test_devices_that_are_not_there(llama, codebook, path):
    AnTKVCache(llama.config, codebook=codebook).save(path)
    with pytest.raises(ValueError, match="device='xyz' is unknown: give cpu, cuda or cuda:<number>"):
        AnTKVCache.load(path, codebook=codebook, device="xyz")
    with pytest.raises(ValueError, match="device='cuda:99', but this PyTorch sees .* GPUs: give cpu"):
        AnTKVCache.load(path, codebook=codebook, device="cuda:99")


def test_pickle_says_what_to_do(llama, codebook):
    cache = AnTKVCache(llama.config, codebook=codebook)
    for attempt in (pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"not pickled.*cache.save\(path\) and AnTKVCache.load\(path, model\)"):
            attempt(cache)
    llama(ids(40), past_key_values=cache)
    clone = copy.deepcopy([cache, cache])
    assert clone[0] is clone[1] is not cache and clone[0]._first is clone[0].layers[0] is not cache._first


# -------------------------------------------------------------------- bad files
def test_bad_paths(llama, codebook, tmp_path):
    cache = AnTKVCache(llama.config, codebook=codebook)
    with pytest.raises(IsADirectoryError, match=r"is a folder: .*cache\.safetensors"):
        cache.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(tmp_path / "no" / "x")
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no file"):
            AnTKVCache.load(place)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h, t: h.update(format_version=7), "format_version 7 is not known .this antkv-hf reads 1.: upgrade"),
        (lambda h, t: h.update(format="other"), "not written by AnTKVCache.save"),
        (lambda h, t: h.pop("layers"), "a field is missing.*layers.*Fill the cache again"),
        (lambda h, t: h["config"].update(wrong=1), "unknown config field 'wrong'"),
        (lambda h, t: h["config"].update(key="d8b8"), "asks for keys d8b8"),
        (lambda h, t: h["config"].update(window=-1), "cache.*: window=-1 must be at least 1"),
        (lambda h, t: h.update(on_new_prompt="ignore"), "must be 'error' or 'reset'"),
        (lambda h, t: h.update(layers=h["layers"][:2]), "holds 2 layers, but the model has 3: load it with"),
        (lambda h, t: h["layers"][1].update(type="DynamicLayer"), "layer 1 is a DynamicLayer in .*: load it with"),
        (lambda h, t: h["layers"][1].update(length=9), "layer 1: it holds 1 x 90 tokens, but states 1 x 9; load it"),
        (lambda h, t: t["layers.0.anchors.positions"].fill_(999), "anchors.positions run from 999 to 999, but only 80"),
        (lambda h, t: t["layers.0.sinks.positions"].fill_(-2), "sinks.positions run from -2 to -2"),
        (lambda h, t: t["layers.0.offset"].fill_(-1), "offset holds -1"),
        (lambda h, t: t.pop("layers.0.tail_values"), "layer 0: tail_values is missing"),
        (lambda h, t: t.pop("layers.0.value_codes"), "layer 0: value_codes is missing"),
        (lambda h, t: t.pop("layers.0.anchors.key_scale"), "layer 0: anchors.key_scale is missing"),
        (lambda h, t: t.update({"layers.0.extra": torch.zeros(1)}), "layer 0: extra is no buffer"),
        (lambda h, t: t.update({"layers.2.key_codes": t["layers.2.key_codes"][..., :2].clone()}),
         r"layer 2: key_codes is torch.uint8 \(1, 2, 80, 2\), but must be torch.uint8 \(1, 2, 80, 4\)"),
        (lambda h, t: t.update({"layers.2.key_codes": t["layers.2.key_codes"].int()}), "must be torch.uint8"),
        (lambda h, t: t.update({"layers.1.tail_keys": t["layers.1.tail_keys"].double()}), "torch.float64"),
        (lambda h, t: t.update({"layers.1.tail_keys": t["layers.1.tail_keys"][0].clone()}), "do not belong together"),
        (lambda h, t: t.update({n: x.repeat_interleave(2, 0) for n, x in t.items() if n.startswith("layers.1.")})
         or h["layers"][1].update(batch=2), r"batches of different sizes: \[1, 2\]; fill"),
        (lambda h, t: t.update(prompt_ids=torch.zeros(3)), "prompt_ids are torch.float32"),
    ],
)  # fmt: skip
def test_a_signed_file_is_still_checked(llama, codebook, path, edit, message):
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(90), past_key_values=cache)
    cache.save(path)
    resign(path, edit)
    with pytest.raises(ValueError, match=message):
        AnTKVCache.load(path, codebook=codebook)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["layers.0.scales.starts"].fill_(0), r"group 0 runs from 0 to 0; groups follow each other"),
        (lambda t: t["layers.0.scales.starts"].add_(3), "group 0 runs from 3 to 35"),
        (lambda t: t.update({"layers.1.scales.starts": torch.tensor([0], dtype=torch.int32)}),
         r"scales.scale is torch.float16 \(1, 2, 2, 16\), but must be torch.float16 \(1, 2, 1, 16\)"),
        (lambda t: t.pop("layers.1.scales.value_std"), "scales.value_std is missing"),
        (lambda t: t.pop("layers.1.anchor_scores"), "anchor_scores is missing"),
        (lambda t: t.update({"layers.2.value_codes": t["layers.2.value_codes"][..., :3].clone()}), "value_codes is"),
    ],
)  # fmt: skip
def test_a_signed_file_of_scalar_codes_is_still_checked(llama, path, edit, message):
    cache = AnTKVCache(llama.config, SCALAR)
    llama(ids(90), past_key_values=cache)
    cache.save(path)
    resign(path, lambda header, tensors: edit(tensors))
    with pytest.raises(ValueError, match=message):
        AnTKVCache.load(path)


def test_changed_bytes_are_noticed(llama, codebook, path):
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(90), past_key_values=cache)
    cache.save(path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="contents of sha256 .* but states .*damaged or changed"):
        AnTKVCache.load(path, codebook=codebook)
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"is no cache file: .*\. Give one that AnTKVCache\.save wrote"):
        AnTKVCache.load(path, codebook=codebook)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not written by AnTKVCache.save"):
        AnTKVCache.load(path, codebook=codebook)


# -------------------------------------------------------------------- atomic writes
def test_permissions_follow_the_umask(llama, codebook, path):
    old = os.umask(0o027)
    try:
        AnTKVCache(llama.config, codebook=codebook).save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file(llama, codebook, path, monkeypatch):
    cache = AnTKVCache(llama.config, codebook=codebook)
    cache.save(path)
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    for owner, name in ((persistence, "save_file"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full_disk)
            with pytest.raises(OSError, match="No space left"):
                cache.save(path)
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def _save_and_die(cache, path, moment: str) -> None:
    """In a child process: a save that is killed at `moment`."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors, target, metadata):
        save_file(tensors, target, metadata=metadata)
        os.truncate(target, os.path.getsize(target) // 2)
        die()

    if moment == "half written":
        persistence.save_file = half
    else:
        setattr(os, moment, die)
    cache.save(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ("half written", "fsync", "replace"))
@pytest.mark.parametrize("existed", (True, False))
def test_a_kill_leaves_the_old_file_or_none(llama, codebook, path, moment, existed):
    old = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(30), past_key_values=old)
    new = copy.deepcopy(old)
    llama(ids(60), past_key_values=new)
    if existed:
        old.save(path)
    child = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(new, path, moment))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert path.exists() == existed
    if existed:
        assert_same(old, AnTKVCache.load(path, codebook=codebook))
    new.save(path)
    assert_same(new, AnTKVCache.load(path, codebook=codebook))


# -------------------------------------------------------------------- antkv inspect
def test_inspect_scalar_codes(llama, path):
    cache = AnTKVCache(llama.config, SCALAR)
    llama(ids(90), past_key_values=cache)
    cache.save(path)
    found = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)
    bitmaps = sum(layer.storage.exact_bits.numel() for layer in cache.quantized_layers)
    footprint = cache.memory_footprint()
    assert found["tensor_bytes"]["codes"] == footprint.codes
    assert found["tensor_bytes"]["anchors"] == footprint.anchors - bitmaps
    text = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert "codebook    none needed" in text and "keys int2g32, values int2g64" in text


def test_inspect(llama, codebook, path):
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(90, 2), past_key_values=cache)
    cache.save(path)
    found = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)
    footprint = cache.memory_footprint()
    assert (found["batch"], found["tokens"], found["coded_tokens"]) == (2, 90, 80)
    bitmaps = sum(layer.storage.exact_bits.numel() for layer in cache.quantized_layers)  # made again on loading
    for kind in ("codes", "anchors", "sinks", "window", "scores"):
        size = found["tensor_bytes"][kind] + (bitmaps if kind == "anchors" else 0)
        assert size == getattr(footprint, kind)
    text = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert "2 x 90: 80 coded, 10 exact" in text and codebook.sha256[:12] in text
    path.write_bytes(path.read_bytes()[:-3])
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 1 and "is no cache file" in result.stderr
