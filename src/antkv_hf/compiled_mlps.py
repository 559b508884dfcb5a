"""`torch.compile` of a model's MLPs for the steps that `graphs` captures; the model itself stays as it is.

While a step is captured, ``forward`` of each MLP is exchanged for its compiled form, and put back afterwards: a graph
keeps what it has captured. Attention is left alone: its kernels are not PyTorch's. Other threads that run the model
meanwhile find its MLPs as they were; those that want to exchange them wait.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map

NAMES = ("mlp", "feed_forward", "ffn")  # what transformers calls the MLP of a decoder layer
# Shapes never change in a captured step, and the graph is `graphs`' own.
DEFAULTS: dict[str, Any] = dict(dynamic=False)
_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()  # one a model
_MAKING_LOCKS = threading.Lock()
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture CUDA graphs themselves


class CompileError(RuntimeError):
    """There is nothing to compile, or torch.compile does not work here; the model is as it was."""


def compile_options(given: bool | dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of ``torch.compile``, or None for False.

    Raises:
        TypeError: for anything but a bool or a dict.
        ValueError: for an argument that ``torch.compile`` does not take, and for a mode that captures CUDA graphs of
            its own, inside which no other can be captured.
    """
    if not isinstance(given, (bool, dict)):
        raise TypeError(f"compile_mlps={given!r} is neither a bool nor a dict of arguments of torch.compile")
    if given is False:
        return None
    options = DEFAULTS | (given if isinstance(given, dict) else {})
    known = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
    if unknown := sorted(map(str, set(options) - set(known))):
        raise ValueError(f"compile_mlps has {unknown[0]!r}, but torch.compile takes {', '.join(known)}")
    if options.get("mode") in _OWN_GRAPHS:
        raise ValueError(
            f"compile_mlps with mode={options['mode']!r} would capture CUDA graphs inside the step's own: take "
            "mode='max-autotune-no-cudagraphs', or leave mode out"
        )
    if (options.get("options") or {}).get("triton.cudagraphs"):
        raise ValueError("compile_mlps with options={'triton.cudagraphs': True} captures CUDA graphs inside the step's")
    return options


def find_mlps(model: torch.nn.Module) -> list[torch.nn.Module]:
    """MLPs of `model`'s layers: children called as in `NAMES` of the elements of a ``ModuleList``."""
    found = []
    for layers in model.modules():
        if isinstance(layers, torch.nn.ModuleList):
            found += [m for layer in layers for name, m in layer.named_children() if name in NAMES]
    return list(dict.fromkeys(found))


class CompiledMLPs:
    """The MLPs of a model, compiled between the first step and the one that is captured.

    The first time within `exchanged`, MLPs run as they are and their inputs' shapes are noted; `prepare` then compiles
    those that ran, on zeros of these shapes, so that an error of the compiler meets no step half done.

    Args:
        model: anything with layers as `find_mlps` knows them.
        options: arguments of ``torch.compile``, see `compile_options`.

    Raises:
        CompileError: if no MLP is found.
    """

    def __init__(self, model: torch.nn.Module, options: dict[str, Any]) -> None:
        self._mlps = find_mlps(model)
        if not self._mlps:
            raise CompileError(
                f"no layer of {type(model).__name__} has an MLP to compile (a child called {', '.join(NAMES)})"
            )
        with _MAKING_LOCKS:
            self._lock = _LOCKS.setdefault(model, threading.RLock())
        self._options = options
        self._inputs: dict[torch.nn.Module, tuple[tuple, dict[str, Any]]] = {}
        self._compiled: dict[torch.nn.Module, Callable] | None = None

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, MLPs are compiled for this thread (before `prepare`: watched); then, or after an error, as before.

        One thread at a time, for each model.
        """
        with self._lock:
            if self._compiled is None:
                forwards = {mlp: self._watched(mlp, mlp.forward) for mlp in self._mlps}
            else:
                forwards = self._compiled
            before = {mlp: mlp.__dict__.get("forward") for mlp in forwards}  # a hook may have put its own there
            try:
                for mlp, forward in forwards.items():
                    mlp.__dict__["forward"] = _in_this_thread(forward, mlp.forward)
                yield
            finally:
                for mlp, own in before.items():
                    if own is None:
                        mlp.__dict__.pop("forward", None)
                    else:
                        mlp.__dict__["forward"] = own

    def _watched(self, mlp: torch.nn.Module, forward: Callable) -> Callable:
        def watched(*args, **kwargs):
            self._inputs[mlp] = tree_map(_without_data, (args, kwargs))
            return forward(*args, **kwargs)

        return watched

    def prepare(self) -> None:
        """Compiles the MLPs that have run; nothing if that is done.

        Raises:
            CompileError: if none has run, or torch.compile or what it made fails; MLPs stay as they are from then on.
        """
        if self._compiled is not None:
            return
        inputs_of, self._inputs, self._compiled = self._inputs, {}, {}
        if not inputs_of:
            raise CompileError(f"none of {len(self._mlps)} MLPs ran in a step")
        compiled: dict[torch.nn.Module, Callable] = {}
        try:
            with self._lock:  # else another thread's exchanged forward would be compiled
                for mlp, inputs in inputs_of.items():
                    compiled[mlp] = torch.compile(mlp.forward, **self._options)
                    args, kwargs = tree_map(_zeros, inputs)
                    compiled[mlp](*args, **kwargs)
        except Exception as error:  # of Dynamo, of a backend, or of a compiler that it calls
            cause = getattr(error, "inner_exception", error)  # Dynamo's own begins with the backend's name
            reason = next(iter(str(cause).strip().splitlines()), "no message")
            raise CompileError(f"torch.compile of the MLPs failed with {type(cause).__name__}: {reason}") from error
        self._compiled = compiled


def _in_this_thread(exchanged: Callable, usual: Callable) -> Callable:
    owner = threading.get_ident()

    def forward(*args, **kwargs):
        return (exchanged if threading.get_ident() == owner else usual)(*args, **kwargs)

    return forward


class _Shape:
    """A tensor less its data."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.like, self.device = torch.empty_like(tensor, device="meta"), tensor.device


def _without_data(x: Any) -> Any:
    return _Shape(x) if isinstance(x, torch.Tensor) else x


def _zeros(x: Any) -> Any:
    return torch.zeros_like(x.like, device=x.device) if isinstance(x, _Shape) else x
