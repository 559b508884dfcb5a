"""What the buffers of a `LayerStorage` look like: checked before a layer is restored from a file.

A hash says that a file is what was written, not that it was written for this codec; and a position beyond the codes
would read foreign memory in a kernel. So shapes, dtypes and indices are checked against the codec and config in use.
"""

from __future__ import annotations

import torch

from .codecs import ChannelQuantizer, Codec, TokenQuantizer
from .exact_tokens import sink_dtype
from .storage import LayerStorage

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Form = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def check_tail(tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless the exact tail tells batch, kv heads, sizes and dtype: by those a codec is chosen."""
    for name in ("tail_keys", "tail_values"):
        if name not in tensors:
            raise ValueError(f"{name} is missing")
    keys, values = tensors["tail_keys"], tensors["tail_values"]
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not belong together")
    if 0 in (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3]):
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: only dimension 2 can be empty")
    if keys.dtype not in MODEL_DTYPES or values.dtype != keys.dtype:
        raise ValueError(f"keys are {keys.dtype} and values {values.dtype}: both must be the same of {MODEL_DTYPES}")


def check_tensors(tensors: dict[str, torch.Tensor], storage: LayerStorage) -> None:
    """Raises ValueError, naming buffer and numbers, unless `tensors` fit the empty `storage` that they are for.

    Args:
        tensors: as `LayerStorage.tensors` gives them, past `check_tail`.
    """
    codes = tensors.get("key_codes")
    coded = codes.shape[2] if codes is not None and codes.ndim == 4 else 0
    forms = _forms(tensors, storage, coded)
    for name in sorted(set(forms) ^ set(tensors)):
        raise ValueError(f"{name} is missing" if name in forms else f"{name} is no buffer of this config and codebook")
    for name, (shape, dtype) in forms.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but must be {dtype} {shape}")
        if not name.endswith("positions") or not tensor.numel():
            continue
        low, high = int(tensor.min()), int(tensor.max())
        if low < -1 or high >= coded:
            raise ValueError(f"{name} run from {low} to {high}, but only {coded} tokens are coded")
    if "scales.starts" in tensors:
        _check_groups(tensors["scales.starts"], coded, storage)
    if int(tensors["offset"].min()) < 0:
        raise ValueError(f"offset holds {int(tensors['offset'].min())}, but padding cannot be negative")


def _forms(tensors: dict[str, torch.Tensor], storage: LayerStorage, coded: int) -> dict[str, Form]:
    """The form that every buffer must have, given the tail, the number of coded tokens and which kinds there are."""
    keys, values, anchors = tensors["tail_keys"], tensors["tail_values"], storage.config.anchors
    batch, heads, tail, key_dim = keys.shape
    value_dim = values.shape[3]
    observed = tail if storage.score is not None and storage.score.term is not None else 0
    forms: dict[str, Form] = {
        "tail_keys": ((batch, heads, tail, key_dim), keys.dtype),
        "tail_values": ((batch, heads, tail, value_dim), keys.dtype),
        "statistic": ((batch, heads, observed), torch.float32),
        "query_moment": ((batch, heads, 2), torch.float32),
        "offset": ((batch,), torch.int64),
    }
    if "key_codes" not in tensors:
        return forms
    for name, codec, like in (("key_codes", storage.codec.key, keys), ("value_codes", storage.codec.value, values)):
        width, dtype = code_form(codec, like)
        forms[name] = ((batch, heads, coded, width), dtype)
    if storage.scales is not None:
        starts = tensors.get("scales.starts", tensors["offset"])
        groups = starts.shape[0] if starts.ndim else 0
        forms["scales.starts"] = ((groups,), torch.int32)
        forms["scales.scale"] = forms["scales.zero"] = ((batch, heads, groups, key_dim), torch.float16)
        forms["scales.key_mean"] = ((batch, heads, key_dim), torch.float32)
        forms["scales.value_mean"] = forms["scales.value_std"] = ((batch, heads, value_dim), torch.float32)
    kinds = [("sinks", sink_dtype(keys.dtype, storage.codec))] if anchors.sinks else []
    if storage.score is not None:
        kinds.append(("anchors", torch.int8 if anchors.dtype == "int8" else torch.float16))
    for kind, dtype in kinds:
        positions = tensors.get(f"{kind}.positions")
        if positions is None:  # none of them is left after a crop
            continue
        slots = positions.shape[-1] if positions.ndim else 0
        forms[f"{kind}.positions"] = ((batch, heads, slots), torch.int32)
        forms[f"{kind}.keys"] = ((batch, heads, slots, key_dim), dtype)
        forms[f"{kind}.values"] = ((batch, heads, slots, value_dim), dtype)
        if dtype == torch.int8:
            scale = ((batch, heads, slots, 1), torch.float16)
            forms[f"{kind}.key_scale"] = forms[f"{kind}.value_scale"] = scale
        if kind == "anchors" and anchors.max_tokens:
            forms["anchor_scores"] = ((batch, heads, slots), torch.float32)
    return forms


def _check_groups(starts: torch.Tensor, coded: int, storage: LayerStorage) -> None:
    """Raises ValueError unless the groups follow each other from token 0 to the last, none larger than it may be."""
    key = storage.codec.key
    assert isinstance(key, ChannelQuantizer)
    ends = [*starts.tolist()[1:], coded]
    for i, (start, end) in enumerate(zip(starts.tolist(), ends)):
        if not 0 < end - start <= key.spec.group or (i == 0 and start):
            raise ValueError(
                f"scales.starts: group {i} runs from {start} to {end}; groups follow each other from 0 to {coded}, "
                f"of 1 to {key.spec.group} tokens"
            )


def code_form(codec: Codec | ChannelQuantizer | TokenQuantizer, like: torch.Tensor) -> tuple[int, torch.dtype]:
    """Width and dtype of one vector's codes: asked of the codec itself, with a zero."""
    if isinstance(codec, ChannelQuantizer):
        return codec.spec.code_bytes(codec.head_dim), torch.uint8
    if isinstance(codec, TokenQuantizer):
        return codec.code_bytes + 4 * codec.groups, torch.uint8
    codes = codec.encode(like.new_zeros(1, like.shape[1], 1, like.shape[3]))
    return codes.shape[3], codes.dtype
