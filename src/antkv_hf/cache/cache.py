"""`AnTKVCache`: what ``model.generate(..., past_key_values=cache)`` meets."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..attention.backends import select_backend
from ..codebook import AnTKVCodebook, describe_model
from ..config import AnTKVConfig, VQSpec, check_config
from ..specs import whole_number
from ..static_storage import StaticStorage, size_obstacle
from ..tensor_parallel import check_heads, tp_size
from . import budget, interface, persistence
from .build import cache_layers, check_arguments, check_model
from .footprint import MemoryFootprint, measure
from .layer import AnTKVLayer, check_crop, checked_rows, drop_states
from .prompt_guard import GenerateCall, PromptGuard, check_generate, check_room, forward_input_ids, marking_call


class AnTKVCache(Cache):
    """A KV cache that keeps codes, a few exact anchor tokens and an exact recent window (AnTKV, arXiv 2506.19505).

    Works with any loaded model as ``model.generate(**inputs, past_key_values=cache)``; nothing is patched. Only
    full-attention layers are quantized; sliding, chunked and linear ones stay as transformers keeps them.

    Args:
        model_config: the model's config.
        config: what to keep; the codebook's own by default. Its codec specs must be the codebook's.
        codebook: tables of this model; not needed for ``AnTKVConfig.preset("ott-2bit")``, ``"ott-4bit"`` and
            ``"identity"``.
        max_length: tokens of a sequence that memory is set aside for at once (prompt and new ones): nothing grows then,
            lengths are on the device too, and `antkv_generate` can run decode steps as CUDA graphs. None: the cache
            grows as it must. The batch keeps its size. Not with scalar codes or ``anchors.max_tokens``.
        compileable: a plain `generate` on a GPU then compiles decode steps, as it does for transformers' StaticCache:
            in the ``"antkv"`` lane, with `max_length`, where every layer is quantized; for large batches
            (``benchmarks/RESULTS.md``). `antkv_generate` needs no compiler.
        on_new_prompt: what to do when `generate` is called with a prompt that the cache does not hold: ``"error"``
            (default) or ``"reset"`` (start afresh; convenient in pipelines and chats). All its tokens are
            compared; at least one must be new.

        device_mesh: the model's, where tensor parallelism shares its kv heads among some of the processes only;
            without it, among all of them. Tables and codes of a process are those of its heads.

    Raises:
        ValueError: codebook of another model, specs that differ, MLA, offloading, no layer to quantize; the message
            names the numbers and the way out. TypeError: an argument of another kind; it says how to make one.

    Example:
        >>> cache = AnTKVCache.from_pretrained("codebooks/smollm2-135m-instruct-1bit")
        >>> model.generate(**inputs, past_key_values=cache)
        >>> print(cache.memory_footprint())
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: AnTKVConfig | None = None,
        codebook: AnTKVCodebook | None = None,
        *,
        max_length: int | None = None,
        compileable: bool = False,
        on_new_prompt: str = "error",
        device_mesh: Any = None,
        offloading: bool = False,
    ):
        if offloading:
            raise ValueError(
                "AnTKVCache cannot be offloaded (offloading=True): transformers would move it before attention has "
                "read it. Leave offloading out; the cache is already small."
            )
        if on_new_prompt not in ("error", "reset"):
            raise ValueError(f"on_new_prompt={on_new_prompt!r} must be 'error' or 'reset'")
        check_arguments(model_config, config, codebook)
        if max_length is not None and whole_number("max_length", max_length, 4096) < 1:
            raise ValueError(f"max_length={max_length} must be at least 1 token, or None for a cache that grows")
        if compileable and max_length is None:
            raise ValueError("compileable=True needs max_length: compiled code reads buffers that stay where they are")
        config = config or (codebook.config if codebook is not None else None)
        if config is None:
            raise ValueError(
                "give a codebook (AnTKVCache.from_pretrained(...), antkv_generate(repo)) or a config, or a cache as "
                "past_key_values: there is nothing to go by"
            )
        if max_length is not None and (why := size_obstacle(config)):
            raise ValueError(f"max_length={max_length} cannot be kept: {why}. Leave max_length out")
        text = model_config.get_text_config(decoder=True)
        self.tp_size = tp_size(model_config, device_mesh)
        if self.tp_size > 1:
            check_heads(text, describe_model(text)["kv_heads"], self.tp_size)
        layers = cache_layers(model_config, text, config, codebook, max_length, device_mesh, compileable)
        self.antkv_config, self.codebook, self.on_new_prompt = config, codebook, on_new_prompt
        self.max_length = max_length
        self._text_config = text  # what `save` tells of the model
        self._encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))
        self._guard = PromptGuard()
        self._told_of_room = False
        super().__init__(layers=layers)
        self._first = self.quantized_layers[0]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        model: PreTrainedModel | None = None,
        config: AnTKVConfig | None = None,
        *,
        max_length: int | None = None,
        compileable: bool = False,
        on_new_prompt: str = "error",
        **changes: Any,
    ) -> AnTKVCache:
        """A fresh cache on the codebook of a Hub repo or local folder.

        Args:
            model: switches the fast lane on (``model.set_attn_implementation("antkv")``) and checks that the codebook
                fits; without it the model is described by the codebook.
            config: replaces the codebook's defaults.
            max_length, compileable: as in `AnTKVCache`.
            changes: fields of the config to change, e.g. ``window=64, anchor_fraction=0.01``; or arguments of
                `AnTKVCodebook.from_pretrained` (revision, token, cache_dir, local_files_only, force_download).
        """
        check_config(config)
        check_model(model)
        hub = {k: changes.pop(k) for k in AnTKVCodebook.HUB_ARGUMENTS if k in changes}
        codebook = AnTKVCodebook.from_pretrained(name_or_path, **hub)
        config = (config or codebook.config).replace(**changes)
        model_config = codebook.model_config() if model is None else model.config
        mesh = getattr(model, "_device_mesh", None)
        cache = cls(
            model_config, config, codebook, max_length=max_length, compileable=compileable,
            on_new_prompt=on_new_prompt, device_mesh=mesh,
        )  # fmt: skip
        if model is not None:
            model.set_attn_implementation(interface.NAME)
        return cache

    @classmethod
    def fit(
        cls, model: PreTrainedModel, tokens: int, bytes: int | str, batch: int = 1,
        among: Iterable[str | Path | AnTKVConfig] | None = None, *, on_new_prompt: str = "error",
    ) -> AnTKVCache:  # fmt: skip
        """A fresh cache of the most bits with which `batch` times `tokens` fit into `bytes` (``"2GB"``, ``"1.5GiB"``).

        Args:
            among: codebooks (folder, Hub id, shipped name), or presets and configs that need none; by default the
                shipped codebooks of this model and ``"ott-4bit"``, ``"ott-2bit"``. on_new_prompt: as in `AnTKVCache`.

        Raises:
            ValueError: none fits: the message names the bytes that are missing, and the tokens that would fit; a
                codebook of another model, or a preset or config that needs one. The model is left as it was.
        """
        check_model(model, "for a config there is AnTKVConfig.fit(model.config, ...)", optional=False)
        found = budget.choices(model.config, tokens, None, batch, among, model.dtype)
        for choice in found:
            if isinstance(choice.config.key, VQSpec) and choice.codebook is None:
                raise ValueError(
                    f"{choice.name} needs a codebook: name one (folder, Hub id), or ask AnTKVConfig.fit for its config"
                )
        best = budget.best_of(found, model.config, tokens, bytes, batch, model.dtype)
        mesh = getattr(model, "_device_mesh", None)
        cache = cls(model.config, best.config, best.codebook, on_new_prompt=on_new_prompt, device_mesh=mesh)
        model.set_attn_implementation(interface.NAME)
        return cache

    def fork(self) -> AnTKVCache:
        """A second cache that goes on from here on its own: one long document, many questions.

        Buffers of quantized layers are shared, not copied, until one of the two replaces its own: the exact tail with
        its next token, codes when the next chunk is coded. Layers that are not quantized are copied.
        So are all buffers of a cache with `max_length`. ``copy.deepcopy(cache)`` is the same.

        Example:
            >>> model(**document, past_key_values=cache)  # read once
            >>> for question in questions:
            ...     model.generate(**document_and(question), past_key_values=cache.fork())
        """
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict) -> AnTKVCache:
        clone = memo[id(self)] = object.__new__(type(self))
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an AnTKVCache is not pickled, nor copied without its layers: cache.save(path) and "
            "AnTKVCache.load(path, model), or cache.fork()"
        )

    def save(self, path: str | Path) -> None:
        """Writes the cache to one file, to go on from there in another process: see `load`.

        The file (safetensors, with JSON in its metadata) appears by one rename once it is complete on the disk: a kill
        in the middle leaves the old file, or none. It holds codes, anchors, window, scores, token ids and config with a
        hash over all of it; of the codebook only its hash and where it was loaded from, of the model only its sizes.
        An empty cache is saved as one; with assisted decoding, tokens that are not coded yet are saved exact, and the
        loaded cache goes on recording its past.

        Raises:
            ValueError: a layer holds state that cannot be saved (linear attention of some hybrids), or this process
                holds a share of the heads only (tensor parallelism). Nothing is written.
            OSError: no such folder, no space, no permission.
        """
        persistence.save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel | None = None,
        codebook: AnTKVCodebook | str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> AnTKVCache:
        """The cache that `save` wrote: the next tokens are those that it would have given.

        A cache made with `max_length` comes back as one that grows.

        Args:
            model: the model that will go on, checked to have the sizes of the one that filled the cache (its weights
                are not; another dtype is warned of, as autocast may explain it); the fast lane is switched on as in
                `from_pretrained`. Layers go where the model computes them.
            codebook: the codebook that the cache was made with, or where it is now; by default it is loaded from where
                it came from then.
            device: where all layers go instead (without a model: the CPU). Buffers keep their dtype.

        Raises:
            FileNotFoundError: the file or its codebook is not there.
            ValueError: damaged or changed file, unknown format_version, another codebook or model, a device that is
                not there, or a model whose heads are shared by tensor-parallel processes.
        """
        check_model(model, "a codebook is given as AnTKVCache.load(path, model, codebook=...)")
        return persistence.load_cache(cls, path, model, codebook, device)

    @property
    def quantized_layers(self) -> list[AnTKVLayer]:
        return [layer for layer in self.layers if isinstance(layer, AnTKVLayer)]

    @property
    def backend(self) -> str:
        """Backend in use in the first quantized layer; before the first update, the one that a CPU would get."""
        if self._first.storage is not None:
            return self._first.storage.backend.name
        return select_backend(self.antkv_config.backend, torch.device("cpu"))

    @property
    def backends(self) -> dict[int, str]:
        """Backend of each quantized layer that has been filled, by layer: where specs differ, kernels may."""
        filled = {layer.plan.layer_idx: layer.storage for layer in self.quantized_layers}
        return {index: storage.backend.name for index, storage in filled.items() if storage is not None}

    def memory_footprint(self) -> MemoryFootprint:
        """Bytes that the cache takes and bits per element; see `MemoryFootprint`.

        Every buffer of keys and values is counted; not the ids of the tokens that were read, 8 bytes each on the CPU.
        Under tensor parallelism: those of this process, which holds its share of the heads.
        """
        return measure(self.layers, self._first)

    def __repr__(self) -> str:
        config, quantized = self.antkv_config, len(self.quantized_layers)
        specs = "specs by layer" if config.layer_specs else f"{config.key}/{config.value}" if config.key else "exact"
        return (
            f"AnTKVCache({specs}, {quantized} of {len(self.layers)} layers quantized, {self.get_seq_length()} tokens, "
            f"max_length={self.max_length})"
        )

    def anchor_count(self) -> int:
        """Anchor and sink tokens kept, over all sequences, layers and kv heads."""
        stored = [layer.storage for layer in self.quantized_layers if layer.storage is not None]
        exact = [tokens for s in stored for tokens in (s.anchors, s.sinks) if tokens is not None]
        return sum(int((tokens.positions >= 0).sum()) for tokens in exact)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        first = self._first.plan.layer_idx
        if not 0 <= layer_idx < len(self.layers):
            self._refuse_layer(layer_idx, key_states.shape[2])
        if key_states.is_floating_point() and value_states.is_floating_point():
            # under autocast RoPE gives float32 keys beside 16-bit values: codes, anchors and files have one dtype
            value_states = value_states.to(key_states.dtype)
        if layer_idx < first:  # it would take what the first quantized one refuses
            self._first.check_beside(key_states, value_states, _held(self.layers[layer_idx]))
        if layer_idx != first or (torch.compiler.is_compiling() and self.is_compileable):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if (stopped := self._interrupted()) is not None:
            raise ValueError(f"this AnTKVCache cannot go on: {stopped}. Call cache.reset() and read the text again")
        start = self._first.get_seq_length()
        if self.max_length is not None:
            self._check_slots(key_states.shape[2])
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if getattr(self._first.storage, "planned", None) is None:  # a captured step's ids are a graph's buffer
            self.note_tokens(forward_input_ids(key_states.shape[0], key_states.shape[2]), start)
        return out

    def _interrupted(self) -> str | None:
        """Says so if layers hold different numbers of tokens: a forward stopped midway (Ctrl-C, no memory)."""
        held = [layer.get_seq_length() for layer in self.quantized_layers]
        if getattr(self._text_config, "num_kv_shared_layers", 0):  # layers that read another's keys stay empty
            held = [tokens for tokens in held if tokens] or [0]
        if min(held) == max(held):
            return None
        return (
            f"its layers hold {min(held)} to {max(held)} tokens, since a forward stopped between them, or the model "
            f"has fewer than its {len(self.layers)} layers"
        )

    def _check_slots(self, new_tokens: int) -> None:
        """Raises ValueError, before the first layer changes, if one has no slot: crops leave them different numbers."""
        for layer in self.quantized_layers:
            if isinstance(layer.storage, StaticStorage) and not layer.record_past:  # recorded ones are encoded by crop
                layer.storage.check_slots(new_tokens)

    def note_tokens(self, input_ids: torch.Tensor | None, start: int) -> None:
        """Notes the ids ``(batch, n)`` (None: not known) of what the cache took after its first `start` tokens."""
        self._guard.read(input_ids, start)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        # asked before any layer runs: the model's own code would trip over no token at all
        self._first.require_room(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> torch.Tensor:
        """Of linear attention layers in hybrids."""
        if layer_idx < self._first.plan.layer_idx:
            self._first.check_batch(conv_states)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def _refuse_layer(self, layer_idx: int, tokens: int) -> NoReturn:
        """Raises ValueError for a layer that is not there, after layers that are may have taken the same `tokens`."""
        held = self.get_seq_length()
        raise ValueError(
            f"layer_idx {layer_idx} is beyond the {len(self.layers)} layers of this cache: it was made for another "
            "model; make one with AnTKVCache(model.config, ...)"
            + (f". Of the {held} tokens of this one, {tokens} may be that model's: call cache.reset()" if held else "")
        )

    def reset(self) -> None:
        """Forgets everything; the cache can then take another prompt."""
        self._guard.forget()
        self._told_of_room = False
        self.__dict__.pop("_graphed", None)  # `graphs.graphed`: they hold the old buffers
        for layer in self.layers:
            drop_states(layer)
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens, coded ones included."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) must not be positive: give minus the number of tokens to remove from the end"
            )
        for index, layer in enumerate(self.layers):
            check_crop(index, layer)
        super().crop(tokens_to_remove)
        self._guard.crop(self._first.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search."""
        picked = checked_rows("reorder_cache", beam_idx, self._first.batch_size)
        super().reorder_cache(beam_idx)
        self._guard.map_batch(lambda ids: ids.index_select(0, picked))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if whole_number("repeats", repeats, 2) < 1:
            raise ValueError(f"repeats={repeats} must be at least 1; to forget everything call cache.reset()")
        self._check_new_batch(self._first.batch_size * repeats)
        super().batch_repeat_interleave(repeats)
        self._guard.map_batch(lambda ids: ids.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        picked = checked_rows("batch_select_indices", indices, self._first.batch_size)
        self._check_new_batch(int(picked.sum()) if picked.dtype == torch.bool else picked.numel())
        super().batch_select_indices(indices)
        self._guard.map_batch(lambda ids: ids[picked, ...])

    def _check_new_batch(self, sequences: int) -> None:
        """Raises ValueError, before a layer that is not quantized changes, if the cache must keep its batch."""
        if isinstance(self._first.storage, StaticStorage):
            self._first.storage.check_batch(sequences)

    def activate_past_recording(self) -> None:
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    @property
    def _is_user_defined(self) -> bool:
        return self.__dict__.get("_user_defined", False)

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """`generate` sets this at its start: the moment to notice a prompt that the cache does not hold."""
        call, why, held = GenerateCall(), None, self.get_seq_length()
        if value:
            call = marking_call()
            check_generate(getattr(call.config, "use_cache", None), held, self._encoder_decoder)
            why = self._interrupted() or self._guard.mismatch(call, held)
        if why is not None and self.on_new_prompt == "error":
            raise ValueError(
                f"this AnTKVCache cannot continue the prompt: {why}. Call cache.reset() first, make a new cache, or "
                'build it with on_new_prompt="reset".'
            )
        if call.ids is not None and (longest := getattr(call.config, "max_length", None)) is not None:
            before = call.left_out(held)
            prompt = before + call.ids.shape[1]
            self._told_of_room |= check_room(self.max_length, prompt, before + longest, self._told_of_room)
        if why is not None:
            self.reset()
        self.__dict__["_user_defined"] = value
        for layer in self.quantized_layers:  # assisted decoding switches it on again; others never call crop
            layer.record_past = False


def _held(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of a layer that transformers keeps; None for an empty one."""
    filled = getattr(layer, "is_initialized", False) and layer.get_seq_length()
    return (layer.keys, layer.values) if filled else None
