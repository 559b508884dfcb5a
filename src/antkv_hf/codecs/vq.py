"""Vector quantization of head vectors: per (layer, kv head) tables in a basis (AnTKV, arXiv 2506.19505, section 3.2).

A vector is coded as ``x = mean + basis(concat_g(sum_s centroid[g, s, code[g, s]]))``. Two bases exist:

- *permutation*: latent channel i is plain channel ``permutation[i]`` (free at decode); the metric lives inside each
  sub-vector as ``metric_root``, a square root R with R^T R = M_ss, used only while encoding.
- *dense*: ``x = mean + y @ synthesis``, a full basis that already holds the metric; undone once, after the
  weighted sum of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..config import VQSpec
from ..reference import vq as reference
from .packing import pack_codes, unpack_codes


@dataclass(frozen=True)
class VQTables:
    """Tables of one layer's keys or values. Exactly one of (`permutation`, `synthesis`) is set.

    Args:
        centroids: ``(kv_heads, groups, stages, 2**code_bits, sub_dim)``.
        mean: ``(kv_heads, head_dim)``, plain channels.
        permutation: int ``(kv_heads, head_dim)`` or None.
        metric_root: ``(kv_heads, groups, sub_dim, sub_dim)``, with `permutation` only.
        synthesis: ``(kv_heads, head_dim, head_dim)``, latent to plain, or None.
        noise: of keys, with `permutation` only: ``(kv_heads, groups, sub_dim, sub_dim)``, covariance of what the codes
            lose of a sub-vector after RoPE, see `reference.code_bias`; fine-tuning trains its size. None (as in
            codebooks of format 1 and 2): logits of coded tokens are not corrected.
    """

    centroids: torch.Tensor
    mean: torch.Tensor
    permutation: torch.Tensor | None = None
    metric_root: torch.Tensor | None = None
    synthesis: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> VQTables:
        """Tables with `change` applied to each tensor."""
        return VQTables(**{name: change(t) for name, t in self.tensors().items()})

    def check(self, spec: VQSpec, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError naming the first tensor whose shape does not fit, or that is missing or not finite."""
        groups = spec.groups(head_dim)
        expected = {
            "centroids": (kv_heads, groups, spec.stages, spec.centroids, spec.sub_dim),
            "mean": (kv_heads, head_dim),
            "permutation": (kv_heads, head_dim),
            "metric_root": (kv_heads, groups, spec.sub_dim, spec.sub_dim),
            "synthesis": (kv_heads, head_dim, head_dim),
            "noise": (kv_heads, groups, spec.sub_dim, spec.sub_dim),
        }
        if (self.permutation is None) == (self.synthesis is None) or (self.permutation is None) != (
            self.metric_root is None
        ):
            raise ValueError(
                f"tables need a permutation with its metric_root, or a synthesis; got {list(self.tensors())}"
            )
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {expected[name]} is needed for {spec}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds values that are not finite")
        if self.noise is not None:
            if self.permutation is None:
                raise ValueError("noise goes with a permutation of keys, but these tables have a synthesis")
            if not torch.allclose(self.noise, self.noise.mT):
                raise ValueError("noise is no covariance: it is not symmetric")
            values = torch.linalg.eigvalsh(self.noise.cpu().double())
            if float(values.min()) < -1e-4 * float(values.max()):
                raise ValueError(f"noise is no covariance: its smallest eigenvalue is {float(values.min()):g}")
        if self.permutation is not None:
            order = torch.arange(head_dim, device=self.permutation.device).expand(kv_heads, head_dim)
            if not torch.equal(self.permutation.long().sort(-1).values, order):
                raise ValueError(f"permutation is not a permutation of 0..{head_dim - 1} in every kv head")


def least_table_bytes(spec: VQSpec, kv_heads: int, head_dim: int, permuted: bool, noise: bool) -> int:
    """Bytes of one role's `VQTables` of a layer as stored, where float16 is wide enough for centroids and roots.

    Args:
        permuted: keys before RoPE, in a permutation of their channels; else in a dense basis.
        noise: with the noise of keys.
    """
    blocks = spec.groups(head_dim) * spec.sub_dim**2
    basis = 2 * head_dim + 2 * blocks if permuted else 2 * head_dim**2
    return kv_heads * (spec.table_bytes(head_dim) + 4 * head_dim + basis + (4 * blocks if noise else 0))


class VectorQuantizer:
    """Product or grouped residual VQ of one layer's keys or values (see the module's docstring for the formula).

    Args:
        spec: sub-vectors, code bits and stages.
        tables: the layer's tables, any float dtype.
        device, dtype: where and in what the tables are kept to compute (float32 by default).

    Raises:
        ValueError: if a table's shape does not fit the spec.
    """

    def __init__(self, spec: VQSpec, tables: VQTables, device: torch.device | str = "cpu", dtype=torch.float32):
        self.spec = spec
        self.kv_heads, self.head_dim = tables.mean.shape
        tables.check(spec, self.kv_heads, self.head_dim)
        self.bits_per_element = spec.bits_per_element
        self.groups = spec.groups(self.head_dim)
        place = dict(device=device, dtype=dtype)
        self.mean = tables.mean.to(**place)
        self.noise = None if tables.noise is None else tables.noise.to(device, torch.float32)
        # One row of tables a (kv head, group): (kv_heads * groups, stages, K, sub_dim).
        self.centroids = tables.centroids.to(**place).flatten(0, 1).contiguous()
        self.permutation = self.inverse_permutation = self.metric_root = None
        self.synthesis = self.analysis = self.mean[:, :0]  # of a permutation basis: empty
        if tables.permutation is not None and tables.metric_root is not None:
            self.permutation = tables.permutation.to(device).long()
            self.inverse_permutation = self.permutation.argsort(-1)
            self.metric_root = tables.metric_root.to(**place).flatten(0, 1)
            self.encode_centroids = (self.centroids.flatten(1, 2) @ self.metric_root.mT).view_as(self.centroids)
        elif tables.synthesis is not None:
            self.synthesis = tables.synthesis.to(**place)
            self.analysis = torch.linalg.inv(tables.synthesis.to(device, torch.float64)).to(dtype)
            self.encode_centroids = self.centroids

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, kv_heads, n, head_dim)`` -> uint8 codes ``(batch, kv_heads, n, bytes_per_vector)``."""
        batch, heads, n, _ = self._checked(x).shape
        latent = x.to(self.mean.dtype) - self.mean.unsqueeze(1)
        if self.permutation is not None:
            latent = latent.gather(-1, self.permutation.unsqueeze(1).expand(batch, heads, n, self.head_dim))
        else:
            latent = latent @ self.analysis
        # (kv_heads * groups, batch * n, sub_dim)
        parts = (
            latent.unflatten(-1, (self.groups, -1))
            .permute(1, 3, 0, 2, 4)
            .reshape(heads * self.groups, batch * n, self.spec.sub_dim)
        )
        if self.metric_root is not None:
            parts = parts @ self.metric_root.mT
        codes = reference.residual_encode(parts, self.encode_centroids)
        codes = codes.view(heads, self.groups, batch, n, -1).permute(2, 0, 3, 1, 4).flatten(-2)
        return pack_codes(codes, self.spec.code_bits)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 codes -> plain vectors ``(batch, kv_heads, n, head_dim)``."""
        latent = self._decode_latent(codes)
        if self.inverse_permutation is not None:
            latent = latent.gather(-1, self.inverse_permutation.unsqueeze(1).expand_as(latent))
        else:
            latent = latent @ self.synthesis
        return latent + self.mean.unsqueeze(1)

    def weighted_sum(self, weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """``weights @ decode(codes)``, with the basis and the mean applied once after the sum."""
        latent = weights @ self._decode_latent(codes)
        if self.inverse_permutation is not None:
            latent = latent.gather(-1, self.inverse_permutation.unsqueeze(1).expand_as(latent))
        else:
            latent = latent @ self.synthesis
        return latent + weights.sum(-1, keepdim=True) * self.mean.unsqueeze(1)

    def memory_bytes(self) -> int:
        tensors = {id(t): t for t in vars(self).values() if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _decode_latent(self, codes: torch.Tensor) -> torch.Tensor:
        batch, heads, n, _ = codes.shape
        indices = unpack_codes(codes, self.spec.code_bits, self.groups * self.spec.stages)
        indices = indices.view(batch, heads, n, self.groups, -1).permute(1, 3, 0, 2, 4)
        parts = reference.residual_decode(indices.reshape(heads * self.groups, batch * n, -1), self.centroids)
        return parts.view(heads, self.groups, batch, n, -1).permute(2, 0, 3, 1, 4).reshape(batch, heads, n, -1)

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self.kv_heads or x.shape[3] != self.head_dim:
            raise ValueError(
                f"got {x.shape[1]} kv heads of size {x.shape[3]}, but the codebook was made for "
                f"{self.kv_heads} of size {self.head_dim}: load the codebook of this model"
            )
        return x
