"""The study from the command line: `python -m bench.study --help`, or `make study`."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from bench.study.page import write_page
from bench.study.plan import SIZES, plan, within
from bench.study.records import carry_out
from fedms.cli.command import epilog
from fedms.cli.stopping import polite_stop, reported_errors
from fedms.cli.terminal import say, show, step_bar
from fedms.config import registry
from fedms.models import pretrain as pretraining

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
OUT = Path("bench/study")
PAGE = Path("docs/evidence/study.md")


@app.command(epilog=epilog(
    "python -m bench.study                                 # the small study, or what is missing of it: docs/evidence/study.md",
    "python -m bench.study --page-only                     # make that page again from the records",
    "python -m bench.study --size full --jobs 2 --hours 8  # all methods, as far as that; called again it goes on. Its page names "
    "the `fedms tune` commands that choose each method's constants before",
    "python -m bench.study --size quick --out runs/study-quick  # six methods, two settings, one seed",
    notes=["OUT holds records.jsonl, one line a run, and in OUT/tuned what fedms tune chose; run folders stay in"
           " runs/study."]))
def study(
    size: Annotated[str, typer.Option("--size", metavar="|".join(SIZES), help=(
        "small: eight to eleven methods, seven settings, five seeds or three. full: every method, four settings, five "
        "seeds, and ablations. quick: one seed, short runs, to see that all works."))] = "small",
    settings: Annotated[str, typer.Option("--settings", metavar="A,B|all", help=(
        "Settings to run: fashion-small, sentiment-small, digits-small, sentiment-0.3-small, fashion-0.1-small, fashion-0.5-small, "
        "solar-small; of the full study fashion-0.1, sentiment-natural, fashion-0.5 (with "
        "the ablations), sentiment-0.3."))] = "all",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the records.")] = OUT,
    page: Annotated[Optional[Path], typer.Option(
        "--page", metavar="FILE", help="The page.", show_default=f"{PAGE} of the small study in {OUT}; else OUT/SIZE.md")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, metavar="N", help="Runs at a time, one thread each.")] = 1,
    hours: Annotated[Optional[float], typer.Option(
        "--hours", min=0, metavar="H", help="Stop then, wherever the runs are; the next call goes on.",
        show_default="no limit")] = None,
    page_only: Annotated[bool, typer.Option("--page-only", help="Run nothing.")] = False,
) -> None:
    """Run the study of methods on several settings, and write its page from the records."""
    with reported_errors():
        planned, records = plan(size, out / "tuned"), out / "records.jsonl"
        chosen = within(planned, settings)
        for setting in dict.fromkeys(run.setting for run in chosen):
            if not page_only and setting.data and not setting.data.is_dir():
                say(f"{setting.name} is left out: there is no folder {setting.data}; `{setting.first}` makes it")
                chosen = [run for run in chosen if run.setting != setting]
        if not page_only:
            needed = {run.config.model.id for run in chosen}
            for model in (name for name in registry.pretrained_models() if name in needed):
                with step_bar(f"pretraining {model}") as advance:
                    pretraining.ensure(model, report=advance)
            end = None if hours is None else time.monotonic() + 3600 * hours
            with polite_stop() as stop:
                carry_out(chosen, records, Path("runs") / out.name, jobs=jobs, say=say,
                          stop=lambda: stop() or (end is not None and time.monotonic() > end))
        page = page or (PAGE if (out, size) == (OUT, "small") else out / f"{size}.md")
        write_page(page, planned, records, size)
        show(f"page: {page}")


if __name__ == "__main__":
    app()
