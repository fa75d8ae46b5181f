"""Which rows the passes of a backward pass read, decided before anything is launched."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class BackwardPlan(NamedTuple):
    """What each launch of a backward pass computes. Without segments an expert's flags stand for all rows.

    Attributes:
        from_dy_pass: the experts whose rows of dy are read once for all that comes out of them: the gradient of B, and
            U = dy B, from which dS and the gate's gradient follow.
        projects: whether that pass makes U.
        shrink_only: the experts whose rows of dy are read for dS alone.
        needs_ds: whether dS is needed: for the gradient of x or of any A.
        from_x_pass: the experts whose rows of x are read, for the gradient of A.
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
    """Return the plan for what is asked for.

    With segments each expert's rows are its own, so that one whose B is not trained can leave the pass for the gradients of B.
    Without, all experts share the rows: one pass serves them all, or none.
    """
    needs_ds = needs_dx or any(needs_da)
    from_dy_pass = tuple([needs_dgate or (db if segmented else any(needs_db)) for db in needs_db])
    shrink_only = tuple([(needs_dx or da) and not swept for da, swept in zip(needs_da, from_dy_pass)])
    return BackwardPlan(from_dy_pass, needs_ds or needs_dgate, shrink_only, needs_ds, needs_da)
