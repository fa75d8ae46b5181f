"""The tables of a run file that every run has; each key says what it means. The tables of single methods are in
`catalogue`."""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

import annotated_types
from pydantic import Field

from fedms.config import registry
from fedms.config.table import FilePath, OneOf, Rate, Size, Table


class ModelTable(Table):
    """The frozen foundation model and its head."""

    id: str = Field("minilm", min_length=1, description="foundation model: built in are "
                    "minilm, smollm2, vit-digits, vit-digits-pretrained, vit-fashion, vit-small; else the name of one that is "
                    "registered, a folder in Hugging Face's format, or a hub id such as org/name")
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto", description="how the tokens of a model that is not built in become features; auto: as such models are "
        "used (sentence encoders and encoders mean, decoders the last token, vision models their own)")
    blocks: Optional[str] = Field(
        None, description="dotted name of the list of transformer blocks in a model that is not built in; unset: found "
        "by inspection")
    trust_remote_code: bool = Field(False, description="run code that comes with the model's repository")
    frozen: Literal["fp32", "bf16", "fp16", "int8", "int8_rotated", "nf4", "int4"] = Field(
        "fp32", description="storage of the frozen Linear weights; on a CPU int8, nf4 and int4 compute in int8, bf16 and "
        "fp16 in fp32; int8_rotated: int8 for models of which some activations are far larger than others, such as language "
        "models; a GPU does not round activations, and stores int8; fp32 weights are held in the 16 bits of run.dtype, as they are rounded "
        "to these in any case")
    full_precision: tuple[str, ...] = Field(
        (), description="Linear layers whose frozen weights are not quantized, by the end of their names; for layers whose rounding "
        "changes the predictions most")
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
                      "sentiment, digits, fashion-mnist, dictionaries, projects; else the name of one that is registered, a "
                      "file or a folder of .csv, .tsv, .parquet or .jsonl, a folder of images, or a hub id")
    path: Optional[FilePath] = Field(
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
    empty: Literal["error", "drop"] = Field(
        "error", description="what becomes of rows of a table in which a needed cell (text or image, label, client) is empty; "
        "drop: training leaves them out, and says how many; prediction refuses them always")
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
    partition: Literal["natural", "own", "dirichlet", "domains", "classes", "quantity", "iid"] = Field(
        "natural", description="natural: client i draws from domain i mod domains; own: client i has all of group i, "
        "divided by the group's name, as where each client brings its own "
        "data; dirichlet: skewed classes; domains: "
        "skewed domains; classes: a few classes a client; quantity: skewed sizes; iid: evenly at random")
    alpha: float = Field(0.3, gt=0, description="concentration of the partitions dirichlet, domains and quantity; small "
                         "is skewed")
    classes_per_client: int = Field(2, ge=1, description="classes a client of the partition classes")
    split: Annotated[tuple[float, ...], annotated_types.Len(3, 3)] = Field(
        (0.6, 0.15, 0.25), description="train, validation, test shares of each client; they sum to 1")
    min_samples: int = Field(0, ge=0, description="least samples of a client; those with fewer are given some of the largest "
                             "client, at random")
    stratify: bool = Field(True, description="each client's training, validation and test samples have the same shares of its "
                           "classes; off: they are drawn at random, so that shares differ by chance")
    global_test: float = Field(0.1, ge=0, lt=1, description="share held out of every client as a common test set")


class TaskTable(Table):
    """What is learned."""

    kind: Literal["classification", "causal_lm"] = Field(
        "classification", description="classification: one label a sample; causal_lm: the next token, with a causal language "
        "model")
    choices: int = Field(
        0, ge=0, le=64, description="causal_lm: each client's model is asked in the end to find a test sample's own answer among so many, "
        "the others being those of its other test samples; 0: it is not asked")


class HeadTable(Table):
    """The frozen head of a causal language model."""

    dtype: Literal["fp32", "int8", "int8_rotated"] = Field(
        "fp32", description="what the logits are computed in, int8 and int8_rotated as model.frozen has them; forward alone, the "
        "gradient comes from the full weight")
    chunk: int = Field(128, ge=1, description="positions whose logits exist at the same time")


class LoraTable(Table):
    """The shape of every LoRA pair."""

    rank: int = Field(8, ge=1, le=1024, description="rank r of each pair")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the LoRA branch")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    start: Optional[FilePath] = Field(
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
    visit_flops: Optional[float] = Field(
        None, gt=0, description="most operations of a visit: a client trains as many of the active blocks as the cost model finds "
        "room for, and one at least; by a visit of stage 1 of the client with the most data")
    visit_seconds: Optional[float] = Field(
        None, gt=0, description="most seconds of a visit's computing on a client's own device, at the speed that it has in that round; "
        "likewise. Needs flops in clients.budgets")
    cache: Literal["memory", "disk", "off"] = Field(
        "memory", description="where what is constant for a sample is kept: the prefix's outputs, the frozen expert's "
        "logits, the gate's features; disk: in the cache folder, for later runs too")
    cache_dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="storage of the prefix's outputs; fp32 is exact")
    cache_bytes: Size = Field(
        2 * 1024**3, description='most that the cache may hold, e.g. "2GiB"')
    cache_ahead: bool = Field(
        True, description="whether the first pass of samples through the frozen blocks also keeps the outputs that later rounds "
        "may start from, when more blocks are active or frozen pairs have changed; they take at most half of cache_bytes for each "
        "set of samples")

    @property
    def has_budget(self) -> bool:
        """Whether there is a budget of a visit."""
        return self.visit_flops is not None or self.visit_seconds is not None


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
    keep: Literal["best", "last"] = Field(
        "best", description="what of a client's own is kept: of what it had and what each epoch left, the best on validation; or "
        "the last")
    decay: Literal["off", "linear"] = Field(
        "off", description="linear: the rate of what is a client's own falls from lr in the first round toward 0 after the last")


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


class Budget(Table):
    """One class of devices: the share of clients in it, and what such a device can do; unset: no limit."""

    share: float = Field(gt=0, le=1, description="share of the clients")
    max_depth: Optional[int] = Field(None, ge=1, description="most blocks such a client trains")
    memory: Optional[Size] = Field(
        None, description="bytes for weights, cached features and a training step; limits the depth by the cost model")
    rank: Optional[int] = Field(
        None, ge=1, description="most of each pair's rank that such a client trains, by the method flexlora")
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
    load: float = Field(0.0, ge=0, le=2, description="how much a device's speed varies from round to round, as where it has other work: "
                        "standard deviation of its logarithm, drawn anew for each round")
    round_timeout: float = Field(600.0, gt=0, description="seconds in which a client must answer; engine local waits "
                                 "for every client")
    quorum: float = Field(0.0, ge=0, le=1, description="least share of a round's clients whose replies must count; "
                          "with fewer the run stops, and can be resumed")
    join_timeout: Optional[float] = Field(
        None, gt=0, description="seconds to wait for a client whose node is away, once; from then on it is only looked at. "
        "unset: clients.round_timeout")
    asynchronous: bool = Field(
        False, description="buffered rounds (FedBuff): a round goes on after clients.buffer replies; who is slower counts in a "
        "later one, its change divided by the root of 1 + the rounds that went by")
    buffer: Optional[int] = Field(None, ge=1, description="asynchronous: replies after which a round goes on. unset: half of "
                                  "the clients that are at work at a time, rounded up")
    arrivals: Optional[FilePath] = Field(
        None, description="asynchronous, engine local: run folder whose order of arrivals is repeated. unset: drawn from "
        "run.seed")
    max_change: float = Field(2.0, gt=0, description="a reply is refused in which a tensor changed by more than this many "
                              "times what a visit's training can change: learning rate, times steps, times the root of "
                              "the number of its elements")
    optimizer: Literal["fresh", "kept"] = Field("fresh", description="optimizer state at each visit")

    @property
    def sampled(self) -> int:
        """Clients sampled each round, of `CLIENTS` where the number is not known yet."""
        return self.sampled_of(self.count or CLIENTS)

    def sampled_of(self, count: int) -> int:
        """Clients sampled each round where `count` take part."""
        return min(count, max(self.min, int(self.fraction * count + 0.5)))

    @property
    def awaited(self) -> int:
        """Replies that a round waits for, of `CLIENTS` where the number is not known yet."""
        return self.awaited_of(self.count or CLIENTS)

    def awaited_of(self, count: int) -> int:
        """Return the number of replies that a round waits for if `count` clients take part."""
        sampled = self.sampled_of(count)
        if not self.asynchronous:
            return sampled
        return min(sampled, (sampled + 1) // 2 if self.buffer is None else self.buffer)


class AggregateTable(Table):
    """How replies are combined."""

    rule: Optional[Literal["mean", "exact", "freeze_a", "svd", "median", "trimmed_mean", "krum"]] = Field(
        None, description="mean: A and B averaged apart; exact: what that loses is added to the frozen weights; freeze_a: "
        "A stays as drawn, B is averaged; svd: the mean of the products, factored anew; median, trimmed_mean: by element; krum: the "
        "one reply nearest to the others. unset: the method's, else mean")
    weights: Literal["samples", "uniform"] = Field(
        "samples", description="weight of a client's reply; median, trimmed_mean and krum count each once")
    trim: float = Field(0.1, ge=0, lt=0.5, description="rule trimmed_mean: share of the values cut at either end")
    byzantine: int = Field(1, ge=0, description="rule krum: replies that may be hostile; 2 more than twice as many are "
                           "needed each round")


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
    key: FilePath = Field("privacy.key", min_length=1, description="file of 32 secret bytes, readable by its owner alone, from "
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


NumberedGPU = Annotated[str, Field(pattern=r"^cuda:\d{1,3}$", examples=["cuda:1"])]


class RunTable(Table):
    """How the run itself is carried out."""

    method: Annotated[str, OneOf(registry.method_names)] = Field(registry.RECOMMENDED, description="algorithm")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="every random draw comes from this seed")
    threads: int = Field(2, ge=1, description="CPU threads; records repeat byte for byte at a fixed number")
    engine: Literal["local", "flower-sim", "flower"] = Field(
        "local", description="local: all clients in this process; flower-sim: Flower's simulation on this machine; "
        "flower: clients on machines of their own")
    workers: int = Field(
        1, ge=1, le=1024, description="processes that visit the clients of a round side by side with engine local, each with a model "
        "of its own, run.threads threads and, with device cuda or auto, one of the GPUs in turn; 1: this process visits them. "
        "Records do not depend on it")
    lockstep: int = Field(
        1, ge=1, le=1024, description="clients of a round that are trained side by side on one model with engine local: they share the "
        "frozen products and the launches of a step; results agree with those of 1 within rounding; 1: one after the other")
    device: Union[Literal["auto", "cpu", "cuda", "mps"], NumberedGPU] = Field(
        "auto", description="where models compute; auto: the first CUDA GPU whose kernels pass a self-check, else the CPU; cuda: "
        "the first GPU; cuda:N: the one with this number, from 0. Messages, checkpoints and records do not depend on it")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="activations of the foundation model, and its frozen Linear weights where model.frozen does not quantize them; "
        "experts, norms, embeddings, optimizer and sums are in fp32 in any case")
    graphs: bool = Field(False, description="on a CUDA GPU, training steps whose shapes repeat are launched as CUDA graphs: less work "
                         "for the CPU, more memory of the GPU; ignored on other devices")
