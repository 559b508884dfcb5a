"""Several processes: tensor parallelism gives the tokens of one process, and a shared calibration its tables."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_calibration import calibrated, small_llama, tables_equal
from test_cli import TEXT, character_tokenizer
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from two_processes import SIZE, TwoProcesses
from typer.testing import CliRunner

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, antkv_generate, calibrate
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.calibration import work_folder
from antkv_hf.calibration.processes import device_of
from antkv_hf.calibration.sensitivity import Mixed
from antkv_hf.tensor_parallel import HeadShard, check_heads, head_shard, tp_size

HEADS = 4  # two a process
CONFIG = AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8), window=8, chunk=16)
IDENTITY = AnTKVConfig.preset("identity", window=8, chunk=4)
SCALAR = AnTKVConfig.preset("ott-4bit", group=32, window=8, chunk=32)
GREEDY = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
BEAMS = dict(GREEDY, num_beams=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo, which this PyTorch was built without")
    processes = TwoProcesses(tmp_path_factory.mktemp("gloo"))
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory):
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} CUDA GPUs")
    processes = TwoProcesses(tmp_path_factory.mktemp("nccl"), "nccl")
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_llama(num_attention_heads=8, num_key_value_heads=HEADS, hidden_size=128, num_hidden_layers=2).save_pretrained(
        place
    )
    return place


def batch(device="cpu") -> dict[str, torch.Tensor]:
    """Two prompts of 50 tokens, the second left-padded by 9."""
    ids = torch.randint(3, 128, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :9] = mask[1, :9] = 0
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


# -------------------------------------------------------------------- in both processes
def own_device() -> str:
    return "cpu" if distributed.get_backend() == "gloo" else f"cuda:{distributed.get_rank()}"


@functools.cache
def models(folder):
    """The model as a whole, and as this process's share of it, on this process's device."""
    whole = AutoModelForCausalLM.from_pretrained(folder).eval().to(own_device())
    shared = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    return whole, shared


@functools.cache
def codebook(folder) -> AnTKVCodebook:
    whole = models(folder)[0]
    return random_codebook(whole, CONFIG, rotary=model_rotary(whole.config)[0])


def generated(folder, lane: str, config: AnTKVConfig, options: dict):
    """Tokens and caches of the whole model and of the shared one."""
    tokens, caches = [], []
    for model in models(folder):
        model.set_attn_implementation(lane)
        book = codebook(folder) if config == CONFIG else None
        caches.append(AnTKVCache(model.config, config, book))
        tokens.append(model.generate(**batch(model.device), past_key_values=caches[-1], **options))
    return tokens, caches


def compare(folder, lane, config, options):
    (expected, found), (whole, shared) = generated(folder, lane, config, options)
    rank, mine = distributed.get_rank(), shared.layers[0].storage.key_codes
    theirs = whole.layers[0].storage.key_codes.chunk(SIZE, 1)[rank]
    return dict(
        tokens=found.tolist(), same=torch.equal(expected, found), heads=mine.shape[1],
        codes=mine.shape == theirs.shape and (config == IDENTITY or torch.equal(mine, theirs)),
        sizes=[vars(c.memory_footprint()) for c in (whole, shared)], backend=shared.backend,
    )  # fmt: skip


def compare_custom_generate(folder):
    found = [
        m.generate(**batch(m.device), custom_generate=antkv_generate(codebook(folder)), **GREEDY)
        for m in models(folder)
    ]
    return torch.equal(*found)


def refusals(folder, place):
    """Messages of what is refused under tensor parallelism."""
    whole, shared = models(folder)
    rank = distributed.get_rank()
    cache = AnTKVCache(shared.config, codebook=codebook(folder))
    other = random_codebook(tiny_llama(num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=2), CONFIG)
    filled = AnTKVCache(whole.config, codebook=codebook(folder))
    filled.save(place / f"{rank}.safetensors")
    factory = other.codec_factory(CONFIG, [None] * 2)
    attempts = dict(
        save=lambda: cache.save(place / "cache.safetensors"),
        load=lambda: AnTKVCache.load(place / f"{rank}.safetensors", shared, codebook(folder)),
        calibrate=lambda: calibrate(shared, character_tokenizer(), [TEXT], CONFIG),
        heads=lambda: factory(0, torch.device("cpu"), 2, 16, 16),
    )
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(ValueError) as error:
            attempt()
        messages[name] = str(error.value)
    assert not (place / "cache.safetensors").exists()
    return messages


def share_of_mesh(shape, names, local):
    """The share of 4 heads by a mesh, or the message."""
    mesh = distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    try:
        return tp_size(None, mesh), head_shard(local, HEADS, mesh)
    except ValueError as error:
        return tp_size(None, mesh), str(error)


def calibrated_here(work_dir, batch_size, mixed):
    place = "cuda" if distributed.get_backend() == "nccl" else "cpu"  # its own GPU is the current one
    model = small_llama(num_hidden_layers=3).to(place)
    codebook = calibrated(model, tokens=448, batch_size=batch_size, work_dir=work_dir, mixed=mixed)
    return {name: t.numpy() for name, t in codebook._tensors().items()}, codebook.calibration


def command(arguments):
    from antkv_hf.cli import app

    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


# -------------------------------------------------------------------- tensor parallelism
@pytest.mark.parametrize(
    ("lane", "config", "options"),
    [
        ("sdpa", IDENTITY, GREEDY),
        ("antkv", IDENTITY, GREEDY),
        ("sdpa", CONFIG, BEAMS),
        ("antkv", CONFIG, GREEDY),
        ("antkv", SCALAR, GREEDY),
    ],
    ids=("sdpa-identity", "antkv-identity", "sdpa-codebook-beams", "antkv-codebook", "antkv-scalar"),
)
def test_tokens_are_those_of_one_process(two, folder, lane, config, options):
    first, second = two.run(compare, folder, lane, config, options)
    assert first["same"] and second["same"] and first["tokens"] == second["tokens"]
    assert first["heads"] == second["heads"] == HEADS // SIZE and first["codes"] and second["codes"]
    # the starts of its groups of keys are with each process
    for name in ("window", "tables", "elements", *(() if config == SCALAR else ("codes",))):
        assert first["sizes"][1][name] + second["sizes"][1][name] == first["sizes"][0][name], name


@pytest.mark.gpu
@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
@pytest.mark.parametrize("config", (IDENTITY, CONFIG, SCALAR), ids=("identity", "codebook", "scalar"))
def test_tokens_on_two_gpus(two_gpus, folder, lane, config):
    first, second = two_gpus.run(compare, folder, lane, config, GREEDY)
    assert first["same"] and second["same"] and first["tokens"] == second["tokens"]
    assert first["heads"] == second["heads"] == HEADS // SIZE and first["backend"] == second["backend"]
    assert first["backend"] == ("reference" if config == IDENTITY else "triton")


def test_custom_generate(two, folder):
    assert two.run(compare_custom_generate, folder) == [True, True]


def test_what_is_refused(two, folder, tmp_path):
    for found in two.run(refusals, folder, tmp_path):
        assert "cannot save a cache under tensor parallelism: each of 2 processes" in found["save"]
        assert "cannot load a cache under tensor parallelism" in found["load"]
        assert "spread over 2 tensor-parallel processes" in found["calibrate"]
        assert (
            "2 kv heads of size 16" in found["heads"]
            and "2 of 8 kv heads is not the share of one of 2" in (found["heads"])
        )


def test_a_mesh_says_which_share(two):
    shares = two.run(share_of_mesh, (1, 2), ("fsdp", "tp"), 2)
    assert shares == [(2, HeadShard(rank, 2)) for rank in range(2)]
    for size, message in two.run(share_of_mesh, (2, 1), ("fsdp", "tp"), 2):
        assert size == 1 and "2 of 4 kv heads is not the share of one of 1 processes" in message
    assert two.run(share_of_mesh, (2,), ("fsdp",), 4) == [(1, None)] * 2, "no tensor parallelism: all heads"


def test_shares_without_a_mesh(monkeypatch):
    assert head_shard(4, 4) is None
    with pytest.raises(ValueError, match="2 of 4 kv heads is no share .* not initialized"):
        head_shard(2, 4)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    assert head_shard(1, 4) == HeadShard(3, 4)
    with pytest.raises(ValueError, match=r"2 processes share the 4 kv heads of a layer, but 4 run.*model=model"):
        head_shard(2, 4)
    with pytest.raises(ValueError, match="3 of 4 kv heads is not the share of one of 4 processes"):
        head_shard(3, 4)


def test_heads_that_do_not_divide():
    config = tiny_llama(num_key_value_heads=3, num_attention_heads=6, hidden_size=96).config
    config.distributed_config = DistributedConfig(tp_size=2, tp_plan="auto")
    with pytest.raises(ValueError, match="3 kv heads cannot be shared by 2 tensor-parallel processes.*divides 3"):
        AnTKVCache(config, IDENTITY)
    config.base_model_tp_plan = {"layers.*.self_attn.k_proj": "colwise_gather_output"}  # every process gets all heads
    check_heads(config, 3, 2)


# -------------------------------------------------------------------- calibration
@pytest.mark.parametrize(
    ("batch_size", "mixed"), [(1, None), (2, Mixed(0.75, ("d8b4", "d4b4"), windows=1, protocols=("S16", "W0")))]
)
def test_a_shared_calibration_gives_the_tables_of_one_process(two, tmp_path, batch_size, mixed):
    """7 windows and 3 layers, so that the shares are uneven; equal bit for bit, since nothing is added up across."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = calibrated(small_llama(num_hidden_layers=3), tokens=448, batch_size=batch_size, mixed=mixed)
    finally:
        torch.set_num_threads(threads)
    work_dir = None if batch_size == 1 else tmp_path
    for found, made in two.run(calibrated_here, work_dir, batch_size, mixed):
        assert found.keys() == expected._tensors().keys() and made == expected.calibration
        for name, tensor in expected._tensors().items():
            assert torch.equal(torch.from_numpy(found[name]), tensor), name
    if work_dir is not None:
        again = two.run(calibrated_here, work_dir, batch_size, mixed)  # nothing is left to do
        assert again[0][1] == expected.calibration


@pytest.mark.gpu
def test_a_calibration_shared_by_two_gpus(two_gpus, tmp_path):
    expected = calibrated(small_llama(num_hidden_layers=3).to("cuda:0"), tokens=448, batch_size=2)
    for found, made in two_gpus.run(calibrated_here, tmp_path, 2, None):
        assert found.keys() == expected._tensors().keys() and made == expected.calibration
        for name, tensor in expected._tensors().items():
            assert torch.equal(torch.from_numpy(found[name]), tensor), name


def test_the_command_writes_once(two, tmp_path):
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 8, encoding="utf-8")
    arguments = [
        "calibrate", str(tmp_path / "model"), str(tmp_path / "text.txt"), "--key-bits", "d4b4", "--value-bits", "d8b4",
        "--tokens", "256", "--window", "64", "--samples", "256", "--device", "cpu", "-o",
    ]  # fmt: skip
    (code, said, _), other = two.run(command, [*arguments, str(tmp_path / "made")])
    assert code == 0 and said.startswith("wrote ") and other[:2] == (0, "")
    assert command([*arguments, str(tmp_path / "alone")])[0] == 0
    assert tables_equal(*(AnTKVCodebook.from_pretrained(tmp_path / name) for name in ("made", "alone")))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    assert device_of("cpu", 3) == "cpu" and device_of("auto", 0) == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name, 1) for name in ("auto", "cuda")] == ["cuda:1"] * 2
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU, since there are 2: start 2"):
        device_of("auto", 2)
    with pytest.raises(ValueError, match="--device cuda:0 would be shared"):
        device_of("cuda:0", 1)


def test_a_folder_that_is_not_shared(tmp_path):
    with pytest.raises(ValueError, match=r"process 1 does not see the work_dir .* of process 0"):
        work_folder.check_shared(tmp_path, 1)
