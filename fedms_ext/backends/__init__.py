"""Ways to compute the operator, and the choice between them.

`base` says what a backend is, and `registry` holds them in the order of preference. The first one that supports and prefers a
call computes it; the environment variable FEDMS_BACKEND or `use_backend` name one instead.
"""

from .base import Backend
from .registry import available, choose, cpu_is_chosen, explain, known, preference, register_backend, use_backend

__all__ = ["Backend", "available", "choose", "cpu_is_chosen", "explain", "known", "preference", "register_backend", "use_backend"]
