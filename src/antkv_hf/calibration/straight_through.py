"""A model that attends over quantized keys and values, with gradients: attention implementation "antkv_finetuning".

Each key and value is x^ = decode(encode(x)) as a cache gives it back, anchors and sinks included. Gradients pass to the
centroids that were chosen, and straight through to x (arXiv 1308.3432), so that earlier layers hear of later errors.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..cache.cache import AnTKVCache
from ..cache.layer import AnTKVLayer
from ..codebook import AnTKVCodebook
from ..codecs import LayerCodec, VectorQuantizer, VQTables
from ..reference.attention import Visibility, grouped
from ..reference.code_bias import code_bias, with_bias_channel
from .exact_choice import exact_mask
from .intercept import calibration_attention_forward, dense_attention

NAME = "antkv_finetuning"
ROWS = 1024  # queries answered at a time: keys that come after them are left out
PACE = 4  # log of a factor on noise for a parameter that moves by 1, the distance of neighbouring centroids


class TrainedQuantizer:
    """A `VectorQuantizer` whose centroids are a parameter, and so are the sizes of its noise, one a sub-vector.

    They are trained in the space in which they are chosen, for keys that of the metric root, in units of the distance
    between neighbours in their table, about rms * 2**(1 - bits) of a stage with so many bits an element: there a step
    costs about the same in every table, so one learning rate serves all rates. The means
    are not trained: moving them is moving all centroids of a table. Noise keeps its form; its sizes are trained because
    what was measured is the error of a key, of which the second cumulant of a softmax's sum is only the first term.

    Args:
        quantizer: the codec to start from; it is not changed.
    """

    def __init__(self, quantizer: VectorQuantizer):
        self._quantizer, root = quantizer, quantizer.metric_root
        start = quantizer.encode_centroids  # (kv_heads * groups, stages, K, sub_dim)
        spread = 2 ** (1 - quantizer.spec.code_bits / quantizer.spec.sub_dim)
        self._scale = spread * start.square().mean((2, 3), keepdim=True).sqrt()
        self._scale.clamp_min_(torch.finfo(start.dtype).tiny)
        self._to_plain = None if root is None else torch.linalg.inv(root.double()).mT.to(root.dtype)
        self.parameter = (start / self._scale).requires_grad_()
        self.loudness = None if quantizer.noise is None else quantizer.noise.new_zeros(quantizer.noise.shape[:2])
        if self.loudness is not None:
            self.loudness.requires_grad_()

    def noise(self) -> torch.Tensor | None:
        """Noise as it stands, with gradients; None for tables without."""
        measured = self._quantizer.noise
        if measured is None or self.loudness is None:
            return None
        return measured * (PACE * self.loudness).exp()[..., None, None]

    def live(self) -> VectorQuantizer:
        """The codec as it stands; what it decodes has gradients by the parameter."""
        live = copy.copy(self._quantizer)
        trained = self.parameter * self._scale
        live.encode_centroids = trained.detach()
        live.centroids = trained
        if self._to_plain is not None:
            live.centroids = (trained.flatten(1, 2) @ self._to_plain).view_as(trained)
        return live

    def code_bias(self, query: torch.Tensor, scale: float) -> torch.Tensor | None:
        """What logits of coded tokens get, as `LayerCodec.code_bias` has it, with gradients."""
        noise, permutation = self.noise(), self._quantizer.permutation
        return None if noise is None or permutation is None else code_bias(query, noise, permutation, scale)

    @torch.no_grad()
    def stored(self, tables: VQTables) -> VQTables:
        """`tables` with the trained centroids, in the same shape and dtype."""
        centroids = self.live().centroids.view(tables.centroids.shape).to(tables.centroids)
        noise = self.noise()
        noise = None if noise is None else noise.to(tables.noise)
        return replace(tables, centroids=centroids.contiguous(), noise=noise)


class Student:
    """The layers that a cache would quantize, with tables in training.

    Args:
        model, codebook: as for `AnTKVCache`; raises ValueError if they do not fit each other.
    """

    def __init__(self, model: PreTrainedModel, codebook: AnTKVCodebook):
        cache = AnTKVCache(model.config, codebook=codebook)
        self.codebook, self.config, self.window = codebook, cache.antkv_config, 0
        self._plans = {i: layer.plan for i, layer in enumerate(cache.layers) if isinstance(layer, AnTKVLayer)}
        self._layers: dict[int, tuple[LayerCodec, TrainedQuantizer, TrainedQuantizer]] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._plans

    @contextmanager
    def active(self, window: int) -> Iterator[None]:
        """Inside, the model's attention is the student's; the last `window` keys of a query are exact (0: none)."""
        self.window = window
        token = _STUDENT.set(self)
        try:
            yield
        finally:
            _STUDENT.reset(token)

    def prepare(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        """Places the tables where their layers compute, by a forward pass over a few tokens `ids` ``(1, n)``.

        Raises:
            ValueError: a layer whose attention does not go through transformers' AttentionInterface.
        """
        with torch.no_grad(), self.active(self.config.window):
            model(input_ids=ids.to(model.device), use_cache=False)
        if missing := sorted(set(self._plans) - set(self._layers)):
            raise ValueError(
                f"the attention of layer {missing[0]} of {type(model).__name__} was not seen: it does not go through "
                "transformers' AttentionInterface, so its tables cannot be trained (add it to skip_layers?)"
            )

    def parameters(self) -> dict[str, torch.Tensor]:
        """Trained tensors ``layers.<i>.<key|value|noise>``; complete after `prepare`."""
        found: dict[str, torch.Tensor] = {}
        for layer, (_, key, value) in sorted(self._layers.items()):
            found |= {f"layers.{layer}.key": key.parameter, f"layers.{layer}.value": value.parameter}
            if key.loudness is not None:
                found[f"layers.{layer}.noise"] = key.loudness
        return found

    def tables(self) -> dict[int, tuple[VQTables, VQTables]]:
        """Tables of all layers as they stand, in the form in which the codebook holds them."""
        tables = dict(self.codebook.tables)
        for layer, (_, key, value) in self._layers.items():
            tables[layer] = (key.stored(tables[layer][0]), value.stored(tables[layer][1]))
        return tables

    def attend(self, layer: int, query, keys, values, scale: float, softcap=None, sink_logit=None) -> torch.Tensor:
        """Causal attention: query ``(batch, q_heads, n, dim)`` -> ``(batch, q_heads, n, value_dim)``."""
        if layer not in self._layers:
            plan = self._plans[layer]
            codec = plan.codec(keys.device, keys.shape[1], keys.shape[3], values.shape[3])
            # The tables that come with each layer decide how it is coded.
            assert isinstance(codec.key, VectorQuantizer) and isinstance(codec.value, VectorQuantizer)
            self._layers[layer] = (codec, TrainedQuantizer(codec.key), TrainedQuantizer(codec.value))
        codec, key, value = self._layers[layer]
        with torch.autocast(query.device.type, enabled=False):
            read_keys, read_values, coded = self._read(
                codec, key.live(), value.live(), query, keys, values, scale, softcap, sink_logit
            )

        def answer(query, keys, values, read_keys, read_values):
            bias = key.code_bias(grouped(query, keys.shape[1]), scale)
            bias = None if bias is None else bias.flatten(1, 2)
            return windowed_attention(
                query, keys, values, read_keys, read_values, self.window, scale, softcap, sink_logit, bias, coded
            )

        # What it expands is made again in the backward pass, not held by every layer at once.
        return checkpoint(
            answer, query, keys, values, read_keys, read_values, use_reentrant=False, preserve_rng_state=False
        )

    def _read(
        self, codec: LayerCodec, key: VectorQuantizer, value: VectorQuantizer, query, keys, values, scale: float,
        softcap, sink_logit,
    ):  # fmt: skip
        """Keys and values as a cache gives them back, those that stay exact as they are, and which are coded."""
        positions = torch.arange(keys.shape[2], device=keys.device).unsqueeze(0)
        with torch.no_grad():
            plain = codec.plain_keys(keys, positions).float()
            key_codes, value_codes = key.encode(plain), value.encode(values.float())
        read_keys, read_values = key.decode(key_codes), value.decode(value_codes)
        with torch.no_grad():
            scaling = 1.0 if codec.rotary is None else codec.rotary.scaling
            errors = ((read_keys - plain) * scaling).square().sum(-1), (read_values - values).square().sum(-1)
            exact = exact_mask(
                self.config, self.window, query, keys, values, errors, scale, softcap, sink_logit
            ).unsqueeze(-1)  # fmt: skip
        read_keys = codec.rotated_keys(read_keys, positions)
        return (
            torch.where(exact, keys, straight_through(keys, read_keys)),
            torch.where(exact, values, straight_through(values, read_values)),
            ~exact.squeeze(-1),
        )


def straight_through(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized` in the dtype of `x`, with the gradient of the identity by `x` besides its own."""
    return quantized.to(x.dtype) + (x - x.detach())


@functools.lru_cache(maxsize=8)  # of all layers the same few
def _visible(start: int, stop: int, window: int, device: torch.device) -> torch.Tensor:
    """Mask of queries ``start..stop-1`` over the old keys ``0..stop-window-1``, then recent ones up to ``stop-1``."""
    row = torch.arange(start, stop, device=device).unsqueeze(1)
    old = torch.arange(max(stop - window, 0), device=device)
    recent = torch.arange(max(start - window + 1, 0), stop, device=device)
    return torch.cat([old <= row - window, (recent <= row) & (recent > row - window)], 1)


def windowed_attention(
    query, keys, values, read_keys, read_values, window: int, scale: float, softcap=None, sink_logit=None, bias=None,
    coded=None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention with exact keys for ``i - j < window`` and read-back ones for older tokens, with gradients.

    Args:
        bias, coded: what the logits of coded tokens get, as `evaluation.protocols.Read` has it.

    Returns:
        ``(batch, q_heads, n, value_dim)`` in the dtype of the query; by PyTorch's fused kernels where they can answer.
    """
    n, group = query.shape[2], query.shape[1] // keys.shape[1]
    width, capped = values.shape[-1], softcap is not None or sink_logit is not None
    if bias is not None and not capped:  # as one more channel; fused kernels take widths of a multiple of 8
        query, read_keys = with_bias_channel(query, read_keys, bias, coded, scale)
        fill = -query.shape[-1] % 8
        query, keys, read_keys = pad(query, (0, fill)), pad(keys, (0, 1 + fill)), pad(read_keys, (0, fill))
        values, read_values = (pad(x, (0, query.shape[-1] - width)) for x in (values, read_values))

    def attend(rows: slice, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, old: int) -> torch.Tensor:
        q = query[:, :, rows]
        if capped:
            mask = None if mask is None else mask[None, None]
            if bias is not None:  # after the cap, so with the mask; recent keys come after `old` ones and get none
                gets = pad(coded[:, :, :old], (0, k.shape[2] - old)).repeat_interleave(group, 1).unsqueeze(2)
                seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril_() if mask is None else mask
                mask = (bias[:, :, rows].unsqueeze(-1) * gets).masked_fill(~seen, float("-inf"))
            visible = Visibility(mask, mask is None, q.shape[2], k.shape[2])
            return dense_attention(q, k, v, visible, scale, softcap, sink_logit)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)[..., :width]

    if not window:
        return attend(slice(None), read_keys, read_values, None, n)
    parts = []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        old, recent = slice(0, max(stop - window, 0)), slice(max(start - window + 1, 0), stop)
        k = torch.cat([read_keys[:, :, old], keys[:, :, recent]], 2)
        v = torch.cat([read_values[:, :, old], values[:, :, recent]], 2)
        parts.append(attend(slice(start, stop), k, v, _visible(start, stop, window, query.device), old.stop))
    return torch.cat(parts, 2)


_STUDENT: ContextVar[Student | None] = ContextVar("antkv_student", default=None)


def finetuning_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: the student's where it is active, else exact. For texts without padding."""
    student, layer = _STUDENT.get(), getattr(module, "layer_idx", None)
    if student is None or layer is None or layer not in student:
        return calibration_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, s_aux=s_aux, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = student.attend(layer, query, key, value, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, finetuning_attention_forward)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
