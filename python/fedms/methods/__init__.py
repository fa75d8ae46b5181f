"""Federated methods by name. A new method is one file here and a name in `METHODS`."""
from __future__ import annotations

from fedms.config import RunConfig
from fedms.methods.apfl import APFL
from fedms.methods.ditto import Ditto
from fedms.methods.fedavg import FedAvg
from fedms.methods.fedavg_ft import FedAvgFT
from fedms.methods.fedavg_prior import FedAvgPrior
from fedms.methods.feddpa import FedDPA
from fedms.methods.fedex_lora import FedExLoRA
from fedms.methods.fedms import FedMS
from fedms.methods.fedms_plus import FedMSPlus
from fedms.methods.fedper import FedPer
from fedms.methods.fedprox import FedProx
from fedms.methods.fedrep import FedRep
from fedms.methods.fedsa_lora import FedSALoRA
from fedms.methods.ffa_lora import FFALoRA
from fedms.methods.local import Local
from fedms.methods.steps import Method, Prediction

METHODS: dict[str, type[Method]] = {method.name: method for method in (
    Local, FedAvg, FedAvgPrior, FedAvgFT, FedProx, FedPer, FedRep, Ditto, APFL, FFALoRA, FedSALoRA, FedExLoRA, FedDPA,
    FedMS, FedMSPlus)}

__all__ = ["METHODS", "Method", "Prediction", "create"]


def create(config: RunConfig) -> Method:
    """The method that a run file names."""
    return METHODS[config.run.method](config)
