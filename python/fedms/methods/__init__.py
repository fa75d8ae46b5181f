"""Federated methods by name. A new method is one file here and a line in `METHODS`."""
from __future__ import annotations

from fedms.config import RunConfig
from fedms.methods.base import Method, Prediction
from fedms.methods.fedavg import FedAvg
from fedms.methods.fedavg_ft import FedAvgFT
from fedms.methods.fedavg_prior import FedAvgPrior
from fedms.methods.fedms import FedMS
from fedms.methods.fedms_plus import FedMSPlus
from fedms.methods.local import Local

METHODS: dict[str, type[Method]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg_prior": FedAvgPrior,
    "fedavg_ft": FedAvgFT,
    "fedms": FedMS,
    "fedms_plus": FedMSPlus,
}

__all__ = ["METHODS", "Method", "Prediction", "create"]


def create(config: RunConfig) -> Method:
    """The method that a run file names."""
    return METHODS[config.run.method](config)
