"""Caches filled with synthetic keys, values and codes, and the ways to decode that are compared over them.

All decode through transformers' own ``generate``, so that what a step costs besides the model's forward is the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import time_side_by_side
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StoppingCriteria
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from antkv_hf import AnTKVCache, AnTKVCodebook, antkv_generate
from antkv_hf.compiled_mlps import CompiledMLPs, compile_options
from antkv_hf.graphs import CudaGraph
from antkv_hf.static_storage import Counts, StaticStorage
from antkv_hf.storage import LayerStorage

PROMPT = 7  # the token of which all prompts are made
WARM_UP = 4  # steps before the clock starts: the prompt's last token, a warm-up, a capture, a replay
BASELINE, COMPILED = "bfloat16, graphs", ", MLPs compiled"
FLASH = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class Clock(StoppingCriteria):
    """Notes when each token is there: ``generate`` has then waited for the one before it.

    Args:
        limit: seconds after which ``generate`` is stopped, counted from the first timed step.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.times: list[float] = []
        self._limit = limit

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        timed = len(self.times) > WARM_UP
        late = timed and self._limit is not None and self.times[-1] - self.times[WARM_UP - 1] > self._limit
        return torch.full((input_ids.shape[0],), late, dtype=torch.bool, device=input_ids.device)


def seconds_a_step(model, lane: Lane, cache, context: int, steps: int, limit: float | None = None) -> float:
    """Mean seconds of `steps` decode steps after `context` tokens, greedy, after `WARM_UP` ones; rewinds `cache`.

    Args:
        limit: seconds after which the mean is taken of the steps that there are.
    """
    model.set_attn_implementation(lane.implementation)
    clock, new = Clock(limit), WARM_UP + steps
    batch = lane.batch_of(cache)
    ids = torch.full((batch, context + 1), PROMPT, device=model.device)  # a cache continues the prompt that it has seen
    model.generate(
        ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        stopping_criteria=[clock], custom_generate=lane.custom_generate,
    )  # fmt: skip
    lane.rewind(cache, len(clock.times))
    return (clock.times[-1] - clock.times[WARM_UP - 1]) / (len(clock.times) - WARM_UP)


@dataclass(frozen=True)
class Lane:
    """One way to decode. `make_cache` takes a batch, a context and how many tokens more there must be room for.

    Args:
        warm_ups: rounds that are not timed: in the second one, AnTKV's encoding is captured.
        slow: the host takes part in every step, so that fewer of them tell as much.
        layers_beside: how often a step holds one layer's keys and values in 16 bits beside the cache.
        baseline: the lane whose speed is 1.
    """

    name: str
    implementation: str
    make_cache: Callable[[int, int, int], Cache]
    rewind: Callable[[Cache, int], None]
    batch_of: Callable[[Cache], int]
    custom_generate: Callable | None = None
    warm_ups: int = 0
    slow: bool = False
    layers_beside: float = 0.0
    baseline: str = BASELINE


def lanes(model, codebook: AnTKVCodebook, compile_mlps: bool | dict[str, Any] = False) -> list[Lane]:
    """DynamicCache; graph-captured attention over bfloat16; AnTKV with the host in every step; AnTKV as graphs.

    Args:
        compile_mlps: as `antkv_generate`'s; adds the second and the fourth with compiled MLPs.
    """
    on_gpu = model.device.type == "cuda"
    fastest = "flash"
    if on_gpu:
        fastest = _faster_library(model)
        print(f"the bfloat16 baseline uses PyTorch's {fastest} attention, the faster one here at 1 x 32K")
    AttentionInterface.register(
        "ring", lambda *args, **kwargs: _ring_attention(fastest if on_gpu else None, *args, **kwargs)
    )
    AttentionMaskInterface.register("ring", lambda *args, **kwargs: None)

    def dynamic(batch: int, context: int, room: int) -> Cache:
        cache = DynamicCache(config=model.config)
        for i in range(len(cache.layers)):
            cache.update(*random_keys(model, batch, context), i)
        return cache

    def grown(batch: int, context: int, room: int) -> Cache:
        cache = AnTKVCache(model.config, codebook=codebook)
        for i, layer in enumerate(cache.quantized_layers):
            full = AnTKVCache(model.config, codebook=codebook, max_length=context).quantized_layers[i]
            fill_layer(full, *random_keys(model, batch, 0), context)
            s = full.storage
            layer.lazy_initialization(*random_keys(model, batch, 0))
            parts = {name: tensor.clone() for name, tensor in s.tensors().items()}
            layer.storage = LayerStorage.from_tensors(s.codec, s.config, s.score, parts, s.backend)
            layer.filled = copy.copy(layer.storage)
        return cache

    def crop(cache: Cache, tokens: int) -> None:
        cache.crop(-tokens)

    def in_graphs(name: str, ours: bool, compile_mlps: bool | dict[str, Any]) -> Lane:
        options, baseline = compile_options(compile_mlps), BASELINE + (COMPILED if compile_mlps else "")
        if not ours:
            return Lane(
                name, "ring", lambda batch, context, room: RingCache(model, batch, context),
                lambda cache, tokens: None, lambda c: c.layers[0].keys.shape[0], partial(_ring_generate, options),
                warm_ups=1 if compile_mlps else 0, baseline=baseline,
            )  # fmt: skip
        generate = antkv_generate(cuda_graphs=True if on_gpu else None, compile_mlps=compile_mlps)
        return Lane(
            name, "antkv", partial(static_cache, model, codebook), rewind_static, lambda c: c.layers[0].batch_size,
            generate, 2 if on_gpu else 0, baseline=baseline,
        )  # fmt: skip

    plain = Lane(
        "DynamicCache", "sdpa", dynamic, crop, lambda c: c.layers[0].keys.shape[0], slow=True, layers_beside=2,
        warm_ups=1 if on_gpu else 0,  # its first steps look for memory that later ones have: half as fast
    )  # fmt: skip
    found = [
        plain,
        in_graphs(BASELINE, False, False),
        Lane("AnTKV, eager", "antkv", grown, rewind_grown, lambda c: c.layers[0].batch_size, slow=True),
        in_graphs("AnTKV, graphs", True, False),
    ]
    if compile_mlps:
        found += [in_graphs(BASELINE + COMPILED, False, compile_mlps)]
        found += [in_graphs("AnTKV, graphs" + COMPILED, True, compile_mlps)]
    return found


# -------------------------------------------------------------------------------------------------------------- filling
def random_keys(model, batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer ``(batch, kv_heads, n, head_dim)`` as the model would hand them over."""
    text = model.config
    shape = batch, text.num_key_value_heads, n, text.head_dim
    keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    return keys, values


def fill_layer(layer, keys: torch.Tensor, values: torch.Tensor, context: int) -> None:
    """Puts `context` random tokens into an empty static layer, in place: random codes, anchors, sinks and tail."""
    layer.lazy_initialization(keys, values)
    storage = layer.storage
    assert isinstance(storage, StaticStorage)
    b, window, chunk = storage.buffers, storage.config.window, storage.config.chunk
    coded = max((context - window) // chunk * chunk, 0)
    slots = coded // chunk * storage.slots_per_chunk
    for codes in (b.key_codes, b.value_codes):
        codes.random_(0, 256)
    for tail in (b.tail_keys, b.tail_values):
        tail.normal_()
    device = storage.offset.device
    if b.sinks is not None and coded:
        b.sinks.positions.copy_(torch.arange(b.sinks.positions.shape[2], device=device))
        b.sinks.keys.normal_()
        b.sinks.values.normal_()
        storage._mark(b.sinks.positions)
    if b.anchors is not None and slots:
        first = torch.arange(0, coded, chunk, device=device).unsqueeze(1)
        place = torch.arange(storage.slots_per_chunk, device=device) * (chunk // storage.slots_per_chunk) + chunk // 8
        b.anchors.positions[:, :, :slots] = (first + place).flatten()
        b.anchors.keys.random_(-127, 128)
        b.anchors.values.random_(-127, 128)
        for scale in (b.anchors.key_scale, b.anchors.value_scale):
            if scale is not None:
                scale.fill_(0.01)
        storage._mark(b.anchors.positions)
    b.statistic[:, :, : context - coded].uniform_()
    storage.query_moment.fill_(1.0)
    storage.set_counts(Counts(coded, context - coded, slots))


def static_cache(
    model, codebook: AnTKVCodebook, batch: int, context: int, room: int, compileable: bool = False
) -> AnTKVCache:
    """A cache with `max_length` for `room` tokens more than the random `context` that it holds."""
    cache = AnTKVCache(model.config, codebook=codebook, max_length=context + room, compileable=compileable)
    for layer in cache.quantized_layers:
        fill_layer(layer, *random_keys(model, batch, 0), context)
    cache._guard.remember(torch.full((batch, context), PROMPT))  # so that steps note their tokens, as in use
    return cache


def rewind_grown(cache: AnTKVCache, tokens: int) -> None:
    """As it was filled: buffers of a storage that grows are never changed."""
    for layer in cache.quantized_layers:
        layer.storage = copy.copy(layer.filled)


def rewind_static(cache: AnTKVCache, tokens: int) -> None:
    """As many tokens fewer; what they left in the buffers stays there, as synthetic as before."""
    for layer in cache.quantized_layers:
        s = layer.storage
        context, chunk = s.length - tokens, s.config.chunk
        coded = max((context - s.config.window) // chunk * chunk, 0)
        s.buffers.statistic[:, :, context - coded :] = 0
        s.set_counts(Counts(coded, context - coded, coded // chunk * s.slots_per_chunk))


# ------------------------------------------------------------------------------------------- the baseline in bfloat16
class RingLayer(CacheLayerMixin):
    """`context` keys and values of a layer; a new token takes the place of an old one, so lengths never change."""

    is_compileable = is_croppable = is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.place = torch.zeros(1, dtype=torch.int64, device=keys.device)

    def lazy_initialization(self, key_states, value_states) -> None: ...

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1


class RingCache(Cache):
    def __init__(self, model, batch: int, context: int):
        n = model.config.num_hidden_layers
        super().__init__(layers=[RingLayer(*random_keys(model, batch, context)) for _ in range(n)])


def _ring_attention(library, module, query, key, value, attention_mask, scaling=None, **kwargs):
    with sdpa_kernel(FLASH[library] if library else SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _faster_library(model) -> str:
    text = model.config
    keys, values = random_keys(model, 1, 32768)
    query = torch.randn(1, text.num_attention_heads, 1, text.head_dim, dtype=model.dtype, device=model.device)
    competitors = {
        name: [lambda name=name: _ring_attention(name, None, query, keys, values, None)] for name in FLASH
    }  # fmt: skip
    times = time_side_by_side(competitors, rounds=3)
    return min(times, key=lambda name: times[name].median)


class _Uncaptured:
    """What `CudaGraph` does, where there is no GPU: the function is called every time."""

    def warm_up(self, function):
        return function()

    def capture(self, function) -> None:
        self.replay = function


class _RingModel:
    """As `antkv_hf.graphs.GraphedModel`, for a cache whose lengths stay: one graph, captured at the third step."""

    def __init__(self, model, options: dict[str, Any] | None):
        on_gpu = model.device.type == "cuda"
        self._graph = CudaGraph(torch.cuda.graph_pool_handle()) if on_gpu else _Uncaptured()
        self._model, self._calls = model, 0
        self._mlps = None if options is None else CompiledMLPs(model, options)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, input_ids, position_ids, past_key_values, **inputs):
        self._calls += 1
        if self._calls == 1:
            self._ids, self._positions = input_ids.clone(), position_ids.clone()
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)

        def forward():
            with nullcontext() if self._mlps is None else self._mlps.exchanged():
                return self._model(input_ids=self._ids, position_ids=self._positions, past_key_values=past_key_values,
                                   use_cache=True, logits_to_keep=1).logits  # fmt: skip

        if self._calls == 1:
            logits = self._graph.warm_up(forward)
        else:
            if self._calls == 2:
                if self._mlps is not None:
                    self._mlps.prepare()
                self._graph.capture(forward)
            logits = self._graph.replay()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _ring_generate(options, model, input_ids, **kwargs):
    return type(model)._sample(_RingModel(model, options), input_ids, **kwargs)
