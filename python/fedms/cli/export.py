"""`fedms export` and `fedms predict`: use what a run trained."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from fedms.errors import RunFolderError

from .command import EXPORT, command
from .options import Trust, UseDevice, check_suffix, checked_device
from .server import installed
from .terminal import run_progress, show


@command(
    EXPORT,
    "fedms export runs/sentiment/fedms_plus-seed0 --out model                   # everything, for predict",
    "fedms export runs/sentiment/fedms_plus-seed0 --out adapters --format peft  # an adapter for each expert",
    "fedms export runs/sentiment/fedms_plus-seed0 --out m7 --format merged -c 7",
    "fedms export fedms-client --out model                                 # at a client of a federation that has ended",
    notes=["Formats: mixture (all experts, the gate and the model), peft (a folder for each expert, with its head), "
           "blend (of a language model whose layers mix by gate.weight: both experts of each client as one adapter of PEFT), "
           "merged (one expert added into the weights), onnx (the same, one file from inputs to logits).",
           "A model that runs code of its repository is exported only with --trust-remote-code, which runs that code."])
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended, or of a client "
                                          "(fedms client join) whose federation has.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", "-f", metavar="NAME", help="mixture, peft, blend, merged or onnx.")] = "mixture",
    client: Annotated[Optional[str], typer.Option(
        "--client", "-c", metavar="ID", help="For merged and onnx: the client whose own expert is written.",
        show_default="the global expert")] = None,
    states: Annotated[Optional[Path], typer.Option(
        "--states", metavar="STATES", help="For a run on Flower: the folder where a client keeps its private expert, "
        "or one with those of several clients.",
        show_default="a simulation's own")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Export what a run trained, in a format that other programs read."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder")
    from fedms import exports

    run: Path | exports.TrainedRun = folder
    if (folder / "client.json").is_file():      # a client's, which `fedms client join` made
        installed()
        from fedms.deployment.own_model import trained_at

        run = trained_at(folder)
    with run_progress(folder) as progress:
        exports.export(run, out, form, client=client, states=states, overwrite=force, progress=progress,
                         trust_remote_code=trust_remote_code)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        show(f"{path}  {path.stat().st_size:,} bytes")


@command(
    EXPORT,
    "fedms predict sentiment-model new.csv --client 7 --out predicted.csv",
    "fedms predict photo-model photos/ --client plant2  # a folder of images; the table goes to the terminal",
    "fedms predict sentiment-model export.csv --delimiter ';' --text body",
    notes=["The table: every column of yours, then label, its probability, and gate_weight, the weight of the client's own "
           "expert; predicted_label where you have a column label."])
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What fedms export wrote in the format mixture.")],
    source: Annotated[str, typer.Argument(metavar="FILE", help="A table (.csv, .tsv, .parquet, .jsonl), an image, or a "
                                          "folder of either.")],
    client: Annotated[Optional[str], typer.Option(
        "--client", "-c", metavar="ID", help="Id of the client that predicts, or its group's name.",
        show_default="the global expert")] = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="FILE", help="Table to write: .csv or .parquet.", show_default="CSV to the terminal")] = None,
    text: Annotated[Optional[str], typer.Option("--text", metavar="NAME", help="Column of texts.",
                                                show_default="as in the run")] = None,
    image: Annotated[Optional[str], typer.Option("--image", metavar="NAME", help="Column of images.",
                                                 show_default="as in the run")] = None,
    delimiter: Annotated[Optional[str], typer.Option("--delimiter", metavar="C", help="Character between the fields of a .csv.",
                                                     show_default="as in the run, else a comma")] = None,
    encoding: Annotated[Optional[str], typer.Option("--encoding", metavar="NAME", help="Encoding of a text file, such as cp1252.",
                                                    show_default="as in the run")] = None,
    quoting: Annotated[Optional[str], typer.Option("--quoting", metavar="NAME", help="standard, or none where quotation marks "
                                                   "mean nothing.", show_default="as in the run")] = None,
    device: UseDevice = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Predict with an exported mixture, as one of its clients."""
    check_suffix("--out", out, ".csv", ".parquet")
    from fedms.exports import mixture

    loaded = mixture.load(folder, client, trust_remote_code=trust_remote_code, device=checked_device(device))
    table = loaded.columns_of_file(source, {"text": text, "image": image, "delimiter": delimiter, "encoding": encoding,
                                             "quoting": quoting})
    if out is None:
        print(mixture.csv_of(table), end="")
    else:
        mixture.write_table(table, out)
        show(f"{len(next(iter(table.values())))} predictions: {out}")
