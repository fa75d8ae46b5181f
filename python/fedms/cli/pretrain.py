"""`fedms pretrain`: make the small vision models that no registry holds."""
from __future__ import annotations

from typing import Annotated, Optional

import typer

from fedms.config import ConfigError, registry

from .command import MAINTAIN, command
from .terminal import show, step_bar


@command(
    MAINTAIN,
    "fedms pretrain vit-fashion                # about three minutes on one core, once",
    "fedms pretrain vit-fashion --data FOLDER  # where apt-get cannot fetch Fashion-MNIST",
    notes=["The weights are kept in the cache folder ($FEDMS_CACHE, ~/.cache/fedms), under a hash of all "
           "settings."])
def pretrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{' or '.join(registry.pretrained_models())}.")],
    data: Annotated[Optional[str], typer.Option(
        "--data", metavar="PATH", help="The data, as the run file's data.path.", show_default="fetched, cached")] = None,
    force: Annotated[bool, typer.Option("--force", help="Train again even if the weights are there.")] = False,
) -> None:
    """Train a small vision model on the public half of its data, without labels. Clients hold the other half."""
    if model not in registry.pretrained_models():
        raise ConfigError(f"MODEL: got {model!r}; accepted: {', '.join(registry.pretrained_models())}")

    from fedms.models import pretrain as pretraining

    with step_bar(f"pretraining {model}") as advance:
        file, made = pretraining.ensure(model, data, force=force, report=advance)
    show(f"{file}" + ("" if made else ": there already; --force trains again"))
