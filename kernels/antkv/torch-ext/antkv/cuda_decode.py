"""Decode attention in CUDA C++ (cuda/*.cu), compiled at first use by NVRTC: no nvcc and no compiler is needed.

It computes what `decode_attention.decode_attention` does, for 8-bit codes of 2 to 32 channels in one to three stages
(two with heads of 128; keys and values may differ) whose tables fit the shared memory of a block, heads of 64 or 128
channels and up to 8 query rows a kv head; whoever asks for more gets a `ValueError` that says what has a kernel.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checks import require
from .cuda_shape import MAX_ROWS, Shape, find_shape, plan, shared_bytes
from .decode_plan import check_decode, sort_exact
from .merge_splits import merge_splits
from .past import ExactTokens, QuantizedPast
from .table_image import TableImages
from .tables import KeyTables, ValueTables

SOURCES = ("warp.cuh", "layout.cuh", "packed_codes.cuh", "decode_codes.cuh", "decode_exact.cuh", "decode_attention.cu")
FOLDER = Path(__file__).parent / "cuda"
MIN_CAPABILITY = (8, 0)
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
LOG2E = math.log2(math.e)

_POINTERS_FIRST = ("partial", "partial_max", "partial_total", "key_codes", "value_codes", "exact_bits", "offset")
_POINTERS = (
    "lengths", "tables", "channels", "frequency", "pair_scale", "anchor_positions", "anchor_keys", "anchor_values",
    "anchor_key_scale", "anchor_value_scale", "sink_positions", "sink_keys", "sink_values", "tail_keys", "tail_values",
    "tail_logits",
)  # fmt: skip
_INTEGERS = (
    "batch", "heads", "group", "q_len", "splits", "blocks_per_head", "coded", "tail", "anchors", "sinks", "capacity",
    "tail_capacity", "anchor_capacity", "bits_width", "query_is_bfloat", "is_bfloat", "anchor_kind",
    "hides_padding", "causal",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """What the kernel takes, as `Arguments` of layout.cuh declares it."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        *((f"query_stride_{name}", ctypes.c_int64) for name in "bhn"),
        *((name, ctypes.c_void_p) for name in _POINTERS_FIRST + _POINTERS),
        *((name, ctypes.c_int) for name in _INTEGERS),
        ("scale_log2", ctypes.c_float),
        ("softcap_log2", ctypes.c_float),
    ]


def find_image(shape: Shape, keys: KeyTables, values: ValueTables) -> torch.Tensor:
    """The tables as blocks of a kernel hold them, `table_image.table_image`: kept if ``keys.images`` is given."""
    images = TableImages() if keys.images is None else keys.images
    return images.get(keys, values, shape.value_copies)


def make_arguments(
    query: torch.Tensor, past: QuantizedPast, image: torch.Tensor, tail_keys: torch.Tensor, tail_values: torch.Tensor,
    partial: torch.Tensor, state: torch.Tensor, *, scale: float, softcap: float | None, is_causal: bool,
    hides_padding: bool, splits: int, blocks: int, tail_logits: torch.Tensor | None = None,
) -> Arguments:  # fmt: skip
    """The kernel's arguments; the tensors must outlive the launch. `image`: `find_image` of the kernel's shape."""
    batch, q_heads, q_len, _ = query.shape
    heads = tail_keys.shape[1]
    anchors, sinks = sort_exact(past.exact)
    keys = past.key_tables
    a = Arguments()
    tensors = dict(
        query=query, partial=partial, partial_max=state[0], partial_total=state[1], key_codes=past.key_codes,
        value_codes=past.value_codes, exact_bits=past.exact_bits, offset=past.offset, lengths=past.lengths,
        tables=image, channels=keys.channels, frequency=keys.frequency, pair_scale=keys.pair_scale,
        tail_keys=tail_keys, tail_values=tail_values, tail_logits=tail_logits,
        **_exact("anchor", anchors), **_exact("sink", sinks),
    )  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(a, name, tensor.data_ptr())
    a.query_stride_b, a.query_stride_h, a.query_stride_n = query.stride()[:3]
    a.batch, a.heads, a.group, a.q_len = batch, heads, q_heads // heads, q_len
    a.splits, a.blocks_per_head = splits, blocks
    a.coded, a.capacity = past.length, past.capacity
    a.tail = a.tail_capacity = tail_keys.shape[2]
    a.anchors = a.anchor_capacity = 0 if anchors is None else anchors.positions.shape[2]
    a.sinks = 0 if sinks is None else sinks.positions.shape[2]
    a.bits_width = past.exact_bits.shape[2]
    a.query_is_bfloat = query.dtype == torch.bfloat16
    a.anchor_kind = 0 if anchors is None else 1 if anchors.key_scale is not None else 2
    a.is_bfloat = tail_keys.dtype == torch.bfloat16
    a.hides_padding, a.causal = hides_padding, is_causal
    a.scale_log2 = scale * LOG2E
    a.softcap_log2 = (softcap or 0.0) * LOG2E
    return a


def _exact(name: str, tokens: ExactTokens | None) -> dict[str, torch.Tensor | None]:
    if tokens is None:
        return {}
    parts = dict(positions=tokens.positions, keys=tokens.keys, values=tokens.values)
    if tokens.key_scale is not None:
        parts |= dict(key_scale=tokens.key_scale, value_scale=tokens.value_scale)
    return {f"{name}_{part}": tensor for part, tensor in parts.items()}


class Kernel(NamedTuple):
    """A compiled kernel on one GPU: its handle, and the shared memory that a block of it takes."""

    function: Any
    shared_bytes: int


def source(shape: Shape) -> str:
    """The CUDA C++ of one kernel."""
    return "\n".join((FOLDER / name).read_text() for name in SOURCES) + f"\nDECODE_KERNEL({shape})\n"


def obstacle(device: torch.device) -> str | None:
    """Why CUDA C++ kernels cannot run on `device`; None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "CUDA C++ kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}; 8.0 or higher is needed"
    try:
        import cuda.core  # noqa: F401
    except ImportError as error:
        major = torch.version.cuda.split(".")[0]
        return f"cuda-core is not installed ({error}): pip install 'antkv-hf[cuda{major}]'"
    return None


def cubin_folder() -> Path:
    """Where compiled kernels are kept: ``$ANTKV_CACHE/cubin``, or ``~/.cache/antkv-hf/cubin``."""
    return Path(os.environ.get("ANTKV_CACHE") or Path.home() / ".cache" / "antkv-hf") / "cubin"


@functools.cache
def load_kernel(shape: Shape, device_index: int) -> Kernel:
    """Compiles a kernel that `plan` chose for a GPU (about three seconds), or takes it from the disk."""
    from cuda.bindings import driver
    from cuda.core import Device, Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache

    device = Device(device_index)
    device.set_current()
    wanted = shared_bytes(shape)
    major, minor = device.compute_capability
    options = ProgramOptions(arch=f"sm_{major}{minor}", std="c++17")
    program = Program(source(shape), "c++", options)
    try:
        binary = program.compile("cubin", cache=FileStreamProgramCache(cubin_folder()))
    except OSError:  # a home that cannot be written to
        binary = program.compile("cubin")
    kernel = binary.get_kernel("decode_attention")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuKernelSetAttribute(attribute, wanted, kernel.handle, driver.CUdevice(device_index)))
    _KEPT.append(binary)  # unloads when it is collected
    return Kernel(driver.CUfunction(int(kernel.handle)), wanted)


_KEPT: list[Any] = []


def _check(answer: tuple[Any, ...]) -> None:
    if int(answer[0]) != 0:
        raise RuntimeError(f"the CUDA driver answered {answer[0]!r}")


@functools.cache  # every layer of every step asks
def _properties(device_index: int) -> Any:
    return torch.cuda.get_device_properties(device_index)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of this GPU can have."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _properties(index).shared_memory_per_block_optin


@functools.cache
def _compiles(shape: Shape, device_index: int) -> bool:
    """Whether a kernel can be had for this GPU, in one team and in several: which of them a step takes is known only
    when it is planned, and then a CUDA graph may be under way. Warns if one does not compile."""
    if obstacle(torch.device("cuda", device_index)) is not None:
        return False
    try:
        for form in (shape, shape.in_teams):
            load_kernel(form, device_index)
    except Exception as error:  # of NVRTC or the driver: an older one, a missing library
        warnings.warn(f"decoding with Triton's kernels, since {shape} cannot be compiled: {error}", stacklevel=2)
        return False
    return True


def _exact_fits(past: QuantizedPast, dtype: torch.dtype) -> bool:
    """Whether exact tokens are int8, or in the model's dtype."""
    return all(tokens.key_scale is not None or tokens.keys.dtype == dtype for tokens in past.exact)


def kernel_for(query: torch.Tensor, past: QuantizedPast, softcap: bool) -> Shape | None:
    """The kernel with which `decode_attention` answers these queries on their GPU; None if it does not.

    Args:
        query: ``(batch, q_heads, q_len, head_dim)``. softcap: whether logits are capped.

    Raises:
        ValueError: for tables of which `find_shape` has no kernel for `MAX_ROWS` rows; `CudaBackend` asks before.
    """
    rows = query.shape[1] // past.key_codes.shape[1] * query.shape[2]
    if not query.is_cuda or query.dtype not in SIXTEEN_BITS or not 1 <= rows <= MAX_ROWS:
        return None
    if not _exact_fits(past, query.dtype):
        return None
    shape = find_shape(past.key_tables, past.value_tables, rows, softcap, shared_memory(query.device))
    if not _compiles(shape, query.device.index or 0):
        return None
    find_image(shape, past.key_tables, past.value_tables)  # also before a CUDA graph is under way
    return shape


def launch(kernel: Kernel, arguments: Arguments, shape: Shape) -> None:
    """Launches on PyTorch's current stream."""
    from cuda.bindings import driver

    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream().cuda_stream
    grid = arguments.heads * arguments.blocks_per_head
    _check(
        driver.cuLaunchKernel(
            kernel.function, grid, 1, 1, 32 * shape.warps, 1, 1, kernel.shared_bytes, stream,
            ctypes.addressof(parameters), 0,
        )
    )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    past: QuantizedPast,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    shape: Shape | None = None,
    tail_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode_attention.decode_attention` in CUDA C++: same arguments (but no mask), same results.

    Args:
        shape: what `kernel_for` found for the same arguments; None looks it up here.
        tail_logits: float32 ``(batch, kv_heads, tail rows, shape.rows)``, contiguous: gets the logits of the tail's
            tokens, in units of log 2, for `static_step.add_tail_statistic`.

    Raises:
        ValueError: for what has no kernel here; the message says what has.
    """
    batch, q_heads, q_len, dim = query.shape
    heads = tail_keys.shape[1]
    rows = q_heads // heads * q_len
    check_decode(query, past, tail_keys, tail_values, sink_logit, out)
    require(mask is None, "a mask has no CUDA kernel")
    for name, x in (("query", query), ("tail", tail_keys)):
        require(x.dtype in SIXTEEN_BITS, f"the {name} is {x.dtype}; float16 or bfloat16 is needed")
    require(_exact_fits(past, tail_keys.dtype), f"exact tokens must be int8 or {tail_keys.dtype}, as the tail is")
    if shape is None:
        memory = shared_memory(query.device)
        shape = find_shape(past.key_tables, past.value_tables, rows, softcap is not None, memory)
    if tail_logits is not None:
        want = (*tail_keys.shape[:3], shape.rows)
        fits = tail_logits.shape == want and tail_logits.dtype == torch.float32 and tail_logits.is_contiguous()
        require(fits, f"tail_logits are {tail_logits.dtype} {tuple(tail_logits.shape)}, not float32 {want} in order")
        require(tail_logits.numel() < 2**32, f"{tail_logits.numel()} logits of tails are more than 32 bits count")
    gpu = _properties(query.device.index or 0)
    shape, splits, blocks = plan(shape, past.length, batch, heads, gpu.multi_processor_count, gpu.major >= 9)
    options = dict(device=query.device, dtype=torch.float32)
    partial = torch.empty(batch, heads, 2 * splits, rows, dim, **options)
    state = torch.empty(2, batch, heads, 2 * splits, rows, **options)
    lse = torch.empty(batch, q_heads, q_len, **options)
    out = torch.empty(batch, q_heads, q_len, dim, device=query.device, dtype=query.dtype) if out is None else out
    image = find_image(shape, past.key_tables, past.value_tables)
    arguments = make_arguments(
        query, past, image, tail_keys, tail_values, partial, state, scale=scale, softcap=softcap, is_causal=is_causal,
        hides_padding=past.lengths is not None, splits=splits, blocks=blocks, tail_logits=tail_logits,
    )  # fmt: skip
    with torch.cuda.device_of(query):
        launch(load_kernel(shape, query.device.index or 0), arguments, shape)
        merge_splits(partial, state, past.value_tables, sink_logit, out, lse, query, past.key_tables, scale)
    return out, lse
