"""The command line: ``modernbert-mini fill-mask``, ``inspect``, ``benchmark``, ``pretrain``,
``fine-tune``, ``doctor``.

Everything heavy is imported inside the command that needs it, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from .config import ModernBertConfig
    from .fine_tuning import Task
    from .sources import Source

PROGRAM = "modernbert-mini"
MODEL_HELP = 'the embedded checkpoint "mini" (default), a folder, or a Hub id such as \
"answerdotai/ModernBERT-base"'

# The parts of a model, each with the pattern that its parameters' names match.
PARTS = {
    "embeddings": r"\bembeddings\.tok_embeddings\.",
    "attention": r"\.attn\.",
    "GeGLU": r"\.mlp\.",
    "norms": r"norm\.",
    "head": r"^(head|decoder|classifier)\.",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for an error that the message explains.

    ``doctor`` returns 1 where something has to be mended.

    ``arguments`` are those of the command line by default.
    """
    options = build_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows knows few letters
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            code = options.run(options)
            sys.stdout.flush()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            return 130
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    """The commands with their options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="ModernBERT in code that can be read in one sitting.",
        epilog=f"`{PROGRAM} COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    fill = add_command(
        commands,
        run_fill_mask,
        "fill-mask",
        "predict the [MASK]s of a text",
        f"""examples:
  {PROGRAM} fill-mask "The capital of France is [MASK]."
  echo "Plants create [MASK] through photosynthesis." | {PROGRAM} fill-mask --json""",
    )
    fill.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help='text with at least one mask; "-", or none with piped input, reads one text per line',
    )
    fill.add_argument("--model", default="mini", help=MODEL_HELP)
    fill.add_argument("--revision", help="branch, tag or commit of a Hub model")
    fill.add_argument(
        "--top-k", type=positive, default=5, metavar="K", help="answers per mask (default: 5)"
    )
    fill.add_argument(
        "--json",
        action="store_true",
        help="print what transformers' fill-mask pipeline returns, as JSON",
    )
    fill.add_argument(
        "--attn-implementation",
        default="auto",
        metavar="NAME",
        help="how attention is computed: auto (default), eager or sdpa",
    )
    fill.add_argument("--device", default="cpu", help="such as cpu (default) or cuda")
    fill.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored"
    )

    inspect = add_command(
        commands,
        run_inspect,
        "inspect",
        "show the config, layers, parameters and files of a checkpoint",
        f"""examples:
  {PROGRAM} inspect
  {PROGRAM} inspect answerdotai/ModernBERT-base --json""",
    )
    inspect.add_argument("model", nargs="?", default="mini", metavar="MODEL", help=MODEL_HELP)
    inspect.add_argument("--revision", help="branch, tag or commit of a Hub model")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")

    benchmark = add_command(
        commands,
        run_benchmark,
        "benchmark",
        "measure the speed of this package beside transformers",
        f"""rows:
  skewed     encoder, texts of skewed length in one padded batch
  long       encoder, one long text
  even       encoder, texts of equal length
  mlm-score  scores for 15 % of the tokens
  mlm-train  a training step of masked language modelling

All contenders get the same random weights and the same inputs, and are timed in turn once their
outputs have been found equal. Leave the machine alone meanwhile.

examples:
  {PROGRAM} benchmark --quick
  {PROGRAM} benchmark --shape base 17m --json speed.json --plot speed.png""",
    )
    benchmark.add_argument(
        "--rows", nargs="+", metavar="ROW", help="default: all; with base, those of the encoder"
    )
    benchmark.add_argument(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help="sizes of the models: base (ModernBERT), 17m (Ettin; default), mini (embedded)",
    )
    benchmark.add_argument(
        "--repeats", type=positive, metavar="N", help="rounds of each row (default: 5, quick: 3)"
    )
    benchmark.add_argument(
        "--threads", type=positive, metavar="N", help="default: as many as torch takes"
    )
    benchmark.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    benchmark.add_argument(
        "--compile",
        action="store_true",
        help="encoders through torch.compile too, as always on a GPU; takes minutes on a CPU",
    )
    benchmark.add_argument(
        "--quick",
        action="store_true",
        help="fewer and shorter texts, shape mini, no memory: seconds instead of minutes",
    )
    benchmark.add_argument("--json", metavar="FILE", help="write every measurement")
    benchmark.add_argument("--plot", metavar="FILE", help="draw the ratios: .png, .svg or .pdf")

    pretrain = add_command(
        commands,
        run_pretrain,
        "pretrain",
        "train a model from random weights by masked language modelling",
        f"""The recipe reads like the paper's table: a phase for each column, and what all share.
A corpus is vital-articles, python-docs, wordnet, or a folder of your own text (.txt, .md, .jsonl).
The run's folder gets log.jsonl, checkpoint.pt, loss.png and the finished model. A run that was
stopped, even by kill -9 or a full disk, goes on from its last checkpoint with --resume.
Under torchrun, several processes train together; another number of them may resume.

recipes that come with the package:
  tiny              every part of the paper's recipe, small
  own-text          goes on from mini with text of your own
  mini              goes on with mini on the text that it was made of
  modernbert-base   the paper's own, to read and to copy from

examples:
  {PROGRAM} pretrain --config tiny
  {PROGRAM} pretrain --config own-text --corpus letters --folder run
  {PROGRAM} pretrain --config recipe.toml --resume
  torchrun --nproc-per-node 4 -m modernbert_mini pretrain --config tiny --parallel fsdp2""",
    )
    pretrain.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the recipe: a .toml or .yaml file, or the name of one in the package",
    )
    pretrain.add_argument(
        "--corpus",
        action="append",
        metavar="NAME",
        help="train on this in place of the recipe's corpora; may be given several times",
    )
    pretrain.add_argument("--folder", help="of the run, in place of the recipe's")
    pretrain.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of the run's folder"
    )
    pretrain.add_argument(
        "--parallel",
        choices=("ddp", "fsdp2"),
        help="under torchrun: everything in each process (ddp), or a slice (fsdp2); default: the "
        "recipe's",
    )

    add_fine_tune(commands)

    doctor = add_command(
        commands,
        run_doctor,
        "doctor",
        "say whether this machine is ready for the book, and what to mend",
        f"""A line for each thing: ok, note (the book runs, with less) or FAULT (a chapter will not
run), and what to do about it. The block at the end belongs into a bug report. The exit code is 1
where there is a fault.

examples:
  {PROGRAM} doctor
  python -m modernbert_mini doctor --json""",
    )
    doctor.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def add_fine_tune(commands: Any) -> None:
    """The command ``fine-tune`` with its options."""
    tune = add_command(
        commands,
        run_fine_tune,
        "fine-tune",
        "train a model for a task of yours, score it and save it",
        f"""tasks, and what a row of DATA holds:
  sequence-classification  text, label
  token-classification     words, labels (lists; in CSV, cut at spaces)
  question-answering       question, context, answer (words of the context); answer_start optional
  multiple-choice          context, choices (in CSV: choice0, choice1, ...), label (an index from 0)
  sentence-embedding       query, text

DATA is a .csv file with a header, a .jsonl file with one object a line, "vital-articles" (made
from Wikipedia's vital articles; needs no network) or "hub" (the usual data set of the task; needs
the package datasets). A bad row stops the command before any training, and is named by its line.
Without --test, a tenth of the rows is kept for the test.

examples:
  {PROGRAM} fine-tune sequence-classification vital-articles --baseline
  {PROGRAM} fine-tune sequence-classification mails.csv --output mails
  {PROGRAM} fine-tune sequence-classification mails.csv --predict new.csv > answers.jsonl""",
    )
    tune.add_argument("task", metavar="TASK", help="one of the five below")
    tune.add_argument("data", metavar="DATA", help="rows to train on")
    tune.add_argument("--test", metavar="FILE", help="rows to test on")
    tune.add_argument(
        "--predict", metavar="FILE", help="rows without labels: print answers as JSON"
    )
    tune.add_argument("--model", default="mini", help=MODEL_HELP)
    tune.add_argument("--revision", help="branch, tag or commit of a Hub model")
    tune.add_argument("--output", metavar="FOLDER", help="save the model that was trained last")
    tune.add_argument("--epochs", type=above_zero, metavar="X", help="may be below 1")
    tune.add_argument("--lr", type=above_zero, metavar="X", help="learning rate of the head")
    tune.add_argument(
        "--layer-decay", type=above_zero, metavar="X", help="learning rate from layer to layer"
    )
    tune.add_argument("--frozen", action="store_true", help="train the head alone")
    tune.add_argument("--batch-tokens", type=positive, metavar="N", help="tokens in a batch")
    tune.add_argument("--max-length", type=positive, metavar="N", help="cut texts at N tokens")
    tune.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="a run each (default: 0)"
    )
    tune.add_argument("--baseline", action="store_true", help="score the task's baseline too")
    tune.add_argument("--device", default="cpu", help="such as cpu (default) or cuda")
    tune.add_argument("--json", metavar="FILE", help="write settings and scores")


def add_command(
    commands: Any, run: Any, name: str, summary: str, epilog: str
) -> argparse.ArgumentParser:
    """One subcommand, which ``run`` carries out."""
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def run_fill_mask(options: argparse.Namespace) -> None:
    """``fill-mask``: print the best tokens for each mask."""
    texts = read_texts(options.text)
    import torch

    from .fill_mask import FillMask
    from .heads import ModernBertForMaskedLM
    from .sources import Source
    from .tokenizer import Tokenizer

    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch finds no CUDA device here")
    source = Source(options.model, options.revision)
    source.require("config.json")  # settles the revision for all files
    model = ModernBertForMaskedLM.from_pretrained(
        options.model,
        revision=source.revision,
        attn_implementation=options.attn_implementation,
        device=options.device,
        dtype=options.dtype,
    )
    tokenizer = Tokenizer.from_pretrained(options.model, source.revision)
    parameters = list(model.parameters())
    weights = (
        f"weights: {describe(source)}, {sum(p.numel() for p in parameters):,} parameters, "
        f"{str(parameters[0].dtype).removeprefix('torch.')}"
    )
    print(weights, file=sys.stderr if options.json else sys.stdout)
    answers = FillMask(model, tokenizer)(texts, top_k=options.top_k)
    if options.json:
        print(as_json(answers, indent=2))
        return
    for text, answer in zip(texts, [answers] if len(texts) == 1 else answers, strict=True):
        print(f"\n{text}")
        masks = answer if isinstance(answer[0], list) else [answer]
        for number, candidates in enumerate(masks, start=1):
            if len(masks) > 1:
                print(f"mask {number}")
            width = max(len(repr(c["token_str"])) for c in candidates)
            for candidate in candidates:
                token = repr(candidate["token_str"])
                print(f"  {candidate['score']:7.2%}  {token:{width}}  {candidate['sequence']}")


def run_inspect(options: argparse.Namespace) -> None:
    """``inspect``: print what a checkpoint is made of."""
    from .config import ModernBertConfig
    from .sources import Source

    source = Source(options.model, options.revision)
    config = ModernBertConfig.from_file(source.require("config.json"))
    parameters, tensors = count_parameters(config), stored_tensors(source)
    if options.json:
        report = {
            "checkpoint": describe(source),
            "config": config.to_dict(),
            "parameters": parameters,
            "tensors": tensors,
        }
        print(as_json(report, indent=2))
        return
    print(f"checkpoint: {describe(source)}")
    print("\nconfig")
    print_table(
        [
            (f"  {k}", str(v))
            for k, v in config.to_dict().items()
            if isinstance(v, int | float | str)
        ]
    )
    print(f"\nlayers: {config.num_hidden_layers}")
    for line in layer_lines(config):
        print(f"  {line}")
    total = sum(parameters.values())
    print(f"\nparameters: {total:,}")
    print_table(
        [(f"  {part}", f"{n:>15,}", f"{n / total:6.1%}") for part, n in parameters.items() if n]
    )
    if tensors is None:
        print("\ntensors: this folder holds no weights")
        return
    print(f"\ntensors: {len(tensors)}")
    kinds: Counter[tuple[str, str, str]] = Counter()
    for tensor in tensors:  # one line for what every layer has
        name = re.sub(r"\blayers\.\d+\.", "layers.*.", tensor["name"])
        kinds[name, tensor["dtype"], " × ".join(map(str, tensor["shape"]))] += 1
    print_table([(f"  {n:>3} ×", name, dtype, shape) for (name, dtype, shape), n in kinds.items()])


def run_benchmark(options: argparse.Namespace) -> None:
    """``benchmark``: measure row after row; what is finished stays, whatever stops the rest."""
    for path in filter(None, (options.json, options.plot)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ValueError(f"{path}: there is no such folder to write it to")
    from itertools import count

    import torch
    from tqdm import tqdm

    from . import benchmark

    device = benchmark.find_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    work = benchmark.select_work(options.rows, options.shape, options.quick)
    if options.plot:
        benchmark.check_plot_name(options.plot)
    repeats = options.repeats or (3 if options.quick else 5)
    with_memory = not options.quick
    machine = benchmark.describe_machine(device)
    print("{cpu}, {threads} of {cores} cores; {device}, {dtype}; torch {torch}".format(**machine))
    reason = benchmark.missing_reason()
    print(reason or f"transformers {machine['transformers']}", flush=True)
    settings = {"repeats": repeats, "quick": options.quick, "seed": benchmark.SEED}
    results = []
    steps = sum(
        benchmark.count_steps(row, device, repeats, with_memory, options.compile) for row, _ in work
    )
    bar, named = tqdm(total=steps, unit="run", disable=None, leave=False), count()

    def step(words: str) -> None:
        bar.update(min(1, next(named)))  # what was named before is done
        bar.set_description(f"{row.name} {shape}: {words}")

    try:
        for row, shape in work:
            config = benchmark.shape_config(shape)
            result = benchmark.measure(
                row, shape, config, device, repeats, with_memory, step, options.compile
            )
            results.append(result)
            bar.write("\n".join(["", *benchmark.table_lines(result)]), file=sys.stdout)
            sys.stdout.flush()
            if options.json:
                benchmark.write_json(options.json, machine, settings, results)
    finally:
        bar.close()
        if len(results) < len(work):
            say(f"{len(results)} of {len(work)} rows are finished")
        if options.plot and results:
            benchmark.draw(results).savefig(options.plot)


def run_pretrain(options: argparse.Namespace) -> None:
    """``pretrain``: carry out the recipe in a file and save the model."""
    from pathlib import Path

    from .distributed import joined
    from .pretraining import export, pretrain
    from .recipe import PretrainingConfig

    config = PretrainingConfig.from_file(options.config).with_places(options.corpus, options.folder)
    config.parallel = options.parallel or config.parallel
    folder = Path(config.folder)
    with joined(config.device, config.parallel) as world:
        if options.parallel and world.size == 1:
            say("warning: --parallel changes nothing: torchrun has not started several processes")
        if world.rank == 0:
            print(f"log: {folder / 'log.jsonl'}", flush=True)
        try:
            run = pretrain(config, resume=options.resume, world=world, progress=True)
        except KeyboardInterrupt:
            say("stopped: the same command with --resume goes on from the last checkpoint")
            raise
    if world.rank:
        return  # the first process writes the model
    scores = export(folder, folder / "model")["all"]
    print(f"{run.tokens:,} tokens in {run.steps:,} steps, {run.seconds:,.0f} s of training")
    print(
        "held-out loss {loss:.3f}, masked accuracy top-1 {top1:.1%}, top-5 {top5:.1%}".format(
            **scores
        )
    )
    print(f"model: {folder / 'model'}\nplot: {folder / 'loss.png'}")


def run_fine_tune(options: argparse.Namespace) -> None:
    """``fine-tune``: read the rows, train once for each seed, score, save and predict."""
    from .fine_tuning import TASKS
    from .task_data import read_rows

    if options.task not in TASKS:
        raise ValueError(f"task {options.task!r} is not one of {', '.join(TASKS)}")
    task = TASKS[options.task]
    for path in filter(None, (options.json, options.output)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ValueError(f"{path}: there is no such folder to write it to")
    train, test = training_rows(task, options.data, options.test)
    asked = read_rows(options.predict, task, labelled=False) if options.predict else []

    from dataclasses import asdict, replace

    import torch
    from tqdm import tqdm

    from .config import ModernBertConfig
    from .fine_tuning import evaluate, fine_tune, predict, save, settings_for, spread
    from .sources import Source
    from .task_data import BASELINES
    from .tokenizer import Tokenizer

    names = ("epochs", "lr", "layer_decay", "batch_tokens", "max_length")
    chosen = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    source = Source(options.model, options.revision)
    usual = settings_for(task, ModernBertConfig.from_file(source.require("config.json")))
    config = replace(usual, frozen=options.frozen, **chosen)
    tokenizer = Tokenizer.from_pretrained(options.model, source.revision)
    say(f"{task.name}: {len(train):,} rows to train on, {len(test):,} to test on")
    report = {"task": task.name, "model": options.model, "rows": [len(train), len(test)]}
    report |= {"settings": asdict(config) | {"seed": options.seeds}, "runs": []}
    cut = {"max_length": config.max_length}
    for seed in options.seeds:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the head is new is what was asked for
            model = task.load(options.model, train, revision=source.revision, device=options.device)
        with tqdm(unit="step", disable=None, leave=False) as bar:

            def progress(step: int, steps: int, loss: float, bar: Any = bar) -> None:
                bar.total, bar.n = steps, step
                bar.set_postfix(loss=f"{loss:.3f}")

            result = fine_tune(task, model, tokenizer, train, replace(config, seed=seed), progress)
        scores = evaluate(task, model, tokenizer, test, **cut) if test else {}
        report["runs"].append({"seed": seed, "seconds": result.seconds, **scores})
        words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        say(f"seed {seed}: {result.tokens:,} tokens in {result.seconds:.0f} s; {words}")
    if len(options.seeds) > 1 and test:
        mean, deviation = spread([run[task.metric] for run in report["runs"]])
        say(f"{task.metric} {mean:.4f} ± {deviation:.4f} over {len(options.seeds)} seeds")
    if options.baseline and test:
        baseline = BASELINES[task.name]
        scores = report["baseline"] = baseline.score(task, train, test)
        words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        say(f"baseline, {baseline.name}: {words}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(report, indent=2) + "\n")
    if options.output:
        save(task, model, tokenizer, options.output)
        say(f"model: {options.output}")
    for answer in predict(task, model, tokenizer, asked, **cut) if asked else []:
        print(as_json(task.printable(answer)))


def run_doctor(options: argparse.Namespace) -> int:
    """Print what is wrong with this machine; return 1 where something has to be mended."""
    from . import doctor

    found, about = doctor.examine(), doctor.environment()
    print((doctor.as_json if options.json else doctor.report)(found, about))
    return int(any(finding.level == doctor.FAULT for finding in found))


def training_rows(task: Task, source: str, test: str | None) -> tuple[list[dict], list[dict]]:
    """Rows to train and to test on, from files, from the vital articles or from the Hub."""
    from .task_data import hub_task, read_rows, split_rows, vital_article_task

    makers = {"vital-articles": vital_article_task, "hub": hub_task}
    if source in makers:
        rows = makers[source](task.name)
        return rows.train, read_rows(test, task) if test else rows.test
    rows = read_rows(source, task)
    return (rows, read_rows(test, task)) if test else split_rows(rows)


def read_texts(texts: list[str]) -> list[str]:
    """The texts of the command line, with "-", or nothing, standing for lines of the input."""
    if not texts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no text: pass one, or pipe texts in, one per line")
        texts = ["-"]
    result = []
    for text in texts:
        if text != "-":
            result.append(text)
            continue
        result += [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not result:
        raise ValueError("no text: the input has no line with text in it")
    return result


def describe(source: Source) -> str:
    """The checkpoint's name, with its folder, or its commit on the Hub."""
    if source.folder is None:
        return f"{source.name} at {source.revision}"
    if source.name == "mini":
        return f"mini (embedded in {PROGRAM} {__version__})"
    folder = str(source.folder.resolve())
    return folder if source.name == folder else f"{source.name} ({folder})"


def layer_lines(config: ModernBertConfig) -> list[str]:
    """One letter per layer, and what each letter means."""
    letters = {"full_attention": "G", "sliding_attention": "L"}
    means = {
        "full_attention": "global, sees every token",
        "sliding_attention": f"local, sees {config.half_window} tokens on either side",
    }
    return [" ".join(letters[kind] for kind in config.layer_types)] + [
        f"{letters[kind]}: {means[kind]}; "
        f"rotary base {config.rope_parameters[kind]['rope_theta']:,.0f}"
        for kind in letters
        if kind in config.layer_types
    ]


def count_parameters(config: ModernBertConfig) -> dict[str, int]:
    """Parameters of each part of the model that the config describes, without its weights."""
    import torch

    from . import heads, model

    names = config.extra.get("architectures") or []
    known = [name for name in names if hasattr(heads, name) or hasattr(model, name)]
    name = known[0] if known else "ModernBertForMaskedLM"
    with torch.device("meta"):  # shapes without memory
        built = getattr(heads, name, None) or getattr(model, name)
        shapes = {name: p.numel() for name, p in built(config).named_parameters()}
    counts = dict.fromkeys(PARTS, 0)
    for name, size in shapes.items():
        counts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += size
    return counts


def stored_tensors(source: Source) -> list[dict[str, Any]] | None:
    """Name, dtype, shape and file of every stored tensor; None where there are no weights."""
    from .checkpoints import WEIGHT_FILES, open_weights, read_header, weight_files

    if not any(source.find(name) for name in WEIGHT_FILES):
        return None
    rows = []
    for path in weight_files(source):
        if path.suffix == ".safetensors":
            header, _ = read_header(path)
            found = {n: (t["dtype"], t["shape"]) for n, t in header.items() if n != "__metadata__"}
        else:
            tensors = open_weights(path)
            found = {n: (str(t.dtype)[6:], list(t.shape)) for n, t in tensors.items()}
        rows += [
            {"name": name, "dtype": dtype, "shape": shape, "file": path.name}
            for name, (dtype, shape) in found.items()
        ]
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON for standard output: letters as they are where it is UTF-8, escaped elsewhere."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not utf8, indent=indent)


def say(message: str) -> None:
    """A line for the person at the terminal, away from the output."""
    rank = os.environ.get("RANK")  # torchrun: several processes share the terminal
    print(f"{PROGRAM}: {f'process {rank}: ' if rank else ''}{message}", file=sys.stderr)
