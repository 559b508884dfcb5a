"""How a vector becomes codes: one file a codec, behind the protocol in `base`."""

from .base import Codec
from .identity import IdentityCodec
from .layer import CodecForDevice, LayerCodec, scalar_codecs
from .scalar import ChannelQuantizer, ScalarScales, TokenQuantizer
from .vq import VectorQuantizer, VQTables, least_table_bytes

__all__ = [
    "ChannelQuantizer",
    "Codec",
    "CodecForDevice",
    "IdentityCodec",
    "LayerCodec",
    "ScalarScales",
    "TokenQuantizer",
    "VQTables",
    "VectorQuantizer",
    "least_table_bytes",
    "scalar_codecs",
]
