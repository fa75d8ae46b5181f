"""The methods, data sets and models of this package: a row each, with all that is known of one before it is imported.

A new method is one file in `fedms/methods` and one row here; validation, `--methods`, tuning, colors of curves, reports and
the documentation read the row. So it is with data sets and models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedms.config.registry import DATA, METHODS, MODELS, Constant, DataRow, MethodRow, ModelRow
from fedms.config.table import Table

if TYPE_CHECKING:
    from fedms.config.run_config import RunConfig

class PlusTable(Table):
    """The pieces of the method fedms_plus, each of which can be switched; with a gate on training samples and nothing else it is fedms."""

    prior: Literal["both", "global", "off"] = Field(
        "both", description="experts to whose logits the client's class prior is added, log p_client(y) - log p_all(y), in "
        "stage 2 and in use")
    prior_in_stage1: bool = Field(
        False, description="the global expert is trained with that prior added, so that it need not learn it")
    smoothing: float = Field(1.0, gt=0, description="added to each class count before the prior's logarithm")
    gate_on: Literal["off", "held_out", "validation", "training"] = Field(
        "off", description="off: there is no gate, and both experts weigh the same, or as gate.weight says; else the samples that a "
        "gate is trained on, once the visit's expert is: a share held_out of the client's training samples, which the expert then "
        "goes without, or its validation samples, which no other method may fit; training: both are trained together on all "
        "training samples, as in fedms")
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of each client's training samples kept for the gate with gate_on held_out")
    gate_epochs: int = Field(5, ge=1, description="epochs of the gate on those samples a visit")
    confidences: bool = Field(True, description="the gate sees both experts' confidences, not the features alone; with gate.mixing "
                              "layers there are none yet when it decides")
    confidence_lr: float = Field(
        0.05, gt=0, description="AdamW learning rate of the few weights through which it sees them, and of its bias; the rest has "
        "gate.lr")
    features: bool = Field(
        False, description="the gate also sees the frozen model's features, as that of fedms; with gate.mixing layers it does so in "
        "any case")
    global_in_stage2: bool = Field(
        True, description="the global expert goes on being trained and averaged in stage 2, beside the local ones")


class FedAvgPriorTable(Table):
    """Constants of the method fedavg_prior."""

    tau: float = Field(1.0, ge=0, description="method fedavg_prior: strength of the shift by the client's class prior")


class FedProxTable(Table):
    """Constants of the method fedprox."""

    mu: float = Field(0.01, ge=0, description="method fedprox: pull to the weights that a client received")


class FedRepTable(Table):
    """Constants of the method fedrep."""

    head_epochs: int = Field(1, ge=1, description="method fedrep: epochs of the head alone, before those of the body")


class DittoTable(Table):
    """Constants of the method ditto."""

    pull: float = Field(0.1, ge=0, description="method ditto: lambda, the pull of the private model to the global one")


class APFLTable(Table):
    """Constants of the method apfl."""

    alpha: float = Field(0.5, gt=0, lt=1, description="method apfl: weight of the private model at the start")
    lr: float = Field(0.01, ge=0, description="method apfl: AdamW learning rate of that weight; 0 keeps it")


class FedDPATable(Table):
    """Constants of the method feddpa."""

    scale: float = Field(1.0, ge=0, description="method feddpa: weight of the local expert at cosine similarity 1")
    samples: int = Field(5, ge=1, description="method feddpa: training samples that a sample is compared with")


def _fed_sb_problems(config: RunConfig) -> Iterable[str]:
    if config.aggregation != "mean":
        yield f'aggregate.rule: got "{config.aggregation}", but what fed_sb averages are no pairs; leave it unset'
    if config.run.lockstep > 1:
        yield "run.lockstep: fed_sb trains cores in the place of pairs, each client by itself; leave it out"
    if config.lora.start is not None:
        yield "lora.start: fed_sb begins with frames of its own and cannot go on from a trained adapter; leave it out"


def _fedsa_lora_problems(config: RunConfig) -> Iterable[str]:
    if config.aggregation in ("exact", "freeze_a"):
        yield f'aggregate.rule: "{config.aggregation}" needs B to be shared, which fedsa_lora keeps private'


def _gate_weight(config: RunConfig) -> float | None:
    return config.gate.weight


def _plus_weight(config: RunConfig) -> float | None:
    return 0.5 if config.gate.weight is None and config.settings.gate_on == "off" else config.gate.weight


_FROZEN_HEAD = "its private head would be the model's frozen one"
_OWN_LOSS = Constant("stage2.own_loss", 0.0, 2.0, log=False)

# In the order in which they are listed everywhere.
for _method in (
    MethodRow("local", "fedms.methods.local:Local", "every client trains on its own data, and nothing travels",
              trained="a private expert", sent="nothing", color="#5b6b80"),
    MethodRow("fedavg", "fedms.methods.fedavg:FedAvg", "federated averaging of LoRA (FedIT)",
              trained="A, B, head", sent="all of it", color="#7c3aed"),
    MethodRow("fedavg_prior", "fedms.methods.fedavg_prior:FedAvgPrior", "federated averaging, then each client's class prior",
              trained="as fedavg, and log p_client(y) - log p_all(y) on the logits", sent="and class counts, once",
              settings=FedAvgPriorTable, table="fedavg_prior",
              tuned=(Constant("fedavg_prior.tau", 0.0, 1.5, log=False),), sends_counts=True,
              not_for_tokens="it shifts class logits", color="#0f766e"),
    MethodRow("fedavg_ft", "fedms.methods.fedavg_ft:FedAvgFT", "federated averaging, then fine-tuning by each client",
              trained="as fedavg; in stage 2 a private copy", sent="stage 1 alone", two_stages=True, color="#1d4ed8"),
    MethodRow("fedprox", "fedms.methods.fedprox:FedProx", "federated averaging that stays near what clients received",
              trained="as fedavg, held near what was received", sent="all of it", settings=FedProxTable, table="fedprox",
              tuned=(Constant("fedprox.mu", 1e-3, 1.0),), color="#be185d"),
    MethodRow("fedper", "fedms.methods.fedper:FedPer", "a shared body and a private head, trained together",
              trained="A, B, a private head", sent="A, B", needs_linear_head=True, not_for_tokens=_FROZEN_HEAD, color="#4d7c0f"),
    MethodRow("fedrep", "fedms.methods.fedrep:FedRep", "a shared body and a private head, trained one after the other",
              trained="the private head first, then A, B", sent="A, B", settings=FedRepTable, table="fedrep",
              tuned=(Constant("fedrep.head_epochs", 1, 10, integer=True),), needs_linear_head=True, not_for_tokens=_FROZEN_HEAD,
              color="#a16207"),
    MethodRow("ditto", "fedms.methods.ditto:Ditto", "a private expert that is pulled to the shared one",
              trained="as fedavg, and a private expert pulled to the shared one", sent="the shared one",
              settings=DittoTable, table="ditto", tuned=(Constant("ditto.pull", 1e-2, 10.0),), color="#0369a1"),
    MethodRow("apfl", "fedms.methods.apfl:APFL", "a private expert that is mixed with the shared one by a scalar",
              trained="as fedavg, and a private expert mixed with the shared one by a scalar", sent="the shared one",
              settings=APFLTable, table="apfl", tuned=(Constant("apfl.alpha", 0.1, 0.9, log=False),), color="#b45309"),
    MethodRow("ffa_lora", "fedms.methods.ffa_lora:FFALoRA", "federated averaging of B, with A as it was drawn",
              trained="B, head; A stays as drawn", sent="B, head", aggregation="freeze_a", color="#86198f"),
    MethodRow("fedsa_lora", "fedms.methods.fedsa_lora:FedSALoRA", "A is shared, B is private",
              trained="A, B, head", sent="A", check=_fedsa_lora_problems, color="#15803d"),
    MethodRow("fedex_lora", "fedms.methods.fedex_lora:FedExLoRA", "federated averaging that loses nothing of the products",
              trained="as fedavg; what averaging loses is added to the frozen weights",
              sent="all of it; the correction comes back", aggregation="exact", color="#be123c"),
    MethodRow("flexlora", "fedms.methods.flexlora:FlexLoRA", "federated averaging of products, with ranks by device",
              trained="as fedavg, of the rank that a device can train", sent="all of it", aggregation="svd", color="#9d174d"),
    MethodRow("fed_sb", "fedms.methods.fed_sb:FedSB", "federated averaging of a small core between frozen frames",
              trained="a core R between frozen A and B, head", sent="R, head", check=_fed_sb_problems, color="#3f6212"),
    MethodRow("feddpa", "fedms.methods.feddpa:FedDPA", "shared and private experts mixed by similarity to training samples",
              trained="as fedavg_ft; mixed by similarity to training samples", sent="stage 1 alone", settings=FedDPATable,
              table="feddpa", tuned=(Constant("feddpa.scale", 0.25, 4.0),), two_stages=True, not_for_tokens="it weighs whole samples",
              color="#0e7490"),
    MethodRow("fedms", "fedms.methods.fedms:FedMS", "a global expert, then private ones, mixed by a gate that is averaged",
              trained="as fedavg; in stage 2 a private copy and a gate", sent="stage 1, then the gate",
              tuned=(Constant("gate.lr", 1e-4, 1e-2), _OWN_LOSS), two_stages=True, weight=_gate_weight, color="#c2410c"),
    MethodRow("fedms_plus", "fedms.methods.fedms_plus:FedMSPlus",
              "a global expert that goes on and private ones, mixed half and half, with class priors",
              trained="as fedms without a gate, with class priors; the global expert goes on", sent="all of it but the local expert",
              settings=PlusTable, table="plus", tuned=(_OWN_LOSS,), two_stages=True, weight=_plus_weight, sends_counts=True,
              color="#7f1d1d"),
):
    METHODS.add(_method)

for _data in (
    DataRow("sentiment", "fedms.data.sentiment:load", "film and product reviews, news and tweets, rated by people", holds="text",
            has_groups=True, status="fedms.data.sentiment:status"),
    DataRow("digits", "fedms.data.digits:load", "1,797 handwritten digits of 8 x 8 pixels", holds="images",
            public_half="fedms.data.digits:public_half", status="fedms.data.digits:status"),
    DataRow("fashion-mnist", "fedms.data.fashion:load", "70,000 pictures of clothing of 28 x 28 pixels", holds="images",
            public_half="fedms.data.fashion:public_half", status="fedms.data.fashion:status"),
    DataRow("dictionaries", "fedms.data.language:load", "definitions of words by six English dictionaries",
            holds="conversations", has_groups=True),
    DataRow("projects", "fedms.data.language:load", "functions of installed Python projects",
            holds="conversations", has_groups=True),
):
    DATA.add(_data)

for _model in (
    ModelRow("minilm", "fedms.models.minilm:load", "all-MiniLM-L6-v2, a sentence encoder of 6 blocks", reads="text",
             text_head=True, status="fedms.models.minilm:status"),
    ModelRow("smollm2", "fedms.models.smollm2:load", "SmolLM2-135M-Instruct, a causal language model of 30 blocks",
             reads="conversations"),
    ModelRow("vit-digits", "fedms.models.vit_digits:load", "a small vision transformer with random weights", reads="images"),
    ModelRow("vit-digits-pretrained", "fedms.models.vit:load", "a small vision transformer trained on half of the digits",
             reads="images", pretrained=True, status="fedms.models.vit:status_of_digits"),
    ModelRow("vit-fashion", "fedms.models.vit:load", "a small vision transformer trained on half of Fashion-MNIST",
             reads="images", pretrained=True, status="fedms.models.vit:status_of_fashion"),
    ModelRow("vit-small", "fedms.models.vit_small:load", "a vision transformer of 22 million parameters and 12 blocks (DINOv2's layout)",
             reads="images", status="fedms.models.vit_small:status"),
):
    MODELS.add(_model)
