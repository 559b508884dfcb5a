"""Compiles every kernel launch of a module of calls for GPUs that are not here. Run in its own process:

    python tests/kernels/ahead_of_time.py aot.encode,aot.dequantize CALLS@sm_86,gfx942 MORE_CALLS@sm_86

Launches are recorded instead of run, so what is compiled is what the launchers would start.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Shared memory of one block, bytes
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101376),
    "sm_89": (GPUTarget("cuda", 89, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101376),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 65536),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas")


def record(calls, hip: bool = False) -> dict[str, tuple[ASTSource, dict]]:
    """Runs `calls` and returns what they would have launched (on ROCm if `hip`), once a specialisation."""
    launches: dict[str, tuple[ASTSource, dict]] = {}

    def run(kernel: JITFunction, *args, grid, warmup=False, **kwargs):
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        values = {**dict(zip(kernel.arg_names, args)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values.get(parameter.name, parameter.default)
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            signature[parameter.name] = _type(value)
            aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if aligned and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        key = f"{kernel.__name__} {signature} {constants} {options}"
        launches.setdefault(key, (source, options))

    # Launchers choose precision and tiles by the PyTorch they run in.
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch.version, "hip", "6.4" if hip else None):
        for call in calls:
            call()
    return launches


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 1 << 31 else "i64"


def main(modules: list[str], plans: dict[str, list[str]]) -> None:
    """Compiles what the calls in the lists of each module launch, for the targets of each list in `plans`.

    Prints a JSON line a launch and target. A module without one of the lists has nothing to compile there.
    """
    for module in modules:
        cases = importlib.import_module(module)
        for plan, names in plans.items():
            calls = getattr(cases, plan, [])
            launches = {hip: record(calls, hip) for hip in {TARGETS[name][0].backend == "hip" for name in names}}
            for name in names:
                for source, options in launches[TARGETS[name][0].backend == "hip"].values():
                    found = {"module": module, "list": plan, "target": name, "kernel": source.fn.__name__}
                    constants = {source.fn.arg_names[i]: str(value) for (i,), value in source.constants.items()}
                    found |= {"types": source.signature, "constants": constants, "options": options}
                    print(json.dumps(found | compile_launch(name, source, options)), flush=True)


def compile_launch(name: str, source: ASTSource, options: dict) -> dict:
    """What compiling for a target gave: shared memory and its limit, whether matrix units are used; or an error."""
    target, limit = TARGETS[name]
    begin = time.perf_counter()
    try:
        compiled = triton.compile(source, target=target, options=dict(options))
    except Exception as error:  # reported, and failed by the test that reads this
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    assembly = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    matrix = any(word in assembly for word in ("mma", "mfma", "tcgen05"))  # wgmma and mma.sync among them
    seconds = round(time.perf_counter() - begin, 2)
    return {"shared": compiled.metadata.shared, "limit": limit, "matrix": matrix, "seconds": seconds}


if __name__ == "__main__":
    lists = dict(argument.split("@") for argument in sys.argv[2:])
    main(sys.argv[1].split(","), {name: targets.split(",") for name, targets in lists.items()})
