"""How a vector becomes codes: one file a codec, behind the protocol in `base`."""

from .base import Codec
from .identity import IdentityCodec
from .layer import LayerCodec
from .vq import VectorQuantizer, VQTables

__all__ = ["Codec", "IdentityCodec", "LayerCodec", "VQTables", "VectorQuantizer"]
