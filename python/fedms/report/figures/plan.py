"""The picture of a plan (`fedms plan --out`)."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedms.errors import RunFolderError
from fedms.report.figures.style import GRID, GROUP_COLORS, INK, MUTED

if TYPE_CHECKING:
    from fedms.runs.plan import Plan


def write_picture(found: Plan, path: Path) -> None:
    """Draw a plan: memory by purpose with the limit, and seconds and bytes of a round, by depth.

    Args:
        found: The plan.
        path: File to write; its suffix says the format (png, svg, pdf).

    Raises:
        RunFolderError: If the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    memory, seconds, sent = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    depths = [o.depth for o in found.options]
    bottom = [0.0] * len(depths)
    for color, part in zip(GROUP_COLORS, found.options[0].memory):
        heights = [o.memory[part] / 2**20 for o in found.options]
        memory.bar(depths, heights, 0.7, bottom, color=color, label=part)
        bottom = [b + h for b, h in zip(bottom, heights)]
    for option, top in zip(found.options, bottom):
        memory.text(option.depth, top, f"{option.frozen}\n×{option.micro_batch}", ha="center", va="bottom", fontsize=7,
                    color=INK if found.fits(option) else MUTED)
    if found.limit is not None:
        memory.axhline(found.limit / 2**20, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    memory.set_ylim(0, 1.18 * max(*bottom, (found.limit or 0) / 2**20))
    memory.set_ylabel("peak memory (MiB)")
    memory.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=5, columnspacing=1,
                  handlelength=1)
    seconds.bar(depths, [o.seconds for o in found.options], 0.7, color=GROUP_COLORS[0])
    seconds.set_ylabel("seconds a round")
    sent.bar(depths, [(o.work.bytes_up + o.work.bytes_down) / 1e6 for o in found.options], 0.7, color=GROUP_COLORS[1])
    sent.set_ylabel("sent and received a round (MB)")
    for axes in (memory, seconds, sent):
        axes.set_xlabel("depth")
        axes.set_xticks(depths)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
