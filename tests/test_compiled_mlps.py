"""`antkv_generate(compile_mlps=...)`: the same tokens, MLPs that really ran compiled, a model that stays as it was."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_graphs import CONFIG, NEW, EagerGraph, inputs, run, stand_in  # noqa: F401
from transformers import OPTConfig, OPTForCausalLM

from antkv_hf import AnTKVCache, antkv_generate
from antkv_hf.compiled_mlps import CompiledMLPs, CompileError, compile_options, find_mlps

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Backend:
    """A backend of torch.compile that counts what it compiled and how often that ran; no compiler is needed."""

    def __init__(self):
        self.compiled = self.ran = 0

    def __call__(self, module, example_inputs):
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return module.forward(*args)

        return run


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, CONFIG)


def state_of(model) -> list[dict]:
    """All that could tell that a module was touched."""
    return [dict(m.__dict__) for m in model.modules()]


def assert_untouched(model, before: list[dict]) -> None:
    after = state_of(model)
    assert [set(x) for x in after] == [set(x) for x in before]
    for one, two in zip(before, after):
        assert all(one[name] is two[name] for name in one)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    "padding, options",
    [((0,), {}), ((0, 17), {}), ((0, 4), dict(do_sample=True, top_p=0.9))],
    ids=("greedy", "left_padded", "sampling"),
)
def test_same_tokens_from_compiled_mlps(llama, codebook, stand_in, padding, options):  # noqa: F811
    batch, backend, before = inputs(*padding), Backend(), state_of(llama)
    expected = run(llama, batch, past_key_values=AnTKVCache(llama.config, codebook=codebook), **options)
    generate = antkv_generate(codebook, cuda_graphs=True, compile_mlps=dict(backend=backend))
    assert torch.equal(run(llama, batch, custom_generate=generate, **options), expected)
    layers, steps = 2, NEW - 1
    assert backend.compiled >= 1
    assert backend.ran == layers * (1 + steps - 1)  # each once on zeros, and in every step after the first
    assert_untouched(llama, before)
    again = backend.compiled
    assert torch.equal(run(llama, batch, custom_generate=generate, **options), expected)
    assert backend.compiled == again, "the second call has compiled again"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backends_of_torch(llama, codebook, stand_in, backend):  # noqa: F811
    expected = run(llama, inputs(0), past_key_values=AnTKVCache(llama.config, codebook=codebook))
    generate = antkv_generate(codebook, cuda_graphs=True, compile_mlps=dict(backend=backend))
    assert torch.equal(run(llama, inputs(0), custom_generate=generate), expected)


def test_turns_keep_what_was_compiled(llama, codebook, stand_in):  # noqa: F811
    backend = Backend()
    static, grown = (AnTKVCache(llama.config, codebook=codebook, max_length=n) for n in (400, None))
    generate = antkv_generate(cuda_graphs=True, compile_mlps=dict(backend=backend))
    said = inputs(0)["input_ids"]
    for turn in range(2):
        made, compiled = EagerGraph.made, backend.compiled
        batch = dict(input_ids=torch.cat([said, torch.full((1, turn + 1), 9)], 1))
        expected = run(llama, batch, past_key_values=grown)
        said = run(llama, batch, past_key_values=static, custom_generate=generate)
        assert torch.equal(said, expected)
    assert (EagerGraph.made, backend.compiled) == (made, compiled), "the second turn has captured or compiled again"
    ran, batch = backend.ran, dict(input_ids=torch.cat([said, torch.full((1, 1), 9)], 1))
    run(llama, batch, past_key_values=static, custom_generate=antkv_generate(cuda_graphs=True))
    assert backend.ran == ran, "graphs of compiled MLPs were kept for a call without compile_mlps"


def test_a_hook_of_the_users_own_is_put_back(llama):
    mlp = llama.model.layers[0].mlp
    usual, calls = mlp.forward, []

    def hooked(x):
        calls.append(1)
        return usual(x)

    x = torch.randn(1, 1, 64)
    mlp.forward = hooked
    try:
        mlps = CompiledMLPs(llama, compile_options(dict(backend="eager")))
        with mlps.exchanged():
            llama.model.layers[0].mlp(x)
        mlps.prepare()
        with mlps.exchanged():
            assert mlp.forward is not hooked and torch.equal(mlp(x), usual(x))
        assert mlp.__dict__["forward"] is hooked and calls
    finally:
        del mlp.forward


def test_other_threads_find_the_model_as_it_was(llama):
    """Two that exchange its MLPs take turns, whatever the order; a third one's forward is the usual one."""
    mlp, before, x = llama.model.layers[0].mlp, state_of(llama), torch.randn(1, 1, 64)
    first, second = (CompiledMLPs(llama, compile_options(dict(backend="eager"))) for _ in range(2))
    entered, inside, out = [], threading.Event(), threading.Event()

    def overlap():
        mlp(x)  # of neither
        inside.set()
        with second.exchanged():
            entered.append("second")
            out.wait(10)

    thread = threading.Thread(target=overlap)
    with first.exchanged():
        thread.start()
        assert inside.wait(10)
        assert not first._inputs, "another thread's input was noted"
        thread.join(0.2)
        assert not entered, "both exchanged the MLPs at once"
        mlp(x)
        assert len(first._inputs) == 1
    out.set()
    thread.join(10)
    assert entered and not second._inputs
    assert_untouched(llama, before)


def test_an_error_in_a_step_leaves_the_model_as_it_was(llama, codebook, stand_in, monkeypatch):  # noqa: F811
    before = state_of(llama)
    mlps = CompiledMLPs(llama, compile_options(dict(backend="eager")))
    for _ in range(2):  # watched, then compiled
        with pytest.raises(ZeroDivisionError), mlps.exchanged():
            llama.model(torch.tensor([[5]]))
            raise ZeroDivisionError
        assert_untouched(llama, before)
        mlps.prepare()

    def fail(self, function):
        function()
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(EagerGraph, "capture", fail)
    generate = antkv_generate(codebook, compile_mlps=dict(backend="eager"))
    with pytest.warns(UserWarning, match="OutOfMemoryError: no room; decoding goes on without them"):
        run(llama, inputs(0), custom_generate=generate)
    assert_untouched(llama, before)


def test_a_compiler_that_fails_is_said_and_gone_on_without(llama, codebook, stand_in):  # noqa: F811
    def broken(module, example_inputs):
        raise OSError("no compiler here\nat all")

    before = state_of(llama)
    expected = run(llama, inputs(0), past_key_values=AnTKVCache(llama.config, codebook=codebook))
    settings = dict(compile_mlps=dict(backend=broken))
    with pytest.warns(
        UserWarning, match="torch.compile of the MLPs failed with OSError: no compiler here; decoding goes"
    ):
        tokens = run(llama, inputs(0), custom_generate=antkv_generate(codebook, **settings))
    assert torch.equal(tokens, expected) and EagerGraph.replays > NEW - 5
    with pytest.raises(RuntimeError, match="OSError: no compiler here; leave compile_mlps out"):
        run(llama, inputs(0), custom_generate=antkv_generate(codebook, cuda_graphs=True, **settings))
    static = AnTKVCache(llama.config, codebook=codebook, max_length=400)
    with pytest.warns(UserWarning, match="goes on without compile"):
        said = run(llama, inputs(0), past_key_values=static, custom_generate=antkv_generate(**settings))
    made, graphed = EagerGraph.made, static._graphed
    said = torch.cat([said, said[:, :1]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is known not to work is neither tried nor said again
        said = run(llama, dict(input_ids=said), past_key_values=static, custom_generate=antkv_generate(**settings))
    assert static._graphed is graphed and EagerGraph.made == made
    with pytest.raises(RuntimeError, match="leave compile_mlps out"):  # a strict turn tries again
        more = dict(input_ids=torch.cat([said, said[:, :1]], 1))
        run(llama, more, past_key_values=static, custom_generate=antkv_generate(cuda_graphs=True, **settings))
    assert_untouched(llama, before)


def test_models_without_mlps_and_calls_without_graphs(llama, codebook, monkeypatch, stand_in):  # noqa: F811
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=64, max_position_embeddings=256)).eval()
    opt.requires_grad_(False)
    config = CONFIG.replace(rope="none")
    book = random_codebook(opt, config)
    assert find_mlps(opt) == [] and len(find_mlps(llama)) == 2
    with pytest.raises(CompileError, match="no layer of OPTForCausalLM has an MLP to compile"):
        CompiledMLPs(opt, {})
    with pytest.raises(RuntimeError, match="no layer of OPTForCausalLM.*leave compile_mlps out"):
        run(opt, inputs(0), custom_generate=antkv_generate(book, cuda_graphs=True, compile_mlps=True))
    with monkeypatch.context() as patch:
        patch.setattr("antkv_hf.compiled_mlps.NAMES", ("absent",))
        with pytest.warns(UserWarning, match="no layer of LlamaForCausalLM has an MLP.*goes on without compile_mlps"):
            run(llama, inputs(0), custom_generate=antkv_generate(codebook, compile_mlps=True))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="compile_mlps is left out.*the model is on cpu, not on a GPU"):
        run(llama, inputs(0), custom_generate=antkv_generate(codebook, compile_mlps=True))


def test_what_is_no_option_is_refused():
    assert compile_options(False) is None and compile_options(True) == dict(dynamic=False)
    assert compile_options(dict(backend="eager", dynamic=None)) == dict(backend="eager", dynamic=None)
    with pytest.raises(TypeError, match="compile_mlps='eager' is neither a bool nor a dict"):
        antkv_generate(compile_mlps="eager")
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(ValueError, match=f"mode='{mode}' would capture CUDA graphs inside"):
            antkv_generate(compile_mlps=dict(mode=mode))
    with pytest.raises(ValueError, match="compile_mlps has 'foo', but torch.compile takes fullgraph, dynamic, backend"):
        antkv_generate(compile_mlps=dict(foo=1))
    with pytest.raises(ValueError, match="triton.cudagraphs"):
        antkv_generate(compile_mlps=dict(options={"triton.cudagraphs": True}))
    with pytest.raises(ValueError, match="but cuda_graphs=False: leave one of them out"):
        antkv_generate(cuda_graphs=False, compile_mlps=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        antkv_generate(cuda_graphs=False)
