"""How fast the package is, beside transformers: same weights, same inputs, equal outputs first.

Chapter 14 builds this module. Every row of the table is one piece of work. Each contender does
it once to show that its numbers agree; where they do not, nothing is timed. Then all contenders
do it in turn, round after round, with the machine's matrix product rate measured in between: what
slows the machine for a minute slows them all, and a ratio is taken within its round. Counted is
the work that the texts need, without padding and without pairs outside of a window; memory is
the peak of a process of its own.
"""

import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from . import __version__, heads, model
from .atomic import writing
from .config import ModernBertConfig
from .pretraining import IGNORED, processor_name, utc_now
from .sources import find_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "modernbert-mini"
SEED = 0  # of weights, ids, labels and the order of texts
# The largest difference of a token's vector, as a share of that vector's length. Float32 keeps
# 24 bits of a number, float16 11 and bfloat16 8; the layers of a model add up what they lose.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What the published configs state, as far as it differs from the defaults of ModernBertConfig;
# https://huggingface.co/answerdotai/ModernBERT-base, …/jhu-clsp/ettin-encoder-17m: config.json.
PUBLISHED = {
    "base": {"classifier_pooling": "mean"},
    "17m": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "local_rope_theta": 160_000.0,
        "max_position_embeddings": 7999,
        "classifier_pooling": "mean",
    },
}
SHAPES = (*PUBLISHED, "mini")


def shape_config(shape: str) -> ModernBertConfig:
    """The sizes of a model: "base", "17m", or "mini", those of the embedded checkpoint."""
    if shape == "mini":
        return ModernBertConfig.from_file(find_folder("mini") / "config.json")
    return ModernBertConfig(**PUBLISHED[shape])


# --- the work ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
        name: for the command line.
        title: for the table.
        task: "encode" (hidden states), "score" (logits at the hidden tokens) or "train" (loss,
            gradients and an update of AdamW).
        lengths: tokens of each text.
    """

    name: str
    title: str
    task: Literal["encode", "score", "train"]
    lengths: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        """Whether a batch of these texts holds padding."""
        return len(set(self.lengths)) > 1


def skewed_lengths(
    texts: int, longest: int, median: float = 100, deviation: float = 0.9
) -> tuple[int, ...]:
    """Lengths as real texts have them: many short ones, a few long ones.

    The quantiles of a log-normal distribution, so that nothing hangs on a lucky draw.

    Args:
        texts: how many.
        longest: where lengths are cut, in tokens.
        median: in tokens.
        deviation: standard deviation of the lengths' natural logarithm.

    Returns:
        ``texts`` lengths, in an order that ``SEED`` gives.
    """
    law = statistics.NormalDist(math.log(median), deviation)
    lengths = [
        min(longest, max(4, round(math.exp(law.inv_cdf((i + 0.5) / texts))))) for i in range(texts)
    ]
    random.Random(SEED).shuffle(lengths)
    return tuple(lengths)


def table_rows(quick: bool = False) -> dict[str, Row]:
    """The rows by name; ``quick`` makes the texts fewer and shorter."""
    count, longest, long, even = (8, 256, 1024, 4) if quick else (32, 512, 8192, 8)
    skewed = skewed_lengths(count, longest)
    texts = f"{count} texts of skewed length"
    rows = [
        Row("skewed", f"encoder, {texts}", "encode", skewed),
        Row("long", f"encoder, one text of {long:,} tokens", "encode", (long,)),
        Row("even", f"encoder, {even} × {longest} without padding", "encode", (longest,) * even),
        Row("mlm-score", f"MLM scoring, {texts}, 15 % hidden", "score", skewed),
        Row("mlm-train", f"MLM training step, {texts}, 15 % hidden", "train", skewed),
    ]
    return {row.name: row for row in rows}


def needed_pairs(length: int, half_window: int | None) -> int:
    """How many pairs of a query and a key a text has: L², or those at most W tokens apart."""
    if half_window is None or half_window >= length:
        return length**2
    return length * (2 * half_window + 1) - half_window * (half_window + 1)


def count_flops(config: ModernBertConfig, row: Row, hidden: int) -> int:
    """Floating point operations of the matrix products that a row needs, each of 2 per multiply.

    Padding needs none. Norms, activations, softmax and rotary positions are left out, as is
    usual: they cost time, yet few operations. The backward pass computes two products for each
    of the forward pass.

    Args:
        config: the model's sizes.
        row: the work.
        hidden: M, the tokens at which logits are asked for.

    Returns:
        The count, exact.
    """
    width, inner = config.hidden_size, config.intermediate_size
    linear = sum(row.lengths) * config.num_hidden_layers * 2 * width * (4 * width + 3 * inner)
    windows = [
        None if kind == "full_attention" else config.half_window for kind in config.layer_types
    ]
    pairs = sum(needed_pairs(length, window) for window in windows for length in row.lengths)
    total = linear + 4 * width * pairs  # q·k, then weight·v
    if row.task != "encode":
        total += hidden * 2 * width * (width + config.vocab_size)
    return 3 * total if row.task == "train" else total


@dataclass
class Batch:
    """The inputs of a row.

    Attributes:
        lengths: of the B texts.
        ids: (B, L) int64, padded on the right.
        mask: (B, L) int64, 1 at real tokens.
        labels: (B, L) int64, ids at 15 % of the real tokens, −100 elsewhere.
    """

    lengths: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    @property
    def hidden(self) -> int:
        """M, how many tokens have a label."""
        return int((self.labels != IGNORED).sum())


def make_batch(row: Row, config: ModernBertConfig, device: torch.device) -> Batch:
    """Random ids, and labels, for a row."""
    generator = torch.Generator().manual_seed(SEED)
    size = (len(row.lengths), max(row.lengths))
    real = torch.arange(size[1]) < torch.tensor(row.lengths)[:, None]
    ids = torch.randint(config.pad_token_id, size, generator=generator)
    ids[~real] = config.pad_token_id
    chosen = (torch.rand(size, generator=generator) < 0.15) & real
    chosen[0, 0] = True  # even the shortest batch has one
    labels = ids.masked_fill(~chosen, IGNORED)
    return Batch(row.lengths, ids.to(device), real.long().to(device), labels.to(device))


def select_work(
    names: Sequence[str] | None, shapes: Sequence[str] | None, quick: bool
) -> list[tuple[Row, str]]:
    """The rows to measure, each with the name of a shape.

    Args:
        names: of rows; by default all, though of "base" only those of the encoder: its MLM rows
            take transformers minutes a round and many gigabytes.
        shapes: names of shapes; by default "17m", or "mini" for a quick run.
        quick: as in ``table_rows``.

    Raises:
        ValueError: for an unknown name.
    """
    rows = table_rows(quick)
    for what, given, known in (("row", names, rows), ("shape", shapes, SHAPES)):
        for name in given or ():
            if name not in known:
                raise ValueError(f"no {what} {name!r}: there are {', '.join(known)}")
    return [
        (row, shape)
        for shape in shapes or ["mini" if quick else "17m"]
        for row in rows.values()
        if (row.name in names if names else shape != "base" or row.task == "encode")
    ]


# --- who does it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A library, and how it is asked to work.

    Attributes:
        name: for the table.
        attention: its ``attn_implementation``.
        micro_batch: sort the texts by length and take so many at a time; 0 for one batch.
        sparse: compute the decoder only at the hidden tokens.
        compiled: through torch.compile.
    """

    name: str
    attention: str
    micro_batch: int = 0
    sparse: bool = False
    compiled: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
        return self.name.startswith(OURS)


def missing_reason() -> str | None:
    """Why there is nothing to compare with; None where transformers 5 is installed."""
    remedy = 'pip install "transformers>=5" to compare'
    if importlib.util.find_spec("transformers") is None:
        return f"transformers is not installed: only our own numbers; {remedy}"
    version = importlib.metadata.version("transformers")
    if int(version.split(".")[0]) < 5:
        return f"transformers {version} is too old: only our own numbers; {remedy}"
    return None


def contenders(row: Row, device: torch.device, compiled: bool = False) -> list[Contender]:
    """Who does a row on this machine, ourselves first.

    Args:
        row: the work.
        device: where it is done.
        compiled: whether encoders run through torch.compile too. On an Ampere or newer GPU they
            always do; older ones are left behind by current Triton, which the compiler needs, and
            on a CPU compiling takes minutes.
    """
    sparse = row.task != "encode"
    chosen = {"score": ", logits where hidden", "train": ", sparse_prediction"}.get(row.task, "")
    ours, theirs = [Contender(OURS, "auto", sparse=sparse)], []
    if missing_reason() is None:
        theirs.append(Contender("transformers sdpa", "sdpa"))
        if sparse:
            theirs.append(Contender(f"transformers sdpa{chosen}", "sdpa", sparse=True))
        elif row.is_padded:
            theirs.append(Contender("transformers sdpa, sorted, 4 at a time", "sdpa", 4))
        if device.type == "cuda" and has_flash_attention(device):
            name = f"transformers flash_attention_2{chosen}"
            theirs.append(Contender(name, "flash_attention_2", sparse=sparse))
    compiled |= device.type == "cuda" and best_dtype(device) == torch.bfloat16
    if compiled and not sparse:
        ours.append(Contender(f"{OURS}, compiled", "auto", compiled=True))
        theirs += [replace(c, name=f"{c.name}, compiled", compiled=True) for c in theirs[:1]]
    return ours + theirs


def has_flash_attention(device: torch.device) -> bool:
    """Whether flash-attn 2 is installed and the GPU is an Ampere or newer one."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return installed and torch.cuda.get_device_capability(device) >= (8, 0)


def build_model(
    contender: Contender, row: Row, config: ModernBertConfig, device: torch.device
) -> nn.Module:
    """A contender's model with the weights that ``SEED`` gives, whichever library it is of."""
    # Random weights know no longest text; the warning is for trained ones.
    longest = max(config.max_position_embeddings, *row.lengths)
    config = replace(config, max_position_embeddings=longest, sparse_prediction=contender.sparse)
    encodes = row.task == "encode"
    own_class = model.ModernBertModel if encodes else heads.ModernBertForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        built = own_class(config, contender.attention if contender.is_ours else "auto")
    if not contender.is_ours:
        import transformers

        auto = transformers.AutoModel if encodes else transformers.AutoModelForMaskedLM
        weights = built.state_dict()
        built = auto.from_config(
            transformers.ModernBertConfig.from_dict(config.to_dict()),
            attn_implementation=contender.attention,
        )
        built.load_state_dict(weights)
    built = built.to(device, best_dtype(device)).train(row.task == "train")
    if not contender.compiled:
        return built
    return CompiledEncoder(built) if contender.is_ours else torch.compile(built)


class CompiledEncoder(nn.Module):
    """Our encoder through torch.compile: one graph for batches of all lengths.

    What looks into the attention mask stays outside of the graph: the batch becomes a stream
    first, and is padded again afterwards.
    """

    def __init__(self, encoder: model.ModernBertModel):
        super().__init__()
        self.encoder = encoder
        self.graph = torch.compile(encoder, fullgraph=True, dynamic=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> model.EncoderOutput:
        """Encode a padded batch (B, L)."""
        stream, restore = self.encoder.unpadded(input_ids, attention_mask)
        states = self.graph(**stream).last_hidden_state
        return model.EncoderOutput(last_hidden_state=restore(states))


def find_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: where it is another kind of device, or is not here.
    """
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name}: what is measured is cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: torch finds no CUDA device here")
    return device


def best_dtype(device: torch.device) -> torch.dtype:
    """What the device is made for: float32 on a CPU, bfloat16 on an Ampere or newer GPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@dataclass
class Job:
    """A contender's work on one batch.

    Attributes:
        run: does it once; this is what is timed.
        collect: makes of what ``run`` returns the tensors (M, C) to compare.
    """

    run: Callable[[], Any]
    collect: Callable[[Any], list[torch.Tensor]]


def make_job(contender: Contender, net: nn.Module, batch: Batch, row: Row) -> Job:
    """Bind a contender's model to a batch."""
    return {"encode": encoding_job, "score": scoring_job, "train": training_job}[row.task](
        contender, net, batch
    )


def encoding_job(contender: Contender, net: nn.Module, batch: Batch) -> Job:
    """Hidden states of every real token."""
    order, size = list(range(len(batch.lengths))), len(batch.lengths)
    if contender.micro_batch:
        order, size = sorted(order, key=lambda i: batch.lengths[i]), contender.micro_batch
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    inputs = []
    for group in groups:
        longest = max(batch.lengths[i] for i in group)
        inputs.append((batch.ids[group, :longest], batch.mask[group, :longest]))

    @torch.no_grad()
    def run():
        return [net(ids, attention_mask=mask).last_hidden_state for ids, mask in inputs]

    def collect(outputs):
        texts = {}
        for group, output in zip(groups, outputs, strict=True):
            texts |= {i: x[: batch.lengths[i]] for i, x in zip(group, output, strict=True)}
        return [torch.cat([texts[i] for i in range(len(texts))])]  # (N, C)

    return Job(run, collect)


def scoring_job(contender: Contender, net: nn.Module, batch: Batch) -> Job:
    """Logits at the hidden tokens, and no loss; the plain way is to compute all and pick."""
    hidden = batch.labels != IGNORED  # (B, L)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}

    @torch.no_grad()
    def run():
        if not contender.sparse:
            return net(**inputs).logits  # (B, L, V)
        states = net.model(**inputs).last_hidden_state  # (B, L, C)
        return net.decoder(net.head(states[hidden]))  # (M, V), as FillMask does

    def collect(logits):
        return [logits if contender.sparse else logits[hidden]]  # (M, V)

    return Job(run, collect)


def training_job(contender: Contender, net: nn.Module, batch: Batch) -> Job:
    """Loss, gradients, and an update by AdamW."""
    # A rate of 0 costs the same arithmetic and keeps the weights of all contenders equal.
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)

    def run():
        optimizer.zero_grad()
        loss = net(batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    def collect(loss):
        named = sorted(net.named_parameters(), key=lambda item: item[0])
        return [loss.view(1, 1), *(p.grad.reshape(1, -1) for _, p in named)]

    return Job(run, collect)


# --- equal first, then timed ------------------------------------------------------------------


class UnequalOutputs(RuntimeError):
    """Two contenders disagree, so that their times mean nothing."""


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest distance between two vectors, as a share of the length of the second.

    Args:
        a, b: the same number of tensors (M, C) of equal shapes, any floating dtype.

    Returns:
        The largest over all rows of all tensors; infinite where shapes or numbers of tensors
        differ or where something is not finite.
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.float(), y.float()
        shares = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-12)  # (M,)
        worst = max(worst, shares.nan_to_num(math.inf, math.inf).max().item())
    return worst


def require_equal(name: str, outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The difference between two contenders' outputs, if it is one of rounding.

    Raises:
        UnequalOutputs: where it is more than that.
    """
    worst, bound = difference(outputs, expected), TOLERANCE[expected[0].dtype]
    if worst > bound:
        raise UnequalOutputs(
            f"{name} and {OURS} disagree: a vector differs by {worst:.1e} of its length, and "
            f"rounding explains {bound:.0e} at most. Nothing was timed."
        )
    return worst


def time_rounds(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    probe: Callable[[], float],
    step: Callable[[str], object],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], list[float]]:
    """Time all runs in turn, so many rounds; each round another one is the first.

    Args:
        runs: by name; each returns when its work is done.
        rounds: how often each is run.
        probe: measures the machine; called once a round.
        step: is told the name of what runs next.
        clock: seconds.

    Returns:
        For each run its seconds in each round; and what the probe said in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, probed = list(runs), []
    for start in range(rounds):
        probed.append(probe())
        for i in range(len(names)):
            name = names[(start + i) % len(names)]
            step(name)
            begin = clock()
            runs[name]()
            seconds[name].append(clock() - begin)
    return seconds, probed


def gemm_rate(device: torch.device, repeats: int = 3) -> float:
    """Operations per second of the largest matrix product the device does at full speed.

    The best of ``repeats``, of a product without allocation, at a size that suits the device:
    on a CPU that of ModernBERT-base's Wqkv on 2,048 tokens, the fastest of those tried.
    """
    m, k, n = (2048, 768, 2304) if device.type == "cpu" else (8192, 8192, 8192)
    dtype = best_dtype(device)
    a, b = (torch.ones(*size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
    out = torch.mm(a, b)
    best = math.inf
    for _ in range(repeats):
        synchronise(device)
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * m * k * n / best


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, which works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Spread(NamedTuple):
    """The median of some numbers, between their quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a single number, that number."""
    several = [*values] * (2 if len(values) == 1 else 1)
    return Spread(*statistics.quantiles(several, n=4, method="inclusive"))


# --- memory -----------------------------------------------------------------------------------


def peak_memory(
    contender: Contender, row: Row, config: ModernBertConfig, device: torch.device
) -> int | None:
    """The bytes that a contender needs beyond the weights, measured in a process of its own.

    The model is built there and has run on a short text; counted is what the work then adds at
    its peak. In training that holds gradients and the optimiser's state.

    Returns:
        None where the system does not tell, or where the process did not live to say.
    """
    task = {
        "contender": asdict(contender),
        "row": asdict(row),
        "config": config.to_dict(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", f"{__package__}.benchmark", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def measure_own_peak(task: dict[str, Any]) -> int | None:
    """What the process does that ``peak_memory`` starts."""
    torch.set_num_threads(task["threads"])
    config, contender = ModernBertConfig.from_dict(task["config"]), Contender(**task["contender"])
    row = Row(**task["row"] | {"lengths": tuple(task["row"]["lengths"])})
    device = torch.device(task["device"])
    net = build_model(contender, row, config, device)
    # Thread pools and code come with the first run, and are no memory of the work.
    first = replace(row, lengths=(8,))
    make_job(contender, net, make_batch(first, config, device), first).run()
    net.zero_grad()
    job = make_job(contender, net, make_batch(row, config, device), row)
    gc.collect()
    return peak_over(job.run, device)


def peak_over(run: Callable[[], Any], device: torch.device) -> int | None:
    """How many bytes are taken at the peak of a run, beyond those taken before it.

    On a GPU torch itself keeps count. On a CPU Linux does; elsewhere the answer is None.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory_of_process("VmRSS")
    except OSError:
        return None
    run()
    return max(0, memory_of_process("VmHWM") - before)


def memory_of_process(name: str) -> int:
    """A line of the process's status on Linux, in bytes: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {name} in /proc/self/status")


# --- results ----------------------------------------------------------------------------------


@dataclass
class Entry:
    """What one contender needed.

    Attributes:
        name: of the contender.
        seconds: of each round.
        difference: from our own outputs, as ``difference`` counts; 0 for ourselves.
        peak_bytes: beyond the model; None where it was not measured.
    """

    name: str
    seconds: list[float]
    difference: float
    peak_bytes: int | None = None


@dataclass
class Result:
    """One row, measured.

    Attributes:
        row: the work.
        shape: of the model.
        flops: that the work needs.
        gemm: operations per second of a matrix product, in each round.
        entries: ourselves first.
    """

    row: Row
    shape: str
    flops: int
    gemm: list[float]
    entries: list[Entry]

    @property
    def tokens(self) -> int:
        """N, without padding."""
        return sum(self.row.lengths)

    @property
    def padding(self) -> float:
        """Places in the padded batch for each real token."""
        return len(self.row.lengths) * max(self.row.lengths) / self.tokens

    def ratio(self, entry: Entry) -> Spread:
        """How many times as long as we a contender takes, round by round."""
        ours = self.entries[0].seconds
        return spread([b / a for a, b in zip(ours, entry.seconds, strict=True)])

    def gemm_share(self, entry: Entry) -> Spread:
        """The rate of needed operations, as a share of the matrix product's of that round."""
        pairs = zip(entry.seconds, self.gemm, strict=True)
        return spread([self.flops / seconds / rate for seconds, rate in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "row": self.row.name,
            "title": self.row.title,
            "shape": self.shape,
            "task": self.row.task,
            "lengths": list(self.row.lengths),
            "tokens": self.tokens,
            "padding": self.padding,
            "flops": self.flops,
            "gemm_flops_per_second": self.gemm,
            "entries": [
                asdict(entry)
                | {
                    "tokens_per_second": self.tokens / statistics.median(entry.seconds),
                    "gemm_share": self.gemm_share(entry)._asdict(),
                    "times_our_seconds": self.ratio(entry)._asdict(),
                }
                for entry in self.entries
            ],
        }


def measure(
    row: Row,
    shape: str,
    config: ModernBertConfig,
    device: torch.device,
    repeats: int,
    with_memory: bool = True,
    step: Callable[[str], object] = str,
    compiled: bool = False,
) -> Result:
    """Measure one row.

    Args:
        row: the work.
        shape: the name of the sizes in ``config``.
        config: of the model.
        device: where it runs.
        repeats: rounds.
        with_memory: whether to measure the peak too, which runs everything once more.
        step: is told what comes next, ``count_steps`` times.
        compiled: as in ``contenders``.

    Raises:
        UnequalOutputs: where a contender's numbers are not ours.
    """
    batch = make_batch(row, config, device)
    field = contenders(row, device, compiled)
    jobs, differences = check_all(field, row, config, batch, device, step)

    def finish(job: Job) -> None:
        job.run()
        synchronise(device)

    seconds, gemm = time_rounds(
        {name: partial(finish, job) for name, job in jobs.items()},
        repeats,
        partial(gemm_rate, device),
        step,
    )
    peaks: dict[str, int | None] = {}
    jobs.clear()  # room for the processes that measure memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for contender in field if with_memory else ():
        step(f"{contender.name}, memory")
        peaks[contender.name] = peak_memory(contender, row, config, device)
    entries = [Entry(n, seconds[n], differences[n], peaks.get(n)) for n in seconds]
    return Result(row, shape, count_flops(config, row, batch.hidden), gemm, entries)


def check_all(
    field: list[Contender],
    row: Row,
    config: ModernBertConfig,
    batch: Batch,
    device: torch.device,
    step: Callable[[str], object],
) -> tuple[dict[str, Job], dict[str, float]]:
    """Let everyone do the work once; return jobs and differences by name if all agree."""
    jobs, differences, models = {}, {}, {}
    expected = None
    for contender in field:
        step(f"{contender.name}, check")
        alike = replace(contender, name=OURS if contender.is_ours else "", micro_batch=0)
        if alike not in models:
            models[alike] = build_model(contender, row, config, device)
        job = make_job(contender, models[alike], batch, row)
        outputs = job.collect(job.run())
        expected = outputs if expected is None else expected
        differences[contender.name] = require_equal(contender.name, outputs, expected)
        jobs[contender.name] = job
    return jobs, differences


def count_steps(
    row: Row, device: torch.device, repeats: int, with_memory: bool, compiled: bool = False
) -> int:
    """How many runs ``measure`` makes."""
    return len(contenders(row, device, compiled)) * (1 + repeats + with_memory)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where and when the numbers were taken, for the JSON file."""
    installed = importlib.util.find_spec("transformers") is not None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(best_dtype(device)).removeprefix("torch."),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        # Others at work on the machine make every number worse, and the ratios uncertain.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers") if installed else None,
        "modernbert_mini": __version__,
        "commit": own_commit(),
        "date": utc_now(),
    }


def own_commit() -> str | None:
    """The commit that the package is at, "-dirty" where files differ; None outside of git.

    An installed package knows no git: MODERNBERT_COMMIT in the environment says it there.
    """
    if told := os.environ.get("MODERNBERT_COMMIT"):
        return told
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An environment may lie inside of some other project's repository.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True
        )
        told = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def write_json(
    path: str | os.PathLike,
    machine: dict[str, Any],
    settings: dict[str, Any],
    results: list[Result],
) -> None:
    """Write everything that was measured so far; a reader never sees half of it."""
    report = {
        "machine": machine,
        "settings": settings,
        "results": [result.to_dict() for result in results],
    }
    with writing(Path(path)) as file:
        file.write((json.dumps(report, ensure_ascii=False, indent=2) + "\n").encode())


# --- what is shown ----------------------------------------------------------------------------

COLUMNS = ("seconds", "tokens/s", "of GEMM", "memory", "our speed-up (quartiles)")


def table_lines(result: Result) -> list[str]:
    """A row as lines of text."""
    padding = f", {result.padding:.1f} × with padding" if result.row.is_padded else ""
    worst = max(entry.difference for entry in result.entries)
    agree = f"; outputs differ by {worst:.0e} at most" if len(result.entries) > 1 else ""
    lines = [
        f"{result.row.title} · {result.shape}",
        f"{result.tokens:,} tokens{padding}; {result.flops / 1e9:,.4g} GFLOP{agree}",
    ]
    cells = [("", *COLUMNS)] + [entry_cells(result, entry) for entry in result.entries]
    for name, *numbers in cells:
        lines.append(
            f"  {name:40}"
            + "".join(f"{n:>{max(8, len(c)) + 2}}" for n, c in zip(numbers, COLUMNS, strict=True))
        )
    return [line.rstrip() for line in lines]


def entry_cells(result: Result, entry: Entry) -> tuple[str, ...]:
    """What stands in a contender's line of the table."""
    median = statistics.median(entry.seconds)
    ratio = result.ratio(entry)
    return (
        entry.name,
        f"{median:.4f}" if median < 0.1 else f"{median:.3f}",
        f"{result.tokens / median:,.0f}",
        f"{result.gemm_share(entry).median:.0%}",
        "" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:,.0f} MB",
        ""
        if entry is result.entries[0]
        else f"{ratio.median:.2f} × ({ratio.low:.2f}–{ratio.high:.2f})",
    )


def recorded(name: str) -> dict[str, Any] | None:
    """What ``write_json`` wrote for the package: "speed", "compiled" or "gpu"; or None."""
    path = files(__package__) / "recorded" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def speed_table(report: dict[str, Any] | None) -> str:
    """A report, as ``write_json`` writes it, as a Markdown table with its provenance."""
    if not report or not report["results"]:
        return "Not yet measured."
    rows = [
        "| work | sizes | beside | how many times our seconds | ours | of GEMM | memory |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for result in report["results"]:
        ours, *others = result["entries"]
        rate = f"{ours['tokens_per_second']:,.0f} tokens/s"
        share = f"{ours['gemm_share']['median']:.0%}"
        for other in others or [{"name": "nobody", "peak_bytes": None}]:
            cells = [result["title"], result["shape"], other["name"]]
            if others:
                times = Spread(**other["times_our_seconds"])
                cells.append(f"**{times.median:.2f}** ({times.low:.2f}–{times.high:.2f})")
            else:
                cells.append("")
            peaks = ours["peak_bytes"], other["peak_bytes"]
            told = (
                "" if None in peaks else "{:,.0f} of {:,.0f} MB".format(*(p / 1e6 for p in peaks))
            )
            rows.append(f"| {' | '.join([*cells, rate, share, told])} |")
    return "\n".join([*rows, "", provenance(report)])


def provenance(report: dict[str, Any]) -> str:
    """Where, when and by what the numbers of a report were taken."""
    machine, settings = report["machine"], report["settings"]
    where = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    if machine["device"] != "cpu":
        where = f"{machine['device']} ({where})"
    versions = [f"torch {machine['torch']}"]
    if machine["transformers"]:
        versions.append(f"transformers {machine['transformers']}")
    versions.append(f"commit {machine['commit'] or 'unknown'}")
    quick = "; a quick run, with fewer and shorter texts" if settings["quick"] else ""
    return (
        f"Measured on {where}, {machine['dtype']}, {', '.join(versions)}, {machine['date'][:10]}: "
        f"medians of {settings['repeats']} rounds, quartiles in brackets{quick}. Memory is what "
        "the work takes beyond the weights: ours of its. GEMM is the rate of a plain matrix "
        "product, measured in the same rounds."
    )


def draw(results: list[Result]) -> "Figure":
    """How many times as long as we each contender takes, with quartiles.

    Where there was nobody to compare with: how many tokens we do in a second.
    """
    from matplotlib.transforms import blended_transform_factory

    from . import plots

    plt = plots.style()
    compared = any(len(result.entries) > 1 for result in results)
    bars = [bar for result in results for bar in result_bars(result, compared)]
    figure, ax = plt.subplots(figsize=(7.2, 1.1 + 0.3 * len(bars)))
    behind = {"facecolor": plots.CARD, "edgecolor": "none", "pad": 1.5}  # no line through words
    for place, (words, kind, values) in enumerate(bars):
        if values is None:
            start = blended_transform_factory(figure.transFigure, ax.transData)
            heading = ax.text(
                0.01, place, words, transform=start, va="center", weight="bold", bbox=behind
            )
            heading.set_in_layout(False)  # it may stand where the names of the bars stand
            continue
        low, middle, high = values
        ax.barh(place, middle, color=plots.PALETTE[kind], height=0.72)
        error = [[middle - low], [high - middle]]
        ax.errorbar(middle, place, xerr=error, color=plots.INK, lw=1.2, capsize=2.5)
        number = f"{middle:.2f}" if compared else f"{middle:,.0f}"
        ax.annotate(
            number, (high, place), (8, -1), textcoords="offset points", va="center", bbox=behind
        )
    ax.set_yticks(range(len(bars)), [words if values else "" for words, _, values in bars])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    farthest = max(values.high for _, _, values in bars if values)
    ax.set(xlim=(0, 1.15 * farthest), ylim=(len(bars) - 0.4, -0.9))
    if compared:
        ax.axvline(1, color=plots.INK, lw=1, ls="--", zorder=0)
        medians = [values.median for _, _, values in bars if values]
        range_ = " to ".join(dict.fromkeys(f"{m:.1f}" for m in (min(medians), max(medians))))
        title = f"transformers takes {range_} times as long as we do"
        ax.set(xlabel="its seconds divided by ours (median, quartiles)")
    else:
        title = "How many tokens we do in a second"
        ax.set(xlabel="tokens per second (median, quartiles)")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11.5)
    plt.close(figure)
    return figure


def check_plot_name(path: str) -> None:
    """Refuse a file name that ``draw(…).savefig`` would refuse only at the end.

    Raises:
        ValueError: with the endings that matplotlib knows.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"{path}: a picture ends in one of .{', .'.join(sorted(known))}")


def result_bars(result: Result, compared: bool) -> list[tuple[str, str, Spread | None]]:
    """A heading and the bars below it: words, colour, and median with quartiles."""
    bars: list[tuple[str, str, Spread | None]] = [
        (f"{result.row.title} · {result.shape}", "black", None)
    ]
    if not compared:
        rate = spread([result.tokens / seconds for seconds in result.entries[0].seconds])
        return [*bars, (OURS, "blue", rate)]
    for entry in result.entries:
        if not entry.name.startswith(OURS):
            color = "orange" if "," in entry.name else "blue"
            bars.append((entry.name, color, result.ratio(entry)))
    return bars


def main() -> None:
    """Measure one contender's memory; ``peak_memory`` starts this."""
    print(json.dumps(measure_own_peak(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
