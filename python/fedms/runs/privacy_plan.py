"""`fedms plan --epsilon`: the noise that a budget asks for, and what is left of the updates under it, before any run."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from fedms.config import RunConfig, config_from_dict
from fedms.federated.private_server import PrivateServer
from fedms.federated.schedule import SalState
from fedms.federated.server import STAGES
from fedms.privacy.planning import PrivacyPlan, plan
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTask

USUAL_NOISE = 10.0      # of scores and counts, where the run file sets none: a tenth of a clipped update's cost or less


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a planned run.

    Attributes:
        stage: "stage1" or "stage2".
        depth: Active blocks.
        plan: The noise at this depth.
    """

    stage: str
    depth: int
    plan: PrivacyPlan


@dataclass(frozen=True)
class PlannedRun:
    """What a run with a budget would be.

    Attributes:
        stages: Each stage at its least and its greatest depth.
        settings: What must be put into the run file, by dotted key.
        half: The noise multiplier with half as many rounds in each stage.
        twice: The noise multiplier with twice as many.
    """

    stages: tuple[PlannedStage, ...]
    settings: dict[str, Any]
    half: float
    twice: float


def private_settings(config: RunConfig, epsilon: float) -> dict[str, Any]:
    """Return the dotted keys that a run file needs for a run within a budget, in addition to those that it has."""
    settings: dict[str, Any] = {} if config.privacy.adds_noise else {"privacy.mode": "central"}
    settings["privacy.epsilon"] = epsilon
    if config.aggregate.weights != "uniform":
        settings["aggregate.weights"] = "uniform"
    if config.aggregation not in ("mean", "freeze_a"):
        settings["aggregate.rule"] = "freeze_a"
    if config.sal.schedule == "capability_queue" and config.privacy.score_noise == "off":
        settings["privacy.score_noise"] = USUAL_NOISE
    if config.method_row.sends_counts and config.privacy.count_noise == "off":
        settings["privacy.count_noise"] = USUAL_NOISE
    return settings


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """Return the configuration with dotted keys set.

    Raises:
        ConfigError: If they do not fit the rest of it.
    """
    tables = config.model_dump()
    tables["privacy"]["noise"] = None
    for key, value in settings.items():
        table, _, name = key.partition(".")
        tables[table][name] = value
    return config_from_dict(tables)


def plan_privacy(config: RunConfig, epsilon: float, progress: Progress | None = None) -> PlannedRun:
    """Return the noise with which a run would stay within a budget, and what utility to expect.

    Nothing is trained. The run file need not have privacy on: what it lacks is among the returned settings.

    Args:
        config: The run file.
        epsilon: The budget of the whole run.
        progress: Told of the loading.

    Raises:
        ConfigError: If the run file cannot be used with privacy, or no noise keeps it within the budget.
        ModelError: If the model cannot be loaded.
        DataError: If the data cannot be loaded or divided.
    """
    settings = private_settings(config, epsilon)
    config = with_settings(config, settings)
    task = LoadedTask(config, progress or Progress())
    experiment = task.experiment(config)
    server = cast(PrivateServer, experiment.server)
    state = server.start(experiment.method.initial(task.model))
    depths = sorted({config.sal.depth, config.sal.max_depth or len(server.order)})
    stages: list[PlannedStage] = []
    for stage in STAGES:
        for depth in depths if getattr(config, stage).rounds else ():
            here = replace(state, stage=stage, sal=SalState(depth), applied_depth=max(depth, state.applied_depth))
            size = server.sums_of(server.message(here)).layout.size
            if size and not (stages and stages[-1].stage == stage and stages[-1].plan.parameters == size):
                stages.append(PlannedStage(stage, depth, _plan(server, size)))
    half, twice = (_with_rounds(task, config, factor).noise.update or 0.0 for factor in (0.5, 2.0))
    return PlannedRun(tuple(stages), settings, half, twice)


def _plan(server: PrivateServer, parameters: int) -> PrivacyPlan:
    others, beside = server.planned()
    settings = server.settings
    return plan(settings.epsilon, settings.delta, settings.accountant, others, server.expected, parameters, server.rate, beside)


def _with_rounds(task: LoadedTask, config: RunConfig, factor: float) -> PrivateServer:
    tables = config.model_dump()
    for stage in STAGES:
        rounds = tables[stage]["rounds"]
        tables[stage]["rounds"] = max(1, round(rounds * factor)) if rounds else 0
    return cast(PrivateServer, task.experiment(config_from_dict(tables)).server)
