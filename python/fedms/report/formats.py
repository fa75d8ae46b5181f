"""How a report writes numbers."""

from __future__ import annotations

import math
from typing import Optional

from fedms.report.intervals import Interval
from fedms.report.numbers import Stat


def percent(value: Stat | float | None, digits: int = 1) -> str:
    """Return a fraction as percent without the sign, with the spread over seeds where there is one."""
    if value is None:
        return "–"
    if not isinstance(value, Stat):
        return f"{100 * value:.{digits}f}"
    spread = f" ± {100 * value.std:.{digits}f}" if value.std is not None else ""
    return f"{100 * value.mean:.{digits}f}{spread}"


def size(value: Optional[float]) -> str:
    """Return a number of bytes in decimal units."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: Optional[float]) -> str:
    """Return seconds in words, such as "3 min 05 s"; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def points(gap: float) -> str:
    """Return the size of a difference of shares in percentage points, such as "0.2 points"."""
    return f"{abs(100 * gap):.1f} points"


def signed(gap: float) -> str:
    """Return a difference of shares in percentage points with its sign, such as "+0.2"."""
    return f"{100 * gap:+.1f}".replace("-", "−")


def interval(found: Interval) -> str:
    """Return half the width of an interval in points; a dash for a single seed, which has none."""
    return "–" if math.isinf(found.half) else f"± {100 * found.half:.1f}"


def ends(found: Interval) -> str:
    """Return the ends of an interval in points, such as "95 % interval −0.2 to +1.2 over 3 seeds"."""
    low, high = found.mean - found.half, found.mean + found.half
    return f"95 % interval {signed(low)} to {signed(high)} over {found.seeds} seeds"


def p_value(p: float) -> str:
    """Return a p-value with two significant digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def is_zero(gap: float) -> bool:
    """Tell whether a gap shows as 0.0 points."""
    return abs(gap) < 0.0005
