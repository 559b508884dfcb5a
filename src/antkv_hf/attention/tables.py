"""Codebook tables in the form that the kernels read (`antkv.tables`), made once for a layer and dtype."""

from __future__ import annotations

import torch
from antkv.scalar_decode import ChannelPairs
from antkv.table_image import TableImages
from antkv.tables import TURNS, Codes, KeyTables, ValueTables

from ..codecs import LayerCodec, VectorQuantizer

SUB_DIMS = (2, 4, 8, 16, 32)
HEAD_DIMS = 256  # the largest
MAX_STAGES = 8


class UnsupportedTables(ValueError):
    """These tables have a form that the kernels were not written for; the message says which."""


def layer_tables(codec: LayerCodec, dtype: torch.dtype) -> tuple[KeyTables, ValueTables]:
    """Kernel tables of a layer for a model in `dtype`: float16 centroids, or float32 ones for a float32 model.

    Raises:
        UnsupportedTables: for another dtype or codec, or a basis, size or pairing without a kernel.
    """
    key, value = codec.key, codec.value
    if not isinstance(key, VectorQuantizer) or not isinstance(value, VectorQuantizer):
        names = f"{type(key).__name__} and {type(value).__name__}"
        raise UnsupportedTables(f"the kernels read vector-quantized codes, not those of {names}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedTables(f"the kernels take float16, bfloat16 and float32 keys, not {dtype}")
    table_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    if table_dtype not in codec.kernel_tables:  # float16 and bfloat16 models read the same tables
        codec.kernel_tables[table_dtype] = _key_tables(key, codec, table_dtype), _value_tables(value, table_dtype)
    return codec.kernel_tables[table_dtype]


def _key_tables(key: VectorQuantizer, codec: LayerCodec, dtype: torch.dtype) -> KeyTables:
    codes = _codes(key)
    if key.permutation is None or key.metric_root is None:
        raise UnsupportedTables("keys in a dense basis have no kernel: calibrate keys with a pair permutation")
    heads, dim, device = key.kv_heads, key.head_dim, key.mean.device
    pairs = torch.arange(dim).view(-1, 2) if codec.rotary is None else codec.rotary.channel_pairs(dim)
    pair_of = torch.empty(dim, dtype=torch.int64)
    pair_of[pairs.flatten()] = torch.arange(dim) // 2
    is_second = torch.empty(dim, dtype=torch.int64)
    is_second[pairs.flatten()] = torch.arange(dim) % 2

    # Inside each sub-vector the channels go pair by pair, the first channel of a pair before the second.
    permutation = key.permutation.cpu()
    group = torch.arange(dim) // codes.sub_dim
    order = (group * dim + (pair_of[permutation] * 2 + is_second[permutation])).argsort(-1)  # (heads, dim)
    if codec.rotary is None:
        order = torch.arange(dim).expand(heads, dim)
    channels = permutation.gather(1, order)
    pair = pair_of[channels].view(heads, -1, 2)
    if codec.rotary is not None and not torch.equal(pair[..., 0], pair[..., 1]):
        raise UnsupportedTables(
            "this codebook's permutation of keys separates the two channels of a RoPE pair, which no kernel reads: "
            "calibrate again with this version"
        )
    inside = (order % codes.sub_dim).view(heads, codes.groups, 1, 1, codes.sub_dim).to(device)

    def sorted_channels(x: torch.Tensor) -> torch.Tensor:
        """Tables ``(heads * groups, stages, K, sub_dim)`` -> ``(heads, groups, stages, K, sub_dim)`` in that order."""
        x = x.unflatten(0, (heads, codes.groups))
        return x.gather(-1, inside.expand_as(x)).contiguous()

    root = key.metric_root.float().unsqueeze(1)  # (heads * groups, 1, sub_dim, sub_dim)
    whitened = key.centroids.float() @ root.mT
    channels = channels.to(device)
    frequency = torch.zeros(heads, dim // 2, device=device)
    pair_scale = torch.ones(heads, dim // 2, device=device)
    if codec.rotary is not None:
        rotated = codec.rotary.inv_freq.shape[0]
        table = torch.zeros(dim // 2, device=device)
        table[:rotated] = codec.rotary.inv_freq.to(device)
        frequency = table[pair[..., 0].to(device)].contiguous()
        pair_scale = torch.where(pair[..., 0] < rotated, codec.rotary.scaling, 1.0).to(device, torch.float32)
    return KeyTables(
        codes=codes,
        centroids=sorted_channels(key.centroids).to(dtype),
        mean=key.mean.float().gather(1, channels).contiguous(),
        channels=channels.to(torch.int32).contiguous(),
        frequency=frequency,
        pair_scale=pair_scale.contiguous(),
        rotates=codec.rotary is not None,
        turns=_turns(frequency, pair_scale).to(dtype).contiguous(),
        encode_centroids=sorted_channels(whitened @ root),
        encode_bias=_unflat(-0.5 * whitened.square().sum(-1), heads, codes.groups),
        noise=None if key.noise is None else _sorted_noise(key.noise, inside),
        images=TableImages(),
    )


def _sorted_noise(noise: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Covariances ``(heads, groups, d, d)`` with rows and columns in the order of `inside`."""
    order = inside[:, :, 0]  # (heads, groups, 1, d)
    return noise.gather(2, order.mT.expand_as(noise)).gather(3, order.expand_as(noise)).contiguous()


def channel_pairs(codec: LayerCodec, head_dim: int, device: torch.device, dtype: torch.dtype) -> ChannelPairs:
    """RoPE of scalar codes as the kernel reads it; turns in `dtype`, float16 or float32."""
    frequency, pair_scale = torch.zeros(head_dim // 2, device=device), torch.ones(head_dim // 2, device=device)
    channels = torch.arange(head_dim)
    if codec.rotary is not None:
        rotated = codec.rotary.inv_freq.shape[0]
        channels = codec.rotary.channel_pairs(head_dim).flatten()
        frequency[:rotated] = codec.rotary.inv_freq.to(device)
        pair_scale[:rotated] = codec.rotary.scaling
    turns = _turns(frequency, pair_scale).to(dtype).contiguous()
    return ChannelPairs(
        channels.to(device, torch.int32), frequency, pair_scale, rotates=codec.rotary is not None, turns=turns
    )


def _turns(frequency: torch.Tensor, pair_scale: torch.Tensor) -> torch.Tensor:
    """Cosine and sine of the angles of positions 0 to TURNS - 1: ``(..., pairs)`` -> ``(..., TURNS, pairs, 2)``."""
    angle = torch.arange(TURNS, device=frequency.device).view(-1, 1) * frequency.unsqueeze(-2)
    return torch.stack([angle.cos(), angle.sin()], -1) * pair_scale[..., None, :, None]


def _value_tables(value: VectorQuantizer, dtype: torch.dtype) -> ValueTables:
    codes = _codes(value)
    if value.permutation is not None:  # latent channel i is plain channel permutation[i]: a basis like any other
        synthesis = torch.nn.functional.one_hot(value.permutation, value.head_dim).float()
        analysis = synthesis.mT.contiguous()
        whitened = value.encode_centroids.float()
        assert value.metric_root is not None
        encode = whitened @ value.metric_root.float().unsqueeze(1)
    else:
        synthesis, analysis = value.synthesis.float().contiguous(), value.analysis.float().contiguous()
        encode = whitened = value.centroids.float()
    return ValueTables(
        codes=codes,
        centroids=_unflat(value.centroids, value.kv_heads, codes.groups).to(dtype),
        mean=value.mean.float().contiguous(),
        synthesis=synthesis,
        analysis=analysis,
        encode_centroids=_unflat(encode, value.kv_heads, codes.groups),
        encode_bias=_unflat(-0.5 * whitened.square().sum(-1), value.kv_heads, codes.groups),
    )


def _codes(quantizer: VectorQuantizer) -> Codes:
    spec = quantizer.spec
    if spec.sub_dim not in SUB_DIMS:
        raise UnsupportedTables(f"sub_dim={spec.sub_dim} has no kernel; sub-vectors of {SUB_DIMS} channels have")
    if spec.stages > MAX_STAGES:
        raise UnsupportedTables(f"{spec.stages} residual stages have no kernel; up to {MAX_STAGES} have")
    if quantizer.head_dim > HEAD_DIMS:
        raise UnsupportedTables(f"head size {quantizer.head_dim} has no kernel; up to {HEAD_DIMS} have")
    return Codes(quantizer.groups, spec.stages, spec.code_bits, spec.sub_dim)


def _unflat(x: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    return x.unflatten(0, (heads, groups)).contiguous()
