"""The run file: one TOML, validated against :class:`RunConfig`.

All problems of single keys are reported in one pass, then all of keys that do not fit together; one line each, by the
dotted key, the value found and the values accepted. Nothing here imports torch, so a mistake in a run file is answered at
once.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedms.errors import ConfigError
from fedms.foreign import parse_toml, printable, read_regular

RUNFILES = Path(__file__).parent / "builtin"

# The built-in models and what each reads, the built-in data sets and what each holds; the cross-checks of RunConfig read
# these. Of anything else that is known once it is loaded.
MODELS = {"minilm": "text", "smollm2": "conversations", "vit-digits": "images", "vit-digits-pretrained": "images", "vit-fashion": "images"}
DATA = {"sentiment": "text", "digits": "images", "fashion-mnist": "images", "dictionaries": "conversations",
        "projects": "conversations"}
PRETRAINED = ("vit-digits-pretrained", "vit-fashion")      # models that `fedms pretrain` makes
DATA_WITH_GROUPS = ("sentiment", "dictionaries", "projects")

METHODS = ("local", "fedavg", "fedavg_prior", "fedavg_ft", "fedprox", "fedper", "fedrep", "ditto", "apfl", "ffa_lora",
           "fedsa_lora", "fedex_lora", "feddpa", "fedms", "fedms_plus")
RULE_OF_METHOD = {"ffa_lora": "freeze_a", "fedex_lora": "exact"}    # those whose aggregation rule is what they are
# Tables that one method reads alone: records of another method do not depend on them.
TABLE_OF_METHOD = {**{name: name for name in ("fedprox", "fedrep", "ditto", "apfl", "feddpa")}, "plus": "fedms_plus"}
NEED_A_LINEAR_HEAD = ("fedper", "fedrep")


def parse_size(value: Any) -> int:
    """Bytes of a human-readable size: ``1536``, ``"512MiB"``, ``"2 GiB"``, ``"1.5GB"`` (K = 1000, Ki = 1024)."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError('a size such as "2GiB", "500MB" or a number of bytes')
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?\s*", value, re.IGNORECASE)
        if match is None or (match[3] and not match[2]):
            raise ValueError('a size such as "2GiB", "500MB" or a number of bytes')
        power = " kmgt".index(match[2].lower() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not 0 <= size < 2**63:
        raise ValueError("a size of at least 0 bytes, below 2**63")
    return size


Size = Annotated[int, BeforeValidator(parse_size)]
Rate = Annotated[int, BeforeValidator(parse_size), annotated_types.Ge(1)]


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


class Table(BaseModel):
    """Base of every table: unknown keys are errors, types are not coerced (``"8"`` is no integer), values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _toml_arrays(cls, values: Any) -> Any:
        # TOML arrays arrive as lists; the fields are tuples, because a frozen table should be hashable throughout.
        return {k: _lists_to_tuples(v) for k, v in values.items()} if isinstance(values, Mapping) else values


class ModelTable(Table):
    """The frozen foundation model and its head."""

    id: str = Field("minilm", min_length=1, description="foundation model: built in are "
                    f"{', '.join(MODELS)}; else a folder in Hugging Face's format, or a hub id such as org/name")
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto", description="how the tokens of a model that is not built in become features; auto: as such models are "
        "used (sentence encoders and encoders mean, decoders the last token, vision models their own)")
    blocks: Optional[str] = Field(
        None, description="dotted name of the list of transformer blocks in a model that is not built in; unset: found "
        "by inspection")
    trust_remote_code: bool = Field(False, description="run code that comes with the model's repository")
    frozen: Literal["fp32", "bf16", "fp16", "int8", "nf4", "int4"] = Field(
        "fp32", description="storage of the frozen Linear weights; on a CPU int8, nf4 and int4 compute in int8, bf16 and "
                            "fp16 in fp32")
    targets: Union[Literal["all-linear"], Annotated[tuple[str, ...], annotated_types.MinLen(1)]] = Field(
        "all-linear", description="Linear layers inside the blocks that get LoRA, by the end of their names")
    head: Literal["text", "linear"] = Field(
        "linear", description="text: frozen class prompts, cosine logits; linear: trained with the expert")
    temperature: Optional[float] = Field(
        None, gt=0, description="divides the cosine logits of class prompts; unset: the model's own (0.05 for text models, "
        "CLIP's as it was learned)")
    learn_temperature: bool = Field(False, description="train the text head's temperature")


class DataTable(Table):
    """The data set and how it is spread over clients."""

    name: str = Field("sentiment", min_length=1, description="data set: built in are "
                      f"{', '.join(DATA)}; else a file or a folder of .csv, .tsv, .parquet or .jsonl, a folder of images, "
                      "or a hub id")
    path: Optional[str] = Field(
        None, description="another copy of a built-in data set's files; unset: its own source, cached")
    text: str = Field("text", min_length=1, description="column of texts")
    image: str = Field("image", min_length=1, description="column of images, or of their files' names")
    label: str = Field("label", min_length=1, description="column of labels")
    client: Optional[str] = Field(
        None, description="column that says whose sample it is; unset: one file or folder a client, if there are several")
    classes: Optional[Annotated[tuple[str, ...], annotated_types.MinLen(2)]] = Field(
        None, description="class names in order; integer labels count them from 0. unset: the labels that occur, sorted")
    prompt: Optional[str] = Field(
        None, description='class prompt, {} being the class name; unset: "a photo of a {}." for images, "{}" for text')
    delimiter: Optional[str] = Field(
        None, description='character between the fields of a .csv or .tsv, such as ";"; unset: a comma in .csv, a tab in .tsv')
    encoding: str = Field("utf-8", min_length=1, description="encoding of .csv, .tsv and .jsonl, such as cp1252 or utf-16")
    quoting: Literal["standard", "none"] = Field(
        "standard", description='standard: a field in "quotation marks" may hold delimiters and line breaks; none: quotation '
        "marks mean nothing")
    messages: Optional[str] = Field(
        None, description="causal_lm: column of conversations, lists of messages with a role and a content")
    question: Optional[str] = Field(None, description="causal_lm: column of prompts; with data.answer")
    answer: Optional[str] = Field(None, description="causal_lm: column of answers; with data.question")
    category: Optional[str] = Field(
        None, description="causal_lm: column that stands for classes in the partitions; unset: all samples are of one")
    loss_on: Literal["answer", "all"] = Field("answer", description="causal_lm: tokens that are learned, the answers' or all")
    template: str = Field(
        "chat", min_length=1, description='causal_lm: "chat", the model\'s chat template; "plain", prompt and answer as they '
        "are; or a text with {prompt} in it and {answer} at its end")
    long_answers: Literal["error", "drop", "cut"] = Field(
        "error", description="causal_lm: what becomes of answers that are longer than data.max_tokens")
    group_by_length: bool = Field(True, description="causal_lm: samples of like length come together in a batch")
    subset: Optional[str] = Field(None, description="configuration of a hub data set that has several")
    part: str = Field("train", min_length=1, description="split that is used of a hub data set, or of a folder with files or "
                      "folders named train, validation and test; clients split it anew")
    augment: tuple[Literal["flip", "shift"], ...] = Field(
        (), description="images are varied anew at every step of training, so nothing of training samples is cached; flip: "
        "half of them are mirrored; shift: they are moved by up to an eighth, their edges repeated")
    max_samples: Optional[int] = Field(
        None, ge=1, description="seeded, stratified subsample of this size; unset: everything")
    max_tokens: int = Field(64, ge=4, le=32768, description="texts are cut to this many tokens; of a prompt with an answer the "
                            "prompt's beginning is cut")
    partition: Literal["natural", "dirichlet", "domains", "classes", "quantity", "iid"] = Field(
        "natural", description="natural: client i draws from domain i mod domains; dirichlet: skewed classes; domains: "
        "skewed domains; classes: a few classes a client; quantity: skewed sizes; iid: evenly at random")
    alpha: float = Field(0.3, gt=0, description="concentration of the partitions dirichlet, domains and quantity; small "
                         "is skewed")
    classes_per_client: int = Field(2, ge=1, description="classes a client of the partition classes")
    split: Annotated[tuple[float, ...], annotated_types.Len(3, 3)] = Field(
        (0.6, 0.15, 0.25), description="train, validation, test shares of each client; they sum to 1")
    global_test: float = Field(0.1, ge=0, lt=1, description="share held out of every client as a common test set")


class TaskTable(Table):
    """What is learned."""

    kind: Literal["classification", "causal_lm"] = Field(
        "classification", description="classification: one label a sample; causal_lm: the next token, with a causal language "
        "model")


class HeadTable(Table):
    """The frozen head of a causal language model."""

    dtype: Literal["fp32", "int8"] = Field(
        "fp32", description="what the logits are computed in; int8 forward alone, the gradient comes from the full weight")
    chunk: int = Field(128, ge=1, description="positions whose logits exist at the same time")


class LoraTable(Table):
    """The shape of every LoRA pair."""

    rank: int = Field(8, ge=1, le=1024, description="rank r of each pair")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the LoRA branch")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    start: Optional[str] = Field(
        None, description="folder of an adapter in PEFT's format that the global expert starts as (fedms import-peft sets "
        "it); unset: afresh")


class SalTable(Table):
    """Sparsely activated LoRA: which blocks are trained, and when more of them are."""

    order: Union[Literal["top_down", "bottom_up", "interleaved"],
                 Annotated[tuple[Annotated[int, annotated_types.Ge(1)], ...], annotated_types.MinLen(1)]] = Field(
        "top_down", description="order of activation; a list names blocks, the first block being 1")
    schedule: Literal["capability_queue", "every", "fixed", "all"] = Field(
        "capability_queue", description="when the next blocks are activated")
    queue: int = Field(4, ge=2, description="length of the capability queue, even")
    tau: float = Field(0.005, description="activate when accuracy rose by less than this over half a queue")
    step: int = Field(1, ge=1, description="blocks activated at a time")
    every: int = Field(2, ge=1, description="rounds between activations for schedule every")
    depth: int = Field(1, ge=1, description="active blocks at the start")
    max_depth: Optional[int] = Field(None, ge=1, description="most active blocks; unset: all blocks")
    cache: Literal["memory", "disk", "off"] = Field(
        "memory", description="where the constants of samples are kept: the prefix's outputs, the frozen expert's "
        "logits, the gate's features; disk: in the cache folder, for later runs too")
    cache_dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="storage of the prefix's outputs; fp32 is exact")
    cache_bytes: Size = Field(
        2 * 1024**3, description='most that the cache may hold, e.g. "2GiB"')


class Stage(Table):
    """What both training stages have in common."""

    rounds: int = Field(8, ge=0, description="communication rounds")
    lr: float = Field(4e-3, gt=0, description="AdamW learning rate")
    epochs: int = Field(1, ge=1, description="local epochs a visit")
    steps: Optional[int] = Field(None, ge=1, description="steps a visit, instead of epochs; unset: epochs")
    batch: int = Field(32, ge=1, description="samples a step")
    micro_batch: Optional[int] = Field(
        None, ge=1, description="samples at a time; gradients add up to those of the batch. unset: the whole batch")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 switches clipping off")


class Stage1Table(Stage):
    """Stage 1: the global expert."""


class Stage2Table(Stage):
    """Stage 2: local experts and the gate."""

    rounds: int = Field(4, ge=0, description="communication rounds")
    lr: float = Field(1e-3, gt=0, description="AdamW learning rate of the local expert")
    own_loss: float = Field(1.0, ge=0, description="weight of the local expert's own loss beside the mixture's")
    keep: Literal["best", "last"] = Field("best", description="local expert kept: best on validation, or the last")


class GateTable(Table):
    """The gate of the mixture."""

    mixing: Literal["outputs", "layers"] = Field("outputs", description="mix model outputs, or inside each layer")
    on: Literal["logits", "probabilities"] = Field("logits", description="what the outputs mix")
    features: Literal["final", "prefix"] = Field("final", description="which frozen features the gate sees")
    temperature: float = Field(1.0, gt=0, description="divides the gate's logits; above 1 is softer")
    lr: float = Field(1e-3, gt=0, description="AdamW learning rate of the gate")
    bottleneck: int = Field(16, ge=1, description="hidden width of the gate adapter")
    training: Literal["aggregated", "private"] = Field(
        "aggregated", description="aggregated: averaged every round; private: each client keeps its own")
    weight: Optional[float] = Field(
        None, ge=0, le=1, description="weight of the local expert, instead of a trained gate's: 0.5 mixes half and half, "
        "as a gate frozen at its start does; 0 is the global expert alone, 1 the local one; unset: the gate's")


class PlusTable(Table):
    """The pieces of the method fedms_plus, each of which can be switched off; without them it is fedms."""

    prior: Literal["both", "global", "off"] = Field(
        "both", description="experts to whose logits the client's class prior is added, log p_client(y) - log p_all(y), in "
        "stage 2 and in use")
    prior_in_stage1: bool = Field(
        False, description="the global expert is trained with that prior added, so that it need not learn it")
    smoothing: float = Field(1.0, gt=0, description="added to each class count before the prior's logarithm")
    gate_on: Literal["validation", "held_out", "training"] = Field(
        "validation", description="samples that the gate is trained on, once the visit's expert is: the client's validation "
        "samples, or a share held_out of its training samples, which the expert then goes without; training: both are "
        "trained together on all training samples, as in fedms")
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of each client's training samples kept for the gate with gate_on held_out")
    gate_epochs: int = Field(5, ge=1, description="epochs of the gate on those samples a visit")
    confidences: bool = Field(True, description="the gate sees both experts' confidences, not the features alone")
    confidence_lr: float = Field(
        0.05, gt=0, description="AdamW learning rate of the few weights through which it sees them; the rest has gate.lr")
    global_in_stage2: bool = Field(
        True, description="the global expert goes on being trained and averaged in stage 2, beside the local ones")


class Budget(Table):
    """One class of devices: the share of clients in it, and what such a device can do; unset: no limit."""

    share: float = Field(gt=0, le=1, description="share of the clients")
    max_depth: Optional[int] = Field(None, ge=1, description="most blocks such a client trains")
    memory: Optional[Size] = Field(
        None, description="bytes for weights, constants and a training step; limits the depth by the cost model")
    flops: Optional[float] = Field(None, gt=0, description="operations a second")
    bandwidth_up: Optional[Rate] = Field(None, description="bytes a second from the client")
    bandwidth_down: Optional[Rate] = Field(None, description="bytes a second to the client")

    @property
    def has_clock(self) -> bool:
        """Whether time passes on such a device's simulated clock."""
        return any(v is not None for v in (self.flops, self.bandwidth_up, self.bandwidth_down))


CLIENTS = 12        # unless the run file or the data say how many


class ClientsTable(Table):
    """Who takes part."""

    count: Optional[int] = Field(None, ge=1, description="participating clients; unset: as many as data of your own name "
                                 "(less the unseen ones) with partition natural, else 12")
    unseen: int = Field(0, ge=0, description="further clients, met only at the end")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients sampled each round")
    min: int = Field(1, ge=1, description="least clients sampled each round")
    budgets: tuple[Budget, ...] = Field((), description="device classes; their shares sum to 1; none: no limit")
    spread: float = Field(0.0, ge=0, le=2, description="how much devices of a class differ: standard deviation of the "
                          "logarithm of speed and link, drawn once for each client")
    round_timeout: float = Field(600.0, gt=0, description="seconds in which a client must answer; engine local waits "
                                 "for every client")
    quorum: float = Field(0.0, ge=0, le=1, description="least share of a round's clients whose replies must count; "
                          "with fewer the run stops, and can be resumed")
    join_timeout: Optional[float] = Field(
        None, gt=0, description="seconds to wait for a client whose node is away, once; from then on it is only looked at. "
        "unset: clients.round_timeout")
    max_change: float = Field(2.0, gt=0, description="a reply is refused in which a tensor changed by more than this many "
                              "times what a visit's training can change: learning rate, times steps, times the root of "
                              "the number of its elements")
    optimizer: Literal["fresh", "kept"] = Field("fresh", description="optimizer state at each visit")

    @property
    def sampled(self) -> int:
        """Clients sampled each round, of `CLIENTS` where the number is not known yet."""
        count = self.count or CLIENTS
        return min(count, max(self.min, int(self.fraction * count + 0.5)))


class AggregateTable(Table):
    """How replies are combined."""

    rule: Optional[Literal["mean", "exact", "freeze_a", "median", "trimmed_mean", "krum"]] = Field(
        None, description="mean: A and B averaged apart; exact: what that loses is added to the frozen weights; freeze_a: "
        "A stays as drawn, B is averaged; median, trimmed_mean: by element; krum: the one reply nearest to the others. "
        "unset: the method's, else mean")
    weights: Literal["samples", "uniform"] = Field(
        "samples", description="weight of a client's reply; median, trimmed_mean and krum count each once")
    trim: float = Field(0.1, ge=0, lt=0.5, description="rule trimmed_mean: share of the values cut at either end")
    byzantine: int = Field(1, ge=0, description="rule krum: replies that may be hostile; 2 more than twice as many are "
                           "needed each round")


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


class WireTable(Table):
    """How tensors travel between server and clients."""

    dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="encoding of what travels; fp32 is exact, int8 has one scale a row")


class PrivacyTable(Table):
    """Differential privacy and secure aggregation; the unit that is protected is a client."""

    mode: Literal["off", "central", "secure", "distributed"] = Field(
        "off", description="central: the server adds noise to what it sums up, so readers of the models cannot tell whether "
        "a client took part; secure: the server sees the clients' sum alone, without noise; distributed: both, each client "
        "adding its share of the noise")
    clip: float = Field(1.0, gt=0, description="C, the largest L2 norm of a client's whole update; longer ones are scaled "
                        "down to it")
    epsilon: Optional[float] = Field(
        None, gt=0, description="budget of the whole run, which stops before it is exceeded; the noise follows from it")
    noise: Optional[float] = Field(
        None, gt=0, description="noise multiplier, in the place of epsilon: standard deviation of the noise in a round's sum "
        "of updates, divided by clip")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of (epsilon, delta) differential privacy; well below one "
                         "divided by the number of clients")
    accountant: Literal["pld", "rdp"] = Field(
        "pld", description="how epsilon is computed: pld (privacy loss distributions) is tight, rdp (Renyi) is an older bound")
    sampling: Literal["fixed", "poisson"] = Field(
        "fixed", description="fixed: a round's clients follow from run.seed, which all know, and taking part is not hidden; "
        "poisson: each client is drawn with probability clients.fraction from the secret key, which hides it and lowers "
        "epsilon; mode central alone")
    key: str = Field("privacy.key", min_length=1, description="file of 32 secret bytes, readable by its owner alone, from "
                     "which the noise is drawn; never from run.seed")
    bits: int = Field(16, ge=8, le=20, description="an update's values are rounded to multiples of clip / 2^bits")
    score_noise: Union[Literal["off"], Annotated[float, annotated_types.Gt(0)]] = Field(
        "off", description="noise multiplier of the clients' validation scores and test accuracies, each in [0, 1]")
    count_noise: Union[Literal["off"], Annotated[float, annotated_types.Gt(0)]] = Field(
        "off", description="noise multiplier of the clients' class counts, each client's scaled to norm 1")

    @property
    def adds_noise(self) -> bool:
        """Whether the run is differentially private."""
        return self.mode in ("central", "distributed")

    @property
    def masks(self) -> bool:
        """Whether clients' updates are summed up securely."""
        return self.mode in ("secure", "distributed")


class RunTable(Table):
    """How the run itself is carried out."""

    method: Literal[METHODS] = Field("fedms", description="algorithm")  # type: ignore[valid-type]
    seed: int = Field(0, ge=0, le=2**32 - 1, description="every random draw comes from this seed")
    threads: int = Field(2, ge=1, description="CPU threads; records repeat byte for byte at a fixed number")
    engine: Literal["local", "flower-sim", "flower"] = Field(
        "local", description="local: all clients in this process; flower-sim: Flower's simulation on this machine; "
        "flower: clients on machines of their own")


class RunConfig(Table):
    """A complete, validated run file. Attribute names are the TOML names."""

    task: TaskTable = TaskTable()
    model: ModelTable = ModelTable()
    head: HeadTable = HeadTable()
    data: DataTable = DataTable()
    lora: LoraTable = LoraTable()
    sal: SalTable = SalTable()
    stage1: Stage1Table = Stage1Table()
    stage2: Stage2Table = Stage2Table()
    gate: GateTable = GateTable()
    clients: ClientsTable = ClientsTable()
    aggregate: AggregateTable = AggregateTable()
    fedprox: FedProxTable = FedProxTable()
    fedrep: FedRepTable = FedRepTable()
    ditto: DittoTable = DittoTable()
    apfl: APFLTable = APFLTable()
    feddpa: FedDPATable = FedDPATable()
    plus: PlusTable = PlusTable()
    wire: WireTable = WireTable()
    privacy: PrivacyTable = PrivacyTable()
    run: RunTable = RunTable()

    @property
    def aggregation(self) -> str:
        """The aggregation rule in force: the one that is set, else the method's own, else the mean."""
        return self.aggregate.rule or RULE_OF_METHOD.get(self.run.method, "mean")

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        problems = list(_cross_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _cross_problems(c: RunConfig) -> Iterable[str]:
    """Problems that no single key shows, one line each, starting with the key to change."""
    reads, holds = MODELS.get(c.model.id), DATA.get(c.data.name)
    if reads is None and (hint := _did_you_mean(c.model.id, MODELS, cutoff=0.8)):
        yield f"model.id: got {_show(c.model.id)}, which is no built-in model{hint}"
    if holds is None and (hint := _did_you_mean(c.data.name, DATA, cutoff=0.8)):
        yield f"data.name: got {_show(c.data.name)}, which is no built-in data set{hint}"
    if reads and holds and reads != holds:
        yield (f"data.name: {_show(c.data.name)} holds {holds}, but model.id {_show(c.model.id)} reads {reads}; accepted "
               f"with it: {_words(name for name, held in DATA.items() if held == reads)}, or data of your own")
    if c.model.head == "text" and reads == "images":
        yield (f'model.head: "text" needs a model that embeds class prompts; with model.id {_show(c.model.id)} use '
               '"linear"')
    for table, names in (("model", ("pooling", "blocks", "trust_remote_code")),
                         ("data", ("text", "image", "label", "client", "classes", "prompt", "delimiter", "encoding", "quoting",
                                                      "subset", "part"))):
        values, builtin = getattr(c, table), reads if table == "model" else holds
        for name in names:
            if builtin and getattr(values, name) != type(values).model_fields[name].default:
                yield f"{table}.{name}: {table}.{'id' if table == 'model' else 'name'} is built in, so this is given"
    if holds is None and c.data.path is not None:
        yield "data.path: is for the built-in data sets; name your own file or folder in data.name"
    if c.data.classes is not None and len(set(c.data.classes)) < len(c.data.classes):
        yield f"data.classes: got {_show(c.data.classes)}; a class is named twice"
    if c.data.delimiter is not None and (len(c.data.delimiter) != 1 or c.data.delimiter in '"\r\n\0'):
        yield f'data.delimiter: got {_show(c.data.delimiter)}; accepted: one character, such as ";" or "\\t"'
    if not _is_encoding(c.data.encoding):
        yield f'data.encoding: got {_show(c.data.encoding)}; accepted: a text encoding, such as "utf-8", "cp1252" or "utf-16"'
    if c.data.prompt is not None and c.data.prompt.count("{}") != 1:
        yield f"data.prompt: got {_show(c.data.prompt)}; accepted: a text with one {{}}, where the class name goes"
    if c.model.learn_temperature and c.model.head != "text":
        yield 'model.learn_temperature: only the text head has a temperature; set model.head to "text"'
    if c.data.partition in ("natural", "domains") and holds and c.data.name not in DATA_WITH_GROUPS:
        yield (f'data.partition: {_show(c.data.partition)} needs a data set with domains and {_show(c.data.name)} has '
               'none; accepted: "dirichlet", "classes", "quantity", "iid"')
    if min(c.data.split) <= 0 or abs(sum(c.data.split) - 1) > 1e-9:
        yield (f"data.split: got {_show(c.data.split)}, which sums to {sum(c.data.split):g}; "
               "accepted: three numbers above 0 that sum to 1")
    if c.sal.queue % 2:
        yield f"sal.queue: got {c.sal.queue}; accepted: an even number, as its two halves are compared"
    if c.sal.max_depth is not None and c.sal.depth > c.sal.max_depth:
        yield f"sal.depth: got {c.sal.depth}, above sal.max_depth = {c.sal.max_depth}"
    if not isinstance(c.sal.order, str) and len(set(c.sal.order)) < len(c.sal.order):
        yield f"sal.order: got {_show(c.sal.order)}; a block is named twice"
    if c.stage1.rounds + c.stage2.rounds == 0:
        yield "stage1.rounds: 0 in both stages leaves nothing to train"
    if c.gate.mixing == "layers" and c.gate.features != "prefix":
        yield ('gate.features: mixing = "layers" decides before the first mixed layer, so it cannot see '
               f'{_show(c.gate.features)} features; set gate.features to "prefix"')
    if c.clients.count is not None and c.clients.min > c.clients.count:
        yield f"clients.min: got {c.clients.min}, above clients.count = {c.clients.count}"
    for name in ("stage1", "stage2"):
        stage = getattr(c, name)
        if stage.micro_batch is not None and stage.micro_batch > stage.batch:
            yield f"{name}.micro_batch: got {stage.micro_batch}, above {name}.batch = {stage.batch}"
    yield from _task_problems(c)
    yield from _method_problems(c)
    yield from _privacy_problems(c)
    if c.run.method == "fedms_plus" and c.gate.mixing == "layers" and c.plus.confidences:
        yield ('plus.confidences: mixing = "layers" decides before there are outputs to be confident of; '
               'set plus.confidences to false')
    if c.clients.spread and not any(b.has_clock for b in c.clients.budgets):
        yield ("clients.spread: no class of clients.budgets has flops or a bandwidth that it could act on")
    if c.clients.budgets and abs(sum(b.share for b in c.clients.budgets) - 1) > 1e-9:
        yield (f"clients.budgets: the shares sum to {sum(b.share for b in c.clients.budgets):g}; "
               "accepted: shares that sum to 1")


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
        return True
    except (LookupError, ValueError):
        return False


# What a causal language model has no use for, and why.
NOT_FOR_TOKENS = {"fedavg_prior": "it shifts class logits", "fedper": "its private head would be the model's frozen one",
                  "fedrep": "its private head would be the model's frozen one", "feddpa": "it weighs whole samples"}


def _task_problems(c: RunConfig) -> Iterable[str]:
    reads = MODELS.get(c.model.id)
    if c.task.kind == "classification":
        if reads == "conversations":
            yield f'task.kind: model.id {_show(c.model.id)} is a causal language model; set task.kind to "causal_lm"'
        return
    if reads not in (None, "conversations"):
        yield (f'model.id: task.kind "causal_lm" needs a causal language model, and {_show(c.model.id)} reads {reads}; accepted: '
               f'{_words(name for name, read in MODELS.items() if read == "conversations")}, a folder, a hub id or a .gguf file')
    if (holds := DATA.get(c.data.name)) not in (None, "conversations"):
        yield f"data.name: {_show(c.data.name)} holds {holds} with labels, which task.kind \"causal_lm\" does not learn"
    if reason := NOT_FOR_TOKENS.get(c.run.method):
        yield f"run.method: {c.run.method} is not for task.kind \"causal_lm\": {reason}"
    if c.gate.mixing == "outputs" and c.gate.on == "logits":
        yield 'gate.on: task.kind "causal_lm" mixes probabilities, which take one number a token to keep; set it to "probabilities"'
    if c.model.head == "text":
        yield 'model.head: "text" are class prompts, which task.kind "causal_lm" has none of; leave it out'


def _method_problems(c: RunConfig) -> Iterable[str]:
    method, rule = c.run.method, c.aggregation
    if method in NEED_A_LINEAR_HEAD and c.model.head != "linear":
        yield f'model.head: {method} gives each client a head of its own; got {_show(c.model.head)}, accepted: "linear"'
    own = RULE_OF_METHOD.get(method, rule)
    if rule != own:
        yield f'aggregate.rule: got {_show(rule)}, but {method} is the method of the rule "{own}"; leave it unset'
    if method == "fedsa_lora" and rule in ("exact", "freeze_a"):
        yield f"aggregate.rule: {_show(rule)} needs B to be shared, which fedsa_lora keeps private"
    if rule == "exact" and c.model.frozen != "fp32":
        yield (f'aggregate.rule: "exact" adds to the frozen weights, which model.frozen = {_show(c.model.frozen)} '
               'quantizes; set model.frozen to "fp32"')
    if rule == "krum" and c.clients.count is not None and c.clients.sampled < 2 * c.aggregate.byzantine + 3:
        yield (f"aggregate.byzantine: got {c.aggregate.byzantine}, for which krum needs "
               f"{2 * c.aggregate.byzantine + 3} replies a round, and {c.clients.sampled} clients are sampled")


SEND_COUNTS = ("fedavg_prior", "fedms_plus")       # methods in which clients send class counts
FEWEST_TO_MASK = 3      # with two clients, each learns the other's update from the sum


def _privacy_problems(c: RunConfig) -> Iterable[str]:
    p = c.privacy
    if p.mode == "off":
        return
    mode = f"privacy.mode = {_show(p.mode)}"
    yield from _noise_problems(c, mode)
    if c.aggregation not in ("mean", "freeze_a"):
        why = ("adds products of single updates, whose size the clip does not bound" if c.aggregation == "exact" else
               "compares single updates, and there are none to compare")
        yield f'aggregate.rule: {_show(c.aggregation)} {why} with {mode}; set it to "freeze_a" (recommended) or "mean"'
    if c.aggregate.weights != "uniform":
        yield (f"aggregate.weights: got {_show(c.aggregate.weights)}; with {mode} the number of a client's samples is not sent, "
               'and its weight would be its influence; set it to "uniform"')
    if c.clients.max_change != type(c.clients).model_fields["max_change"].default:
        yield (f"clients.max_change: looks at single updates; with {mode} privacy.clip bounds each one already; leave it unset")
    if any(tier.memory is not None for tier in c.clients.budgets):
        yield (f"clients.budgets: memory is turned into a depth by the data of the largest client, which {mode} must not show; "
               "give max_depth instead")
    if p.masks and c.clients.count is not None and c.clients.sampled < FEWEST_TO_MASK:
        yield (f"clients.fraction: {c.clients.sampled} clients are sampled each round; with {mode} a sum needs at least "
               f"{FEWEST_TO_MASK}, or clients could compute each other's updates; raise it or clients.count")
    if p.masks and c.clients.count is not None and c.clients.sampled * 2**p.bits >= 2**30:
        yield (f"privacy.bits: got {p.bits}; with {c.clients.sampled} clients a round the sum would not fit into 32 bits; accepted "
               f"here: up to {29 - c.clients.sampled.bit_length() + 1}")


def _noise_problems(c: RunConfig, mode: str) -> Iterable[str]:
    p = c.privacy
    if p.adds_noise and (p.epsilon is None) == (p.noise is None):
        yield (f"privacy.epsilon: {'unset, and so is privacy.noise' if p.epsilon is None else 'set, and so is privacy.noise'}; "
               f"{mode} needs exactly one of the two: a budget, or the noise itself")
    if p.mode == "secure":
        for key in ("epsilon", "noise", "score_noise", "count_noise"):
            if getattr(p, key) not in (None, "off"):
                yield (f"privacy.{key}: {mode} adds no noise; leave it unset, or set privacy.mode to \"distributed\" for secure "
                       "aggregation with noise")
    if p.adds_noise and c.sal.schedule == "capability_queue" and p.score_noise == "off":
        yield (f'sal.schedule: "capability_queue" decides by the clients\' validation scores, which need noise of their own with '
               f'{mode}; set privacy.score_noise (for example 10), or sal.schedule to "every", "fixed" or "all"')
    if p.adds_noise and c.run.method in SEND_COUNTS and p.count_noise == "off":
        yield (f"privacy.count_noise: {c.run.method} sums up the clients' class counts, which need noise of their own with {mode}; "
               "set it (for example 10), or choose another method")
    if p.sampling == "poisson" and p.mode != "central":
        yield (f'privacy.sampling: "poisson" hides who takes part; with {mode} the clients of a round and the server must know each '
               'other; set it to "fixed", or privacy.mode to "central"')
    if p.sampling == "poisson" and c.clients.min != 1:
        yield 'clients.min: with privacy.sampling = "poisson" each client is drawn by itself, so there is no least number; leave it unset'


def builtin_names() -> tuple[str, ...]:
    """Names of the built-in run files."""
    return tuple(sorted(path.stem for path in RUNFILES.glob("*.toml")))


def source_name(source: str | Path) -> str:
    """Short name of a run file: the built-in name, or the file's name without ``.toml``."""
    return Path(source).stem


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and validate a run file.

    ``source`` is a built-in name (see :func:`builtin_names`) or a path. Each override is ``table.key=value``, the
    value in TOML (``0.01``, ``true``, ``[0.6, 0.2, 0.2]``), any other text being a plain string, and ``none`` unsetting
    an optional key. Raises :class:`ConfigError`.
    """
    values = upgraded(read_tables(source), assumed=FORMAT)
    for override in overrides:
        _apply(values, override)
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Validate plain nested values, as read from TOML. Raises :class:`ConfigError`."""
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, values)) from None


def with_run(config: RunConfig, **values: Any) -> RunConfig:
    """Return the configuration with values of its [run] table replaced.

    Raises:
        ConfigError: If they do not fit the rest of it.
    """
    tables = config.model_dump()
    return config_from_dict({**tables, "run": {**tables["run"], **values}})


def dump(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain values with their format, for :func:`upgraded`. Unset optional keys are left
    out."""
    return {"format": FORMAT, **config.model_dump(mode="json", exclude_none=True)}


def of_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values without the tables of other methods, which say nothing of this run."""
    method = values["run"]["method"]
    return {table: keys for table, keys in values.items() if TABLE_OF_METHOD.get(table, method) == method}


def dump_toml(config: RunConfig) -> str:
    """:func:`dump` as TOML: loading the text gives ``config`` again."""
    import tomli_w

    return tomli_w.dumps(dump(config))


def reference() -> str:
    """docs/reference/configuration.md: a table of every key with its default, accepted values and meaning."""
    lines = ["# The run file", "", "Every key of a run file. `--set table.key=value` overrides one; "
             "`fedms run NAME --dry-run` prints all as they are then.", "",
             "| key | default | accepted | meaning |", "| --- | --- | --- | --- |"]
    for table, keys in _keys().items():
        for key, field in keys.items():
            default = "unset" if field.default is None else _show(field.default)
            lines.append(f"| `{table}.{key}` | `{default}` | {_accepted(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


# Reading

def read_tables(source: str | Path) -> dict[str, Any]:
    """The plain values of a run file, not validated. Raises :class:`ConfigError`."""
    path = Path(source)
    if isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9_-]+", source) and not path.is_file():
        path = RUNFILES / f"{source}.toml"
        if not path.is_file():
            raise ConfigError(f"{source}: no such built-in run file and no such file; "
                              f"built in: {', '.join(builtin_names())}{_did_you_mean(source, builtin_names())}")
    try:
        return parse_toml(read_regular(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a run file or a built-in name "
                          f"({', '.join(builtin_names())})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a run file (TOML)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a run file is TOML") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        hint = _suggest_key(parts[0]) if equals and len(parts) == 1 else ", for example --set stage1.lr=0.002"
        raise ConfigError(f"--set {override}: expected table.key=value{hint}")
    text = text.strip()
    if text.lower() == "none":
        value = None
    else:
        try:
            value = parse_toml(f"value = {text}")["value"]
        except ValueError:
            value = text
    if not isinstance(value, str) and value is not None and _is_text(parts[0], parts[1]):
        value = [item if isinstance(item, str) else str(item) for item in value] if isinstance(value, list) else text
    table = values.setdefault(parts[0], {})
    if not isinstance(table, dict):
        raise ConfigError(f"{parts[0]}: got {_show(table)}; accepted: a table [{parts[0]}]")
    table[parts[1]] = value


def _is_text(table: str, key: str) -> bool:
    """Whether a key holds text, or a list of texts, so that 2020 or true is a word there."""
    field = _keys().get(table, {}).get(key)
    return field is not None and not {int, float, bool, dict} & _atoms(field.annotation) and str in _atoms(field.annotation)


def _atoms(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of; those of the values for a Literal."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin is None:
        return {annotation}
    arguments = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return set().union(*map(_atoms, arguments))


# What older versions wrote

FORMAT = 2


def _name_the_samples_of_the_gate(tables: dict[str, Any]) -> None:
    """Format 2 says what the gate of fedms_plus is trained on. Folders of format 1 name no format; in the first ones
    fedms_plus had no table, and the mean and the models' own temperature were set where they now are unset."""
    gate, plus, model, aggregate, run = (t if isinstance(t := tables.get(name), dict) else {}
                                         for name in ("gate", "plus", "model", "aggregate", "run"))
    if "held_out" in gate:
        plus = {"held_out": gate.pop("held_out"), "prior": "off", "prior_in_stage1": False, "confidences": False}
        if aggregate.get("rule") == "mean":
            del aggregate["rule"]
        if model.get("temperature") == 0.05:
            del model["temperature"]
    if "held_out" in plus and "gate_on" not in plus:
        share = plus.pop("held_out")
        plus |= {"gate_on": "held_out", "held_out": share} if share else {"gate_on": "training"}
    if run.get("method") == "fedms_plus":
        tables["plus"] = plus
    else:
        tables.pop("plus", None)        # nothing that another method reads


# From each older format a function that turns its tables into the next one's, in place. A new key needs none where its
# default is what was done before.
_UPGRADES: dict[int, Callable[[dict[str, Any]], None]] = {1: _name_the_samples_of_the_gate}


def upgraded(values: Mapping[str, Any], assumed: int = 1) -> dict[str, Any]:
    """Tables as a run file or :func:`dump` has them, with today's keys, without their ``format``.

    ``assumed`` is the format of values that name none: 1 of what was recorded, :data:`FORMAT` of what people write.
    Raises :class:`ConfigError` for a format that is not known.
    """
    tables = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    version = tables.pop("format", assumed)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ConfigError(f"format: got {_show(version)}; accepted: 1 to {FORMAT}. A newer version of fedms may have "
                          "written it: update fedms")
    for older in range(version, FORMAT):
        _UPGRADES[older](tables)
    return tables


# Explaining what is wrong

def _keys() -> dict[str, dict[str, Any]]:
    return {name: field.annotation.model_fields for name, field in RunConfig.model_fields.items()}


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "value_error" and not item["loc"]:
            return str(item["ctx"]["error"]).split("\n")
        key, field, value = _locate(item, values)
        if item["type"] == "extra_forbidden":
            lines[key] = f"{key}: unknown key{_suggest_key(key)}"
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing; accepted: {_accepted(field)}"
        elif field is None:
            lines[key] = f"{key}: got {_show(value)}; accepted: a table [{key}] with keys {_key_list(key)}"
        else:
            words = _literals(field.annotation)
            hint = _did_you_mean(value, words) if isinstance(value, str) else ""
            lines[key] = f"{key}: got {_show(value)}; accepted: {_accepted(field)}{hint}"
    return list(lines.values())


def _locate(item: Mapping[str, Any], whole: Any) -> tuple[str, Any, Any]:
    """Dotted key, field and value of an error in the run file ``whole``; pydantic's location goes on into branches of
    unions and items of lists, which we drop."""
    key = ""
    field: Any = None
    model: type[BaseModel] | None = RunConfig
    for part in item["loc"]:
        if isinstance(part, int) and field is not None and Budget in get_args(field.annotation):
            key, model = f"{key}[{part}]", Budget
        elif model is not None and part in model.model_fields:
            field = model.model_fields[part]
            key = f"{key}.{part}" if key else str(part)
            is_table = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            model, field = (field.annotation, None) if is_table else (None, field)
        elif item["type"] == "extra_forbidden":
            return (f"{key}.{part}" if key else str(part)), None, None
        else:
            break
        if isinstance(whole, Mapping) and part in whole or isinstance(part, int):
            whole = whole[part]
    return key, field, whole


def _suggest_key(key: str) -> str:
    keys = _keys()
    if key.startswith("clients.budgets["):
        return f"; accepted: {', '.join(Budget.model_fields)}"
    table, _, name = key.partition(".")
    if not name or table not in keys:
        everywhere = [f"{t}.{k}" for t, fields in keys.items() for k in fields if k == key]
        return f"; did you mean {' or '.join(everywhere)}?" if everywhere else (
            _did_you_mean(key, keys, prefix="[", suffix="]") or f"; tables: {', '.join(keys)}")
    if near := difflib.get_close_matches(name, keys[table], n=1):
        return f"; did you mean {table}.{near[0]}?"
    elsewhere = [f"{t}.{k}" for t, fields in keys.items() for k in fields if k == name]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else f"; keys of [{table}]: {_key_list(table)}"


def _key_list(table: str) -> str:
    return ", ".join(_keys().get(table, Budget.model_fields))


def _did_you_mean(word: str, words: Iterable[str], prefix: str = "", suffix: str = "", cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{near[0]}{suffix}?" if near else ""


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [v for v in get_args(annotation) if isinstance(v, str)]
    return [word for part in get_args(annotation) for word in _literals(part)]


def _accepted(field: Any) -> str:
    """Accepted values of a field in words, from its annotation and bounds."""
    return _type_in_words(field.annotation, field.metadata)


def _type_in_words(annotation: Any, metadata: Iterable[Any] = (), many: bool = False) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if any(isinstance(m, BeforeValidator) for m in metadata):
        return 'a size such as "2GiB" or "500MB", or a number of bytes'
    if origin is Annotated:
        return _type_in_words(args[0], args[1:], many)
    if origin is Literal:
        return _words(args)
    if origin in (Union, types.UnionType):
        return "; or ".join("unset" if a is type(None) else _type_in_words(a, metadata) for a in args)
    if origin is tuple:
        if args[0] is Budget:
            return f"a list of tables with keys {', '.join(Budget.model_fields)}; share is required"
        length = next((f"{m.max_length} " for m in metadata if getattr(m, "max_length", None)), "")
        return f"a list of {length}{_type_in_words(args[0], (), True)}"
    nouns = {bool: "true or false", int: "integer", float: "number", str: "string"}
    if annotation is bool:
        return nouns[bool]
    noun = nouns[annotation] + "s" if many else f"{'an' if annotation is int else 'a'} {nouns[annotation]}"
    words = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    bounds = [text.format(_show(getattr(m, name))) for m in metadata for name, text in words.items()
              if getattr(m, name, None) is not None]
    return ", ".join([noun, *bounds])


def _words(values: Iterable[Any]) -> str:
    return ", ".join(_show(v) for v in values)


def _show(value: Any) -> str:
    """A value as it would stand in the run file."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_show(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(printable(value), ensure_ascii=False)
    return printable("true" if value is True else "false" if value is False else str(value))

