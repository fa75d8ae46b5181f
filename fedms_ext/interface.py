"""Refuses kernels that were compiled from other sources than the Python code, whose calls they would not take."""
from __future__ import annotations

from types import ModuleType

from . import _C

INTERFACE = "eaf745a83201694c"
"""Hash of the functions in `_C.pyi` and of their parameters, which CMake compiles into the kernels; `tests/ext/test_imports.py`
says what it has to be."""


def check(kernels: ModuleType) -> None:
    """Raise an ImportError if kernels have another interface, or say none, because they are older than this check."""
    built = getattr(kernels, "INTERFACE", "unknown")
    if built != INTERFACE:
        raise ImportError(f"{kernels.__file__}: the kernels were compiled from other sources than the Python code beside them (interface "
                          f"{built}, expected {INTERFACE}), so they take other calls. Compile them again: in a clone by `make setup` or "
                          "`python setup.py build_ext --inplace`, else install the package again by "
                          "`pip install --force-reinstall --no-deps fedms`")


check(_C)
