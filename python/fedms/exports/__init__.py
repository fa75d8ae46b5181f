"""What a run trained, in formats that others read: one folder, which appears whole or not at all.

    peft     a folder for each expert (global, client-ID) that PEFT's `PeftModel.from_pretrained` reads, and its head
    blend    such a folder for each client, with its local and the global expert as one adapter
    merged   one expert added into the model's weights, as `AutoModel.from_pretrained` reads it, and its head
    onnx     the same, from inputs to logits, as one model.onnx
    mixture  all experts, the gate and the foundation model, for `fedms predict` and `fedms.load`

Each holds fedms.json: the classes, the settings of the run, and size and SHA-256 of every other file. Files have the
modes that the umask gives, but for those with a client's own expert, which only their owner can read.
"""
from __future__ import annotations

from pathlib import Path

from fedms import models
from fedms.errors import ConfigError
from fedms.exports import merged, mixture, onnx, peft
from fedms.exports.manifest import check_free, new_folder, read_manifest
from fedms.exports.trained_run import TrainedRun, check_fingerprint, read_trained_run
from fedms.models import FoundationModel
from fedms.progress import Progress

FORMATS = ("peft", "blend", "merged", "onnx", "mixture")

__all__ = ["FORMATS", "TrainedRun", "export", "read_manifest"]


def export(run: str | Path | TrainedRun, out: str | Path, form: str = "mixture", *, client: str | None = None,
           states: str | Path | None = None, overwrite: bool = False, foundation: FoundationModel | None = None,
           progress: Progress | None = None, trust_remote_code: bool = False) -> Path:
    """Write what a finished run trained into a folder.

    Args:
        run: Run folder; or what a run trained, as a client of a federation has it (`fedms.deployment.own_model`).
        out: Folder to write.
        form: One of :data:`FORMATS`.
        client: Id or group of the client whose expert is written; None for the global expert. For merged and onnx.
        states: For a run on Flower, the folder in which a client keeps what is its own, or one with those of several.
        overwrite: Replace an earlier export in `out`.
        foundation: The foundation model, if the run was given it as an object.
        progress: Told of what is being done.
        trust_remote_code: Run the code of the model's repository, if the run did so.

    Returns:
        The folder that was written.

    Raises:
        ConfigError: If the form or the client is unknown, a client is given where all are written, or the run cannot be written
            in this form.
        RunFolderError: If the run has not ended, or `out` exists or cannot be written.
        CheckpointError: If the run's checkpoints are damaged.
        ModelError: If the model cannot be loaded, or is not the one of the run.
    """
    out, progress = Path(out), progress or Progress()
    if form not in FORMATS:
        raise ConfigError(f"--format: got {form!r}; accepted: {', '.join(FORMATS)}")
    if client is not None and form not in ("merged", "onnx"):
        raise ConfigError(f"--client: the format {form} holds all clients; it is for merged and onnx")
    check_free(out, overwrite)
    trained = run if isinstance(run, TrainedRun) else read_trained_run(Path(run), None if states is None else Path(states))
    table = trained.task.config.model
    if table.trust_remote_code and not trust_remote_code and foundation is None:
        raise ConfigError(f"model.trust_remote_code: the run ran code of the repository of {table.id!r}; if you trust that "
                          "code, give --trust-remote-code")
    progress.phase(f"loading model {table.id}")
    foundation = foundation or models.load(table, trained.task.config.task.kind)
    check_fingerprint(foundation, trained.task)
    with new_folder(out, overwrite, private=client is not None) as folder:
        if form == "mixture":
            mixture.write(folder, trained, foundation)
        elif form in ("peft", "blend"):
            peft.write(folder, trained, foundation, blend=form == "blend")
        elif form == "merged":
            merged.write(folder, trained, foundation, client)
        else:
            onnx.write(folder, trained, foundation, client)
    if trained.elsewhere and client is None:
        progress.note(f"the private experts of {len(trained.elsewhere)} clients are not in the export, as these keep them in "
                      "folders of their own; name such a folder by --states DIR")
    return out
