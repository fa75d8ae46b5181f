"""Which runs the study consists of, in each of its sizes.

`small` has the methods that claims rest on and two rivals on seven settings, three more rivals on those that are cheap, and five
seeds or three. `full` has every method on four settings, the methods that claims rest on with all blocks trained as well, and what
each piece is worth.
"""
from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedms.config import RunConfig, config_from_dict, dump_toml, load_config, of_method, read_tables, registry
from fedms.errors import ConfigError

SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = SEEDS[:3]
SIZES = ("small", "full", "quick")
FIRST = ("fedms", "fedavg", "fedavg_ft", "fedavg_prior", "local", "fedms_plus")     # what the claims rest on
REST = tuple(method for method in registry.methods() if method not in FIRST)
RIVALS = ("ditto", "apfl")              # private experts that train in all rounds: the best others of the earlier laboratory
RELATIVES = ("feddpa", "flexlora", "fed_sb")    # what else is near to FedMS in the literature, on the cheap settings
GATE = "fedms_plus-gate"                # the ablation that says whether fedms_plus would be better with a learned gate

# Runs that follow each other in a process share its clients' constants; two processes run side by side on two cores.
COMMON = ("run.threads=1",)


@dataclass(frozen=True)
class Setting:
    """A data set and how it is spread over clients.

    Attributes:
        name: Its name in records and commands.
        title: Its title on the page.
        source: A built-in run file, or the path of one.
        sets: The `--set` of its runs.
        seeds: The seeds of its runs.
        more: Methods and ablations that run on it beside what all settings have.
        first: The command that makes its data, which the runs read from `data`.
        data: The folder of these data, None if the data are built in.
    """

    name: str
    title: str
    source: str
    sets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    more: tuple[str, ...] = ()
    first: str = ""
    data: Path | None = None


# `READING` in page.py has the reasons. A batch is padded to its longest sentence: cutting the one in four that is longer than 32
# tokens saves a third of the work.
IMAGES = ("model.id=vit-small", "data.max_samples=8000", "data.split=[0.3, 0.15, 0.55]")
SENTENCES = ("data.split=[0.4, 0.15, 0.45]", "data.max_tokens=32", "stage1.rounds=6", "stage2.rounds=3")

NATURAL = Setting("sentiment-natural", "Sentiment, four domains, 12 clients", "sentiment", SENTENCES)
FASHION_SKEWED = Setting("fashion-0.1", "Fashion-MNIST with vit-small, Dirichlet 0.1, 20 clients", "fashion",
                         (*IMAGES, "data.alpha=0.1"))
FASHION = Setting("fashion-0.5", "Fashion-MNIST with vit-small, Dirichlet 0.5, 20 clients", "fashion", (*IMAGES, "data.alpha=0.5"))
SENTIMENT_SKEWED = Setting("sentiment-0.3", "Sentiment, Dirichlet 0.3, 20 clients", "sentiment",
                           (*SENTENCES, "data.partition=dirichlet", "data.alpha=0.3", "clients.count=20"))
SETTINGS = (FASHION_SKEWED, NATURAL, FASHION, SENTIMENT_SKEWED)

# Few samples, in batches small enough that a client makes several steps a round; for those the rate of stage 1 is half of that in the
# run files of MiniLM and vit-small, whose batches are four times as large. No clients are kept for the end.
SMALL = ("data.split=[0.35, 0.15, 0.5]", "clients.unseen=0", "stage1.rounds=6", "stage1.batch=8", "stage2.rounds=3",
         "stage2.batch=8")
SMALL_SENTENCES = ("data.max_samples=800", "data.max_tokens=24", "stage1.lr=2e-3")


def _small_fashion(name: str, alpha: float, seeds: tuple[int, ...] = SEEDS, more: tuple[str, ...] = ()) -> Setting:
    return Setting(name, f"Fashion-MNIST with vit-small, Dirichlet {alpha}, 10 clients", "fashion",
                   ("model.id=vit-small", "data.max_samples=700", f"data.alpha={alpha}", "clients.count=10", "stage1.lr=2e-3", *SMALL),
                   seeds, more)


SMALL_SENTIMENT = Setting("sentiment-small", "Sentiment with MiniLM, four domains, 12 clients", "sentiment",
                          (*SMALL_SENTENCES, *SMALL), more=(*RELATIVES, GATE))
SMALL_SENTIMENT_SKEWED = Setting("sentiment-0.3-small", "Sentiment with MiniLM, Dirichlet 0.3, 12 clients", "sentiment",
                                 (*SMALL_SENTENCES, "data.partition=dirichlet", "data.alpha=0.3", *SMALL), more=(*RELATIVES, GATE))
SMALL_DIGITS = Setting("digits-small", "Digits with a small pretrained ViT, Dirichlet 0.3, 10 clients", "digits",
                       ("model.id=vit-digits-pretrained", "data.alpha=0.3", "clients.count=10", *SMALL), more=(*RELATIVES, GATE))
SOLAR = Path("runs/solar")
SMALL_SOLAR = Setting("solar-small", "Defects of solar cells with vit-small, six plants, 12 clients", "examples/solar_cells.toml",
                      (f"data.name={SOLAR}", "model.id=vit-small", "clients.count=12", "sal.schedule=capability_queue", "sal.depth=1",
                       "sal.queue=2", "sal.tau=0.01", "stage1.lr=2e-3", *SMALL), FEW_SEEDS,
                      first=f"python examples/solar_cells.py {SOLAR} --cells 800", data=SOLAR)
SMALL_SETTINGS = (_small_fashion("fashion-small", 0.3, more=(GATE,)), SMALL_SENTIMENT, SMALL_DIGITS, SMALL_SENTIMENT_SKEWED,
                  _small_fashion("fashion-0.1-small", 0.1, FEW_SEEDS), _small_fashion("fashion-0.5-small", 0.5, FEW_SEEDS), SMALL_SOLAR)

# The methods' own papers train all blocks from the start: what progressive activation does to each is seen beside that.
ALL_BLOCKS = ("sal.schedule=all",)


@dataclass(frozen=True)
class Ablation:
    """A method with one piece changed, to see what the piece is worth.

    Attributes:
        id: Its name in records and commands, which never changes.
        label: Its name on the page.
        method: The method.
        sets: The `--set` of the change.
    """

    id: str
    label: str
    method: str
    sets: tuple[str, ...]


LEARNED = ("plus.gate_on=held_out",)
ABLATIONS = {ablation.id: ablation for ablation in (
    Ablation("fedms-gate-fixed", "fedms, gate frozen (half and half)", "fedms", ("gate.weight=0.5",)),
    Ablation("fedms-gate-private", "fedms, gate private", "fedms", ("gate.training=private",)),
    Ablation("fedms-global-only", "fedms, global expert only", "fedms", ("gate.weight=0.0",)),
    Ablation("fedms-local-only", "fedms, local expert only", "fedms", ("gate.weight=1.0",)),
    Ablation("fedms-no-own-loss", "fedms, without its own loss", "fedms", ("stage2.own_loss=0.0",)),
    Ablation("fedms-no-early-stopping", "fedms, without early stopping", "fedms", ("stage2.keep=last",)),
    Ablation("fedms-bottom-up", "fedms, blocks bottom up", "fedms", ("sal.order=bottom_up",)),
    Ablation("fedms-random-order", "fedms, blocks in a random order", "fedms",
             ("sal.order=[7, 2, 11, 5, 9, 1, 12, 4, 8, 3, 10, 6]",)),
    Ablation("fedavg_ft-doubled-rank", "fedavg_ft, doubled rank (as many parameters as two experts)",
             "fedavg_ft", ("lora.rank=16", "lora.alpha=32.0")),
    Ablation("fedavg-one-stage", "fedavg, as many bytes as fedms (no second stage)", "fedavg", ("stage2.rounds=0",)),
    Ablation("fedms_plus-global-fixed", "fedms_plus, global expert fixed in stage 2", "fedms_plus", ("plus.global_in_stage2=false",)),
    Ablation("fedms_plus-no-prior", "fedms_plus, no class prior", "fedms_plus", ("plus.prior=off",)),
    Ablation("fedms_plus-prior-global", "fedms_plus, prior on the global expert only", "fedms_plus", ("plus.prior=global",)),
    Ablation("fedms_plus-prior-both-stages", "fedms_plus, prior in stage 1 too", "fedms_plus", ("plus.prior_in_stage1=true",)),
    Ablation("fedms_plus-gate-on-training", "fedms_plus, gate on training samples", "fedms_plus", ("plus.gate_on=training",)),
    Ablation("fedms_plus-gate-on-validation", "fedms_plus, gate on validation samples", "fedms_plus", ("plus.gate_on=validation",)),
    Ablation("fedms_plus-features", "fedms_plus, a gate that sees features too", "fedms_plus", (*LEARNED, "plus.features=true")),
    Ablation("fedms_plus-no-confidences", "fedms_plus, a gate without confidences", "fedms_plus", (*LEARNED, "plus.confidences=false")),
    Ablation(GATE, "fedms_plus with a learned gate", "fedms_plus", LEARNED),
)}
WITH_ALL_BLOCKS = {f"{method}-all-blocks": Ablation(f"{method}-all-blocks", f"{method}, all blocks", method, ALL_BLOCKS)
                   for method in FIRST}
LABELS = {ablation.id: ablation.label for ablation in (*ABLATIONS.values(), *WITH_ALL_BLOCKS.values())}
ABLATED = FASHION
TUNED_ON = (FASHION, NATURAL)       # constants are chosen once for each data set


@dataclass(frozen=True)
class StudyRun:
    """One run of the study.

    Attributes:
        setting: Data set and partition.
        id: The method, or the id of an ablation.
        config: The run file.
        sets: All `--set` of its command.
        tuned: Whether it has constants that `fedms tune` chose.
    """

    setting: Setting
    id: str
    config: RunConfig
    sets: tuple[str, ...]
    tuned: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Everything that the run depends on but the code: the id and the configuration as TOML."""
        return self.id, dump_toml(config_from_dict(self.values))

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as plain values, without the tables of other methods."""
        return of_method(self.config.model_dump(mode="json", exclude_none=True))

    @property
    def command(self) -> str:
        sets = [word for text in self.sets for word in ("--set", text)]
        return shlex.join(["fedms", "run", self.setting.source, *sets])

    @property
    def title(self) -> str:
        return f"{self.setting.name}, {self.id}, seed {self.config.run.seed}"


def plan(size: str = "full", tuned: Path | None = None) -> list[StudyRun]:
    """Return all runs of a size, in the order in which they tell most.

    A study that is stopped has whole seeds first. The full one has every method on every setting and the first ones with all
    blocks, seed by seed; then the ablations. In each part those come first that the claims rest on.

    Args:
        size: `full`; `small`: seven settings with few samples, and eight to eleven methods; or `quick`: six methods on two settings
            with one seed, to see that all works.
        tuned: Folder with SOURCE/METHOD.toml, as `fedms tune --out TUNED/SOURCE` writes them. A method without such a file
            has the run file's constants. The small study has those in any case.

    Raises:
        ConfigError: If there is no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"--size: got {size!r}; accepted: {', '.join(SIZES)}")
    _planned = partial(_plan_one, tuned=None if size == "small" else tuned)
    if size == "small":
        def small(setting: Setting, id: str, seed: int) -> StudyRun:
            ablation = ABLATIONS.get(id)
            return _planned(setting, id, ablation.method, seed, ablation.sets) if ablation else _planned(setting, id, id, seed)

        return [small(setting, id, seed) for seed in SEEDS for setting in SMALL_SETTINGS if seed in setting.seeds
                for id in (*FIRST, *RIVALS, *setting.more)]
    if size == "quick":
        short = ("stage1.rounds=4", "stage2.rounds=2")
        return [_planned(setting, method, method, 0, short) for setting in (FASHION_SKEWED, NATURAL) for method in FIRST]
    # Runs that follow each other share the model, the data and the clients' constants.
    runs: list[StudyRun] = []
    for seed in SEEDS:
        for setting in SETTINGS:
            runs += [_planned(setting, method, method, seed) for method in (*FIRST, *REST)]
            runs += [_planned(setting, each.id, each.method, seed, each.sets) for each in WITH_ALL_BLOCKS.values()]
    return runs + [_planned(ABLATED, ablation.id, ablation.method, seed, ablation.sets)
                   for seed in SEEDS for ablation in ABLATIONS.values()]


def within(planned: Sequence[StudyRun], settings: str) -> list[StudyRun]:
    """Return the runs of some settings.

    Args:
        planned: The runs to choose from.
        settings: Names of settings with commas between them, or all.

    Raises:
        ConfigError: If none of the runs has such a setting.
    """
    names = list(dict.fromkeys(run.setting.name for run in planned))
    wanted = names if settings == "all" else settings.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"--settings: got {unknown[0]!r}; accepted: {', '.join(names)}, or all")
    return [run for run in planned if run.setting.name in wanted]


def _plan_one(setting: Setting, id: str, method: str, seed: int, sets: tuple[str, ...] = (), *,
              tuned: Path | None) -> StudyRun:
    chosen: tuple[str, ...] = ()
    if tuned is not None and (file := tuned / setting.source / f"{method}.toml").is_file():
        chosen = tuple(f"{table}.{key}={json.dumps(value)}" for table, keys in read_tables(file).items()
                       for key, value in keys.items())
    sets = (*COMMON, *setting.sets, *chosen, *_rank_of(setting, method), *sets, f"run.method={method}", f"run.seed={seed}")
    return StudyRun(setting, id, load_config(setting.source, sets), sets, tuned=bool(chosen))


def _rank_of(setting: Setting, method: str) -> tuple[str, ...]:
    """Return the `--set` of the rank: four times that of the others for Fed-SB, whose paper uses larger ranks, at the same scale."""
    if method != "fed_sb" or setting not in SMALL_SETTINGS:
        return ()
    lora = load_config(setting.source).lora
    return f"lora.rank={4 * lora.rank}", f"lora.alpha={4 * lora.alpha}"


def tuning(setting: Setting) -> str:
    """Return the command that chooses the constants of all methods on a data set, where the study looks for them."""
    sets = [word for text in (*COMMON, *setting.sets) for word in ("--set", text)]
    return shlex.join(["fedms", "tune", setting.source, *sets, "--jobs", "2", "--out", f"bench/study/tuned/{setting.source}"])
