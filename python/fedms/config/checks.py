"""What one table of a run file asks of another."""

from __future__ import annotations

from collections.abc import Iterable

from fedms.config import registry
from fedms.config.problems import did_you_mean, in_words, show
from fedms.config.run_config import RunConfig


def problems_of(c: RunConfig) -> Iterable[str]:
    """Yield the problems that no single key shows, one line each, starting with the key to change."""
    yield from _model_and_data_problems(c)
    if c.sal.queue % 2:
        yield f"sal.queue: got {c.sal.queue}; accepted: an even number, as its two halves are compared"
    if c.sal.max_depth is not None and c.sal.depth > c.sal.max_depth:
        yield f"sal.depth: got {c.sal.depth}, above sal.max_depth = {c.sal.max_depth}"
    if not isinstance(c.sal.order, str) and len(set(c.sal.order)) < len(c.sal.order):
        yield f"sal.order: got {show(c.sal.order)}; a block is named twice"
    if c.stage1.rounds + c.stage2.rounds == 0:
        yield "stage1.rounds: 0 in both stages leaves nothing to train"
    if c.gate.mixing == "layers" and c.gate.features != "prefix":
        yield ('gate.features: mixing = "layers" decides before the first mixed layer, so it cannot see '
               f'{show(c.gate.features)} features; set gate.features to "prefix"')
    if c.clients.count is not None and c.clients.min > c.clients.count:
        yield f"clients.min: got {c.clients.min}, above clients.count = {c.clients.count}"
    for name in ("stage1", "stage2"):
        stage = getattr(c, name)
        if stage.micro_batch is not None and stage.micro_batch > stage.batch:
            yield f"{name}.micro_batch: got {stage.micro_batch}, above {name}.batch = {stage.batch}"
    if c.run.workers > 1 and c.run.engine != "local":
        yield f'run.workers: got {c.run.workers}, but run.engine = {show(c.run.engine)} has processes of its own; leave it out'
    if c.run.workers > 1 and c.clients.asynchronous:
        yield (f"run.workers: got {c.run.workers}, but with clients.asynchronous = true clients are visited one by one, in the order in "
               "which they answer; leave it out")
    yield from _lockstep_problems(c)
    yield from _task_problems(c)
    yield from _method_problems(c)
    yield from _privacy_problems(c)
    yield from _asynchronous_problems(c)
    if c.clients.spread and not any(b.has_clock for b in c.clients.budgets):
        yield ("clients.spread: no class of clients.budgets has flops or a bandwidth that it could act on")
    for key in ("clients.load", "sal.visit_seconds"):
        table, _, name = key.partition(".")
        if getattr(getattr(c, table), name) and not any(tier.flops for tier in c.clients.budgets):
            yield f"{key}: no class of clients.budgets has flops, a speed that it could act on"
    if c.clients.budgets and abs(sum(b.share for b in c.clients.budgets) - 1) > 1e-9:
        yield (f"clients.budgets: the shares sum to {sum(b.share for b in c.clients.budgets):g}; "
               "accepted: shares that sum to 1")


def _lockstep_problems(c: RunConfig) -> Iterable[str]:
    if c.run.lockstep == 1:
        return
    together = f"with run.lockstep = {c.run.lockstep}"
    if c.run.engine != "local":
        yield (f"run.lockstep: got {c.run.lockstep}, but with run.engine = {show(c.run.engine)} clients have models of their own; "
               "leave it out")
    if c.run.workers > 1:
        yield f"run.workers: got {c.run.workers}; {together} one process visits the clients; leave one of the two out"
    if c.clients.asynchronous:
        yield f"clients.asynchronous: {together} clients answer together; leave one of the two out"
    if c.run.graphs:
        yield f"run.graphs: a step of several clients is no CUDA graph; {together} set it to false"
    if c.lora.dropout:
        yield (f"lora.dropout: got {c.lora.dropout:g}; {together} a step would have one mask for all clients, and each draws from its "
               "own seed; set it to 0")
    if c.data.augment:
        yield f"data.augment: got {show(c.data.augment)}; {together} images cannot be varied at each client's own seed; leave it out"
    if c.run.dtype == "fp16":
        yield f'run.dtype: "fp16" scales the loss of each client by itself; {together} use "bf16" or "fp32"'


def _model_and_data_problems(c: RunConfig) -> Iterable[str]:
    """Yield the problems of the tables [model] and [data]."""
    model, data_set = registry.models().get(c.model.id), registry.data_sets().get(c.data.name)
    reads, holds = model and model.reads, data_set and data_set.holds
    if model is None and (hint := did_you_mean(c.model.id, registry.models(), cutoff=0.8)):
        yield f"model.id: got {show(c.model.id)}, which is no built-in model{hint}"
    if data_set is None and (hint := did_you_mean(c.data.name, registry.data_sets(), cutoff=0.8)):
        yield f"data.name: got {show(c.data.name)}, which is no built-in data set{hint}"
    if reads and holds and reads != holds:
        yield (f"data.name: {show(c.data.name)} holds {holds}, but model.id {show(c.model.id)} reads {reads}; accepted "
               f"with it: {in_words(row.name for row in registry.data_sets().values() if row.holds == reads)}, or data of your own")
    if c.model.head == "text" and model is not None and not model.text_head:
        yield (f'model.head: "text" needs a model that embeds class prompts; with model.id {show(c.model.id)} use '
               '"linear"')
    for table, names in (("model", ("pooling", "blocks", "trust_remote_code")),
                         ("data", ("text", "image", "label", "client", "classes", "prompt", "delimiter", "encoding", "quoting",
                                   "empty", "subset", "part"))):
        values, builtin = getattr(c, table), reads if table == "model" else holds
        for name in names:
            if builtin and getattr(values, name) != type(values).model_fields[name].default:
                yield f"{table}.{name}: {table}.{'id' if table == 'model' else 'name'} is built in, so this is given"
    if holds is None and c.data.path is not None:
        yield "data.path: is for the built-in data sets; name your own file or folder in data.name"
    if c.data.classes is not None and len(set(c.data.classes)) < len(c.data.classes):
        yield f"data.classes: got {show(c.data.classes)}; a class is named twice"
    if c.data.delimiter is not None and (len(c.data.delimiter) != 1 or c.data.delimiter in '"\r\n\0'):
        yield f'data.delimiter: got {show(c.data.delimiter)}; accepted: one character, such as ";" or "\\t"'
    if not _is_encoding(c.data.encoding):
        yield f'data.encoding: got {show(c.data.encoding)}; accepted: a text encoding, such as "utf-8", "cp1252" or "utf-16"'
    if c.data.prompt is not None and c.data.prompt.count("{}") != 1:
        yield f"data.prompt: got {show(c.data.prompt)}; accepted: a text with one {{}}, where the class name goes"
    if c.model.learn_temperature and c.model.head != "text":
        yield 'model.learn_temperature: only the text head has a temperature; set model.head to "text"'
    if c.data.partition in ("natural", "own", "domains") and data_set is not None and not data_set.has_groups:
        yield (f'data.partition: {show(c.data.partition)} needs a data set with domains and {show(c.data.name)} has '
               'none; accepted: "dirichlet", "classes", "quantity", "iid"')
    if c.data.partition == "own":
        for name, off in (("global_test", 0), ("max_samples", None)):
            if getattr(c.data, name) != off:
                yield (f"data.{name}: got {getattr(c.data, name)}; with partition \"own\" nobody but a client itself divides its "
                       f"data; set it to {'none' if off is None else off}")
    if min(c.data.split) <= 0 or abs(sum(c.data.split) - 1) > 1e-9:
        yield (f"data.split: got {show(c.data.split)}, which sums to {sum(c.data.split):g}; "
               "accepted: three numbers above 0 that sum to 1")


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
        return True
    except (LookupError, ValueError):
        return False


def _task_problems(c: RunConfig) -> Iterable[str]:
    model, data_set = registry.models().get(c.model.id), registry.data_sets().get(c.data.name)
    reads, holds = model and model.reads, data_set and data_set.holds
    yield from _choice_problems(c)
    if c.task.kind == "classification":
        if reads == "conversations":
            yield f'task.kind: model.id {show(c.model.id)} is a causal language model; set task.kind to "causal_lm"'
        for key in ("messages", "question", "answer", "category"):
            if getattr(c.data, key) is not None:
                yield f'data.{key}: task.kind "classification" does not read it; set task.kind to "causal_lm", or leave it out'
        return
    if reads not in (None, "conversations"):
        readers = in_words(row.name for row in registry.models().values() if row.reads == "conversations")
        yield (f'model.id: task.kind "causal_lm" needs a causal language model, and {show(c.model.id)} reads {reads}; accepted: '
               f'{readers}, a folder, a hub id or a .gguf file')
    if holds not in (None, "conversations"):
        yield f"data.name: {show(c.data.name)} holds {holds} with labels, which task.kind \"causal_lm\" does not learn"
    if (reason := c.method_row.not_for_tokens) is not None:
        yield f"run.method: {c.run.method} is not for task.kind \"causal_lm\": {reason}"
    if c.model.head == "text":
        yield 'model.head: "text" are class prompts, which task.kind "causal_lm" has none of; leave it out'


def _choice_problems(c: RunConfig) -> Iterable[str]:
    asked = f"task.choices: got {c.task.choices}"
    if c.task.choices == 1:
        yield f"{asked}, among which there is nothing to choose; accepted: 0 for no choices, or 2 and more"
    if not c.task.choices:
        return
    if c.task.kind != "causal_lm":
        yield f'{asked}, but task.kind {show(c.task.kind)} has no answers in words; set it to 0'
    own_text = c.data.name not in registry.data_sets() and c.data.messages is None and c.data.question is None
    if c.data.loss_on == "all" or own_text:
        yield f"{asked}, but without prompts (plain text, or data.loss_on = \"all\") no answer can be told from them; set it to 0"
    if c.privacy.mode != "off":
        yield f"{asked}, but with privacy.mode = {show(c.privacy.mode)} no client reports its choices; set it to 0"


def _method_problems(c: RunConfig) -> Iterable[str]:
    row, rule = c.method_row, c.aggregation
    if row.needs_linear_head and c.model.head != "linear":
        yield f'model.head: {row.name} gives each client a head of its own; got {show(c.model.head)}, accepted: "linear"'
    if row.aggregation not in (None, rule):
        yield f'aggregate.rule: got {show(rule)}, but {row.name} is the method of the rule "{row.aggregation}"; leave it unset'
    yield from row.check(c)
    if rule == "exact" and c.model.frozen != "fp32":
        yield (f'aggregate.rule: "exact" adds to the frozen weights, which model.frozen = {show(c.model.frozen)} '
               'quantizes; set model.frozen to "fp32"')
    for number, tier in enumerate(c.clients.budgets):
        if tier.rank is not None and rule != "svd":
            yield f"clients.budgets[{number}].rank: is for the method flexlora; {row.name} trains all of each pair; leave it out"
        elif tier.rank is not None and tier.rank > c.lora.rank:
            yield f"clients.budgets[{number}].rank: got {tier.rank}, above lora.rank = {c.lora.rank}"
    if rule == "krum" and c.clients.count is not None and c.clients.sampled < 2 * c.aggregate.byzantine + 3:
        yield (f"aggregate.byzantine: got {c.aggregate.byzantine}, for which krum needs "
               f"{2 * c.aggregate.byzantine + 3} replies a round, and {c.clients.sampled} clients are sampled")


def _asynchronous_problems(c: RunConfig) -> Iterable[str]:
    if not c.clients.asynchronous:
        for key in ("buffer", "arrivals"):
            if getattr(c.clients, key) is not None:
                yield f"clients.{key}: acts on buffered rounds alone; set clients.asynchronous to true, or leave it unset"
        return
    if c.privacy.mode != "off":
        why = ("masks cancel only in the sum over all clients of a round, and a buffered round goes on without some" if c.privacy.masks
               else "epsilon is computed for rounds whose clients are drawn anew, and a buffered round waits for the fastest")
        yield f"clients.asynchronous: with privacy.mode = {show(c.privacy.mode)} it is refused: {why}; set it to false"
    if c.aggregation not in ("mean", "freeze_a"):
        why = "multiplies" if c.aggregation in ("exact", "svd") else "compares"
        yield (f"clients.asynchronous: aggregate.rule {show(c.aggregation)} {why} tensors of replies to one message, and those of a "
               'buffered round answer several; set it to false, or the rule to "mean"')
    if c.run.engine == "flower-sim":
        yield ('clients.asynchronous: in a simulation clients answer in an order that cannot be repeated; set run.engine to "local", '
               "which draws the order from run.seed")
    if c.clients.arrivals is not None and c.run.engine != "local":
        yield f'clients.arrivals: with run.engine {show(c.run.engine)} clients arrive when they do; leave it unset'


FEWEST_TO_MASK = 3      # with two clients, each learns the other's update from the sum


def _privacy_problems(c: RunConfig) -> Iterable[str]:
    p = c.privacy
    if p.mode == "off":
        yield from _unprotected(c)
        return
    mode = f"privacy.mode = {show(p.mode)}"
    yield from _noise_problems(c, mode)
    if c.aggregation not in ("mean", "freeze_a"):
        why = ("adds products of single updates, whose size the clip does not bound" if c.aggregation in ("exact", "svd") else
               "compares single updates, and there are none to compare")
        yield f'aggregate.rule: {show(c.aggregation)} {why} with {mode}; set it to "freeze_a" (recommended) or "mean"'
    if c.aggregate.weights != "uniform":
        yield (f"aggregate.weights: got {show(c.aggregate.weights)}; with {mode} the number of a client's samples is not sent, "
               'and its weight would be its influence; set it to "uniform"')
    if c.clients.max_change != type(c.clients).model_fields["max_change"].default:
        yield (f"clients.max_change: looks at single updates; with {mode} privacy.clip bounds each one already; leave it unset")
    if any(tier.memory is not None for tier in c.clients.budgets):
        yield (f"clients.budgets: memory is turned into a depth by the data of the largest client, which {mode} must not show; "
               "give max_depth instead")
    if c.sal.has_budget:
        yield (f"sal.visit_flops, sal.visit_seconds: a budget is turned into a depth by the data of the largest client, which {mode} must "
               "not show; give max_depth in clients.budgets instead")
    if p.masks and c.clients.count is not None and c.clients.sampled < FEWEST_TO_MASK:
        yield (f"clients.fraction: {c.clients.sampled} clients are sampled each round; with {mode} a sum needs at least "
               f"{FEWEST_TO_MASK}, or clients could compute each other's updates; raise it or clients.count")
    if p.masks and c.clients.count is not None and c.clients.sampled * 2**p.bits >= 2**30:
        yield (f"privacy.bits: got {p.bits}; with {c.clients.sampled} clients a round the sum would not fit into 32 bits; accepted "
               f"here: up to {29 - c.clients.sampled.bit_length() + 1}")


def _unprotected(c: RunConfig) -> Iterable[str]:
    """Yield a problem if a budget or a noise is set and the mode was left out. A mode that says "off" is meant so."""
    named = [f"privacy.{key}" for key in ("epsilon", "noise") if getattr(c.privacy, key) is not None]
    if named and "mode" not in c.privacy.model_fields_set:
        yield (f'privacy.mode: unset, so {" and ".join(named)} would protect nobody; set it to "central" or "distributed", or to "off" if '
               "no protection is meant")


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
    if p.adds_noise and c.method_row.sends_counts and p.count_noise == "off":
        yield (f"privacy.count_noise: {c.run.method} sums up the clients' class counts, which need noise of their own with {mode}; "
               "set it (for example 10), or choose another method")
    if p.sampling == "poisson" and p.mode != "central":
        yield (f'privacy.sampling: "poisson" hides who takes part; with {mode} the clients of a round and the server must know each '
               'other; set it to "fixed", or privacy.mode to "central"')
    if p.sampling == "poisson" and c.clients.min != 1:
        yield 'clients.min: with privacy.sampling = "poisson" each client is drawn by itself, so there is no least number; leave it unset'
