"""Every kernel compiles for GPUs that are not here, fits their shared memory, and multiplies on their matrix units.

Compiling every launch for every target takes a quarter of an hour. By default each kernel's usual launch is compiled
once for each of Triton's code generators, and launches that need more shared memory for the NVIDIA cards that have
least; ``ANTKV_COMPILE=all`` compiles everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile with")

ROOT = Path(__file__).parents[2]
MODULES = (
    "anchor_score", "encode", "dequantize", "flash_attention", "decode_attention", "scalar_decode", "static_step",
)  # fmt: skip
# mma.sync, wgmma, tcgen05 and MFMA; sm_80, sm_89 and sm_120 go the first one's way, and have no less memory than sm_86.
GENERATORS = ("sm_86", "sm_90", "sm_100", "gfx90a")
EVERYWHERE = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
USUAL = {"CALLS": GENERATORS, "LARGEST_CALLS": ("sm_86",)}
ALL = {"CALLS": EVERYWHERE, "LARGEST_CALLS": EVERYWHERE, "MORE_CALLS": ("sm_86", "gfx942")}
# Kernels with matrix products, and the argument whose 16 bits say that matrix units have to do them.
MATRIX_KERNELS = {
    "decode_kernel": "p_query",
    "scalar_decode_kernel": "p_query",
    "flash_attention_kernel": "p_q",
    "column_statistic_kernel": "p_query",
    "encode_keys_kernel": "p_keys",
    "encode_values_kernel": "p_values",
    "value_error_kernel": "p_values",
    "dequantize_values_kernel": "p_out",
}


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """What `ahead_of_time` printed: one process for all modules, since starting PyTorch takes seconds."""
    plans = ALL if os.environ.get("ANTKV_COMPILE") == "all" else USUAL
    paths = (ROOT / "src", ROOT / "kernels/antkv/torch-ext", ROOT / "tests", ROOT / "tests/kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    modules = ",".join(f"aot.{module}" for module in MODULES)
    lists = [f"{name}@{','.join(targets)}" for name, targets in plans.items()]
    command = [sys.executable, str(ROOT / "tests/kernels/ahead_of_time.py"), modules, *lists]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("module", MODULES)
def test_compiles(compiled, module):
    launches = [launch for launch in compiled if launch["module"] == f"aot.{module}"]
    assert launches
    wrong = [
        f"{launch['kernel']} for {launch['target']}: {problem}\n  {launch['types']} {launch['constants']}"
        for launch in launches
        if (problem := _problem(launch))
    ]
    assert not wrong, "\n".join(wrong)


def _problem(launch: dict) -> str | None:
    if "error" in launch:
        return launch["error"]
    if launch["shared"] > launch["limit"]:
        return f"{launch['shared']} bytes of shared memory; {launch['limit']} exist"
    argument = MATRIX_KERNELS.get(launch["kernel"])
    decodes = launch["kernel"] in ("decode_kernel", "scalar_decode_kernel")
    if launch["target"].startswith("gfx") and decodes and launch["constants"]["BN"] == "32":
        argument = None  # 32 tokens x 8 rows, at head size 256 or in groups of 32: no MFMA is that small; but slow
    if argument is not None and launch["types"][argument] in ("*fp16", "*bf16") and not launch["matrix"]:
        return "16-bit products are not done by matrix units"
    if launch["kernel"] == "merge_tiles_kernel" and launch["target"].startswith("sm_") and not launch["matrix"]:
        return "products in TF32 are not done by matrix units"
    return None
