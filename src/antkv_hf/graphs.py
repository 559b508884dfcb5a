"""Decode steps as CUDA graphs: the model's forward for one token is captured once and replayed from then on.

An eager step of a large model keeps the host busy for longer than the GPU. A replayed one costs the host a few calls,
whatever the model: token and position are copied into fixed buffers, lengths are on the device (`StaticStorage`), and
logits come out of a fixed buffer. transformers' own loop does everything else.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention.beside import Branch, branching
from .cache.cache import AnTKVCache
from .compiled_mlps import CompiledMLPs, CompileError
from .static_storage import Counts, StaticStorage, size_obstacle

LANES = ("sdpa", "antkv")  # attention implementations that leave the cache's handles as they are
FIRST_BUCKET, GROWTH = 4096, 4  # coded tokens that a graph is planned for: the smallest plan, and from one to the next
_STEP_INPUTS = ("input_ids", "position_ids", "attention_mask", "past_key_values")


class CaptureError(RuntimeError):
    """A function could not be captured; nothing on the device has changed."""


class Graph(Protocol):
    """What runs a function of fixed buffers again and again; `CudaGraph` on a GPU.

    `runs_python`: whether a replay calls the function, so that it may look at lengths on the host.
    """

    runs_python: bool

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Runs `function` as it will be captured, and returns what it returns."""
        ...

    def capture(self, function: Callable[[], Any]) -> None:
        """Remembers what `function` does to its buffers; nothing happens to them yet. Any error leaves them alone."""
        ...

    def replay(self) -> Any:
        """Does it, and returns what `function` returned, with what it holds now."""
        ...


class CudaGraph:
    """A CUDA graph; those of one `pool` share their workspace, so only the latest replay's output is valid.

    Args:
        pool: from ``torch.cuda.graph_pool_handle()``.
    """

    runs_python = False

    def __init__(self, pool) -> None:
        self._pool, self._graph, self._output = pool, torch.cuda.CUDAGraph(), None

    def warm_up(self, function: Callable[[], Any]) -> Any:
        stream = torch.cuda.Stream()  # as in capture: libraries set up what they need for a stream of its own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = function()
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def capture(self, function: Callable[[], Any]) -> None:
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"), branching(Branch()):
            self._output = function()

    def replay(self) -> Any:
        self._graph.replay()
        return self._output


def cuda_graphs() -> Callable[[], Graph]:
    """Makes CUDA graphs that share one pool of memory: of one generation, replayed one after the other."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


class _Replayed:
    """A function of fixed buffers: run as it is the first time, captured the second, replayed from then on."""

    def __init__(self, function: Callable[[], Any], make_graph: Callable[[], Graph]):
        self._function, self._make_graph, self._graph = function, make_graph, make_graph()
        self.is_warm = self.is_captured = False

    def __call__(self) -> Any:
        if not self.is_warm:
            output = self._graph.warm_up(self._function)
            self.is_warm = True
            return output
        if not self.is_captured:
            self._capture()
        return self._graph.replay()

    def _capture(self) -> None:
        try:
            self._graph.capture(self._function)
        except BaseException as error:  # Ctrl-C too: it takes seconds, and half a graph cannot be captured again
            self._graph = self._make_graph()
            if isinstance(error, Exception):
                raise CaptureError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
            raise
        self.is_captured = True


def obstacle(model, cache: AnTKVCache, attention_mask: torch.Tensor | None = None) -> str | None:
    """Why decode steps of `model` on `cache` cannot be replayed; None if nothing is known to be in the way.

    Args:
        attention_mask: the prompt's, ``(batch, n)``: padding must be on the left. Looked at on the host.
    """
    if (lasting := lasting_obstacle(model, cache)) is not None:
        return lasting
    if cache.max_length is None:
        return "the cache grows: make it with max_length"
    if cache.is_compileable:
        return "the cache is for torch.compile: make it without compileable"
    if (lane := _lane(model)) not in LANES:
        return f"attn_implementation={lane!r} is not one of {LANES}"
    if model.device.type == "cuda" and model.device.index not in (None, torch.cuda.current_device()):
        return f"the model is on {model.device}, not on the current GPU: torch.cuda.set_device({model.device.index})"
    if model.training:
        return "the model is in training mode: call model.eval()"
    if attention_mask is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        return "the attention mask hides tokens after the first one that it shows: only left padding is kept in a cache"
    return None


def lasting_obstacle(model, cache: AnTKVCache) -> str | None:
    """Of the obstacles those that another call with this model and codec would meet again."""
    if cache.max_length is None and (size := size_obstacle(cache.antkv_config)) is not None:
        return size
    if len(cache.quantized_layers) < len(cache.layers):
        return f"{len(cache.layers) - len(cache.quantized_layers)} of {len(cache.layers)} layers are not quantized"
    if len(devices := set(getattr(model, "hf_device_map", {}).values())) > 1:
        return f"the model is spread over {len(devices)} devices"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    return None


class GraphedModel:
    """A model whose forward of one token a sequence is replayed; stands in for it in transformers' decoding loop.

    Everything else (prompts, attributes, helpers of ``generate``) is the model's own.

    Args:
        cache: static, with no `obstacle`; steps on another cache are the model's own.
        make_graph: makes a graph, see `cuda_graphs`.
        strict: raise if a step cannot be captured, instead of going on without graphs after a warning.
        compile_options: of the MLPs, see `compiled_mlps`; None leaves them as they are.
    """

    def __init__(
        self, model, cache: AnTKVCache, make_graph: Callable[[], Graph], strict: bool = False,
        compile_options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        # The cache keeps this object, which therefore must not keep the cache: its memory would wait for the collector.
        self._model, self._cache, self._make_graph, self._strict = model, weakref.ref(cache), make_graph, strict
        self._runs_python = make_graph().runs_python
        self._usable: bool | None = None  # known at the first step
        self._compile_options, self.compile_failed = compile_options, False
        self.made_for: Any = None  # where weights are, and options: see `graphed`
        self._begin([], {}, "")

    def _begin(self, storages: list[StaticStorage], inputs: dict[str, Any], lane: str) -> None:
        """Forgets all graphs: those to come are of these storages, inputs and attention implementation."""
        self._storages, self._lane = storages, lane
        self._steps: dict[int, _Replayed] = {}
        self._encode: _Replayed | None = None
        self._mlps: CompiledMLPs | None = None  # compiled for these inputs
        self._inputs: dict[str, torch.Tensor] = {}
        for name in ("input_ids", "position_ids") if inputs else ():
            self._inputs[name] = inputs[name].to(storages[0].offset.device, copy=True)
        self._flags = _flags(inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copied cache has buffers of its own, and no graphs yet

    def __call__(self, *args, **inputs):
        cache = self._cache()
        if args or cache is None or not _takes(cache, inputs):
            return self._model(*args, **inputs)
        storages: Any = [layer.storage for layer in cache.quantized_layers]
        if self._usable is None:
            self._usable = self._runs_python or self._answered_by_kernels(storages)
            if not self._usable:
                self._give_up(f"backend {cache.backend!r} looks at lengths on the host")
        if not self._usable:
            return self._model(**inputs)
        start = cache.get_seq_length()
        try:
            cache.quantized_layers[0].require_room(1)
            logits = self._step(storages, inputs)
        except CaptureError as error:
            self._usable = False
            self._begin([], {}, "")
            self._give_up(str(error))
            return self._model(**inputs)
        cache.note_tokens(inputs["input_ids"], start)  # a replay runs no Python of the cache
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _compile_mlps(self) -> None:
        """Before the first step finds the MLPs, before the second one compiles them; warns where that cannot be."""
        if self._compile_options is None or self.compile_failed:
            return
        try:
            if self._mlps is None:
                self._mlps = CompiledMLPs(self._model, self._compile_options)
            if self._steps:
                self._mlps.prepare()
        except CompileError as error:
            self.compile_failed = True
            if self._strict:
                raise RuntimeError(f"{error}; leave compile_mlps out to go on without it") from error
            warnings.warn(f"{error}; decoding goes on without compile_mlps", stacklevel=4)

    def _give_up(self, reason: str) -> None:
        message = f"decode steps of {type(self._model).__name__} cannot be replayed as CUDA graphs: {reason}"
        if self._strict:
            raise RuntimeError(f"{message}; leave cuda_graphs out to go on without them")
        warnings.warn(f"{message}; decoding goes on without them", stacklevel=3)

    def _answered_by_kernels(self, storages: list[StaticStorage]) -> bool:
        heads = self._model.config.get_text_config(decoder=True).num_attention_heads
        for storage in storages:
            keys, score = storage.buffers.tail_keys, storage.score
            query = torch.empty(keys.shape[0], heads, 1, keys.shape[3], dtype=keys.dtype, device="meta")
            if not storage.backend.answers_step(query, keys.shape[1], None if score is None else score.term):
                return False
        return True

    def _step(self, storages: list[StaticStorage], inputs: dict[str, Any]) -> torch.Tensor:
        """Logits ``(batch, 1, vocabulary)``, valid until the next call."""
        lane = _lane(self._model)
        same = len(storages) == len(self._storages) and all(a is b for a, b in zip(storages, self._storages))
        same = same and lane == self._lane and _flags(inputs) == self._flags
        if not same or any(inputs[name].shape != buffer.shape for name, buffer in self._inputs.items()):
            self._begin(storages, inputs, lane)
        self._compile_mlps()
        if storages[0].must_encode:
            for storage in storages:
                storage.check_slots(1)
            if self._encode is None:
                self._encode = _Replayed(partial(_encode_chunks, storages), self._make_graph)
            chunk = storages[0].config.chunk
            self._run(self._encode, storages, Counts(chunk, -chunk, storages[0].slots_per_chunk))
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name])
        bucket = FIRST_BUCKET
        while bucket < storages[0].coded_length:
            bucket *= GROWTH
        if bucket not in self._steps:
            forward = partial(_forward, self._model, self._cache, self._inputs, self._flags, self._mlps)
            self._steps[bucket] = _Replayed(forward, self._make_graph)
        return self._run(self._steps[bucket], storages, Counts(tail=1), planned=bucket)

    def _run(
        self, replayed: _Replayed, storages: list[StaticStorage], change: Counts, planned: int | None = None
    ) -> Any:
        """Runs or replays, and sees to it that the host counts the `change` that the device makes.

        Each storage's own: after a crop into coded tokens layers keep different numbers of anchors.
        """
        before, is_captured = [storage.counts for storage in storages], replayed.is_captured
        captures = replayed.is_warm and not is_captured  # on the device nothing happens then
        if not is_captured and not self._runs_python:
            for storage in storages:
                storage.planned = planned
        try:
            output = replayed()
        except BaseException:
            if captures and not replayed.is_captured:
                for storage, counts in zip(storages, before):
                    storage.set_counts(counts)
            raise
        finally:
            if not is_captured:
                for storage in storages:
                    storage.planned = None
        for storage, counts in zip(storages, before):
            storage.note_counts(Counts(*map(sum, zip(counts, change))))
        return output


def _forward(
    model, cache: weakref.ref, inputs: dict[str, torch.Tensor], flags: dict[str, Any], mlps: CompiledMLPs | None
) -> torch.Tensor:
    with nullcontext() if mlps is None else mlps.exchanged():
        return model(**inputs, past_key_values=cache(), **flags, return_dict=True).logits


def graphed(
    model, cache: AnTKVCache, strict: bool = False, compile_options: dict[str, Any] | None = None
) -> GraphedModel:
    """The `GraphedModel` of a model and a cache; the cache keeps it, so that its next turn captures nothing again.

    One that was kept is dropped for another model, other weights, adapters or options.

    Args:
        strict, compile_options: as `GraphedModel`'s; `strict` also raises what a kept one only warned of.
    """
    kept = cache.__dict__.get("_graphed")
    # Graphs read weights where they were: others (an adapter, another dtype) need graphs of their own.
    weights = tuple(parameter.data_ptr() for parameter in model.parameters()), _active_adapters(model)
    made_for = weights, compile_options
    again = strict and kept is not None and kept.compile_failed  # to raise what was only warned of before
    if kept is None or kept._model is not model or kept.made_for != made_for or again:
        kept = cache.__dict__["_graphed"] = GraphedModel(model, cache, cuda_graphs(), compile_options=compile_options)
        kept.made_for = made_for
    kept._strict, kept._usable = strict, None
    return kept


def _active_adapters(model) -> Any:
    try:
        return model.active_adapters()
    except (AttributeError, ImportError, ValueError):  # none are loaded, or PEFT is not installed
        return None


def _lane(model) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def _flags(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the forward is told besides token, position and cache: the same in every step."""
    return {name: x for name, x in inputs.items() if name not in (*_STEP_INPUTS, "return_dict")}


def _encode_chunks(storages: list[StaticStorage]) -> None:
    for storage in storages:
        storage.encode_chunk()


def _takes(cache: AnTKVCache, inputs: dict[str, Any]) -> bool:
    """Whether these are the inputs of a step: one token a sequence, its position, and no other tensor."""
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if ids is None or positions is None or ids.ndim != 2 or ids.shape[1] != 1 or positions.ndim != 2:
        return False
    if inputs.get("past_key_values") is not cache or cache.get_seq_length() == 0:
        return False
    if any(isinstance(x, torch.Tensor) for name, x in inputs.items() if name not in _STEP_INPUTS):
        return False
    if any(inputs.get(name) for name in ("output_attentions", "output_hidden_states", "labels")):
        return False
    mask = inputs.get("attention_mask")
    return (mask is None or mask.ndim == 2) and all(_replays(layer) for layer in cache.quantized_layers)


def _replays(layer) -> bool:
    """Whether a layer's next token goes into its buffers without the host."""
    storage = layer.storage
    return isinstance(storage, StaticStorage) and not storage.commits_at_once and not layer.record_past
