"""What `import fedms_ext` brings with it: the packages that torch and it need, and no others."""
from __future__ import annotations

import subprocess
import sys


def test_nothing_heavy_comes_with_the_import():
    code = "import sys, torch; before = set(sys.modules); import fedms_ext; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # torch has imported numpy and the standard library's larger parts; triton comes with the first tensor on a GPU.
    assert {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) == {"fedms_ext"}
