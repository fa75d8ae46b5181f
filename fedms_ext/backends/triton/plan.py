"""Decide which rows the passes of a backward pass read, before anything is launched."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class BackwardPlan(NamedTuple):
    """What each launch of a backward pass computes. Without segments the flags of an expert stand for all rows.

    Attributes:
        from_dy_pass: The experts whose rows of dy are read once for everything that follows from them: the gradient of B, and
            U = dy B, from which dS and the gradient of the gate follow.
        projects: Whether that pass computes U.
        shrink_only: The experts whose rows of dy are read for dS alone.
        needs_ds: Whether dS is needed for the gradient of x or of any A.
        from_x_pass: The experts whose rows of x are read for the gradient of A.
    """

    from_dy_pass: tuple[bool, ...]
    projects: bool
    shrink_only: tuple[bool, ...]
    needs_ds: bool
    from_x_pass: tuple[bool, ...]


@lru_cache(maxsize=256)
def plan_backward(
    needs_dx: bool, needs_dgate: bool, needs_da: tuple[bool, ...], needs_db: tuple[bool, ...], segmented: bool
) -> BackwardPlan:
    """Return the plan for the gradients that are asked for.

    With segments each expert has rows of its own, so an expert whose B is not trained can be left out of the pass for the gradients of
    B. Without segments all experts share the rows, so one pass serves either all of them or none.
    """
    needs_ds = needs_dx or any(needs_da)
    from_dy_pass = tuple([needs_dgate or (db if segmented else any(needs_db)) for db in needs_db])
    shrink_only = tuple([(needs_dx or da) and not swept for da, swept in zip(needs_da, from_dy_pass)])
    return BackwardPlan(from_dy_pass, needs_ds or needs_dgate, shrink_only, needs_ds, needs_da)
