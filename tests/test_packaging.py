"""What an installed library brings into an environment, and what it must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_folder_of_kernels_is_no_package_of_that_name():
    """transformers looks for a package called `kernels`, and must not find our folder for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import antkv_hf, importlib.util as u; print(u.find_spec('kernels'))"
    found = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT / "kernels") not in found.stdout
