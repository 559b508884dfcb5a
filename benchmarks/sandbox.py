"""Runs a program that a model wrote, in a process of its own with little to break.

What it is: limits against accidents. The program runs in a new Python with an empty environment, stdin closed, output
thrown away, an empty folder that is deleted afterwards, and limits on wall clock, CPU time, address space, file size
and open files; it cannot start processes or threads. Where the kernel lets it, it has no network (a namespace of its
own). A benchmark started by root runs it as the user nobody, who can still read every file.

What it is not: a security boundary. The program can read files, and write those that its user may write, each up to the
size limit; system calls are not filtered. Run models that you do not trust in a virtual machine or a container.
Linux only.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from typing import NamedTuple

NOBODY = 65534
SECONDS = 10.0
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 1 << 20  # bytes

# Runs in the new process. Its verdict goes to a private copy of stdout that the program does not know, and names a
# secret, so that a program which exits early or prints "passed" has not passed.
_RUNNER = """
import ctypes, json, os, resource, sys, types
job = json.loads(sys.stdin.buffer.read())
verdict = os.dup(1)
silence = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(silence, descriptor)
NEWUSER, NEWNET, KEEPCAPS, CAPABILITIES_3, READ = 0x10000000, 0x40000000, 8, 0x20080522, 1 << 2
libc = ctypes.CDLL(None)
if libc.unshare(NEWNET):
    libc.unshare(NEWUSER | NEWNET)  # where neither is allowed, the network stays
if os.getuid() == 0:
    libc.prctl(KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(job["nobody"])
    os.setuid(job["nobody"])
    # Of root's rights one stays, to read any file: Python itself may lie where only root can read it.
    libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)(READ, READ))
seconds = int(job["seconds"]) + 1
for name, limit in (("CPU", seconds), ("AS", job["memory"]), ("FSIZE", job["file_size"]), ("NOFILE", 64), ("CORE", 0),
                    ("NPROC", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
module = types.ModuleType("solution")
sys.modules["solution"] = module
error = None
try:
    exec(compile(job["program"], "solution.py", "exec"), module.__dict__)
except BaseException as caught:
    error = f"{type(caught).__name__}: {caught}"[:500]
os.write(verdict, json.dumps({"secret": job["secret"] if error is None else "", "error": error}).encode())
os._exit(0)
"""


class Verdict(NamedTuple):
    """`error` is empty where the program ran to its end without one."""

    passed: bool
    error: str


def run_program(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Verdict:
    """Runs Python source to its end or to the first limit.

    Args:
        seconds: of wall clock; CPU time is limited to one more.
        memory: bytes of address space.
    """
    secret = secrets.token_hex(16)
    limits = dict(seconds=seconds, memory=memory, file_size=FILE_SIZE, nobody=NOBODY)
    job = json.dumps({"program": program, "secret": secret, **limits}).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=folder, start_new_session=True,
            env={"HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            out, complaint = process.communicate(job, timeout=seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"ran longer than {seconds:g} s")
        finally:
            process.kill()
            process.communicate()
    try:
        said = json.loads(out)
    except ValueError:
        if complaint:  # the runner's own stderr: only what failed before the program began
            raise RuntimeError(f"the sandbox could not be set up: {complaint.decode()[-500:]}") from None
        return Verdict(False, f"ended without a verdict, exit code {process.returncode}")
    return Verdict(said["secret"] == secret, said["error"] or "")


_FORKS = "import os\nif os.fork() == 0:\n    os._exit(0)\n"
_CONNECTS = "import socket\nsocket.create_connection(('{}', {}), timeout=0.5)\n"


def check_sandbox() -> str:
    """Tries the sandbox out, and returns in a sentence what this machine lets it forbid.

    Raises:
        RuntimeError: an ordinary program fails in it, or it cannot keep programs from starting processes.
    """
    ordinary = run_program(
        "import collections, hashlib, itertools, math, re, string, typing\nassert math.sqrt(4) == 2\n"
    )
    if not ordinary.passed:
        raise RuntimeError(f"an ordinary program fails in the sandbox: {ordinary.error}")
    if run_program(_FORKS).passed:
        raise RuntimeError("programs in the sandbox can start processes here: run the benchmark as an ordinary user")
    return f"sandbox: no processes, {'the network is open' if _network_open() else 'no network'}"


def _network_open() -> bool:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return run_program(_CONNECTS.format(*server.getsockname())).passed
