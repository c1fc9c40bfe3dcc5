"""The command line: ``modernbert-mini fill-mask``, ``inspect``, ``pretrain``.

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

    ``arguments`` are those of the command line by default.
    """
    options = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            options.run(options)
            sys.stdout.flush()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


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

    pretrain = add_command(
        commands,
        run_pretrain,
        "pretrain",
        "train a model from random weights by masked language modelling",
        "A run that was stopped goes on where it left off.",
    )
    pretrain.add_argument("--config", required=True, metavar="FILE", help="the recipe, as TOML")
    return parser


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
        print(json.dumps(answers, ensure_ascii=False, indent=2))
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
        print(json.dumps(report, ensure_ascii=False, indent=2))
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


def run_pretrain(options: argparse.Namespace) -> None:
    """``pretrain``: carry out the recipe in a file and save the model."""
    from pathlib import Path

    from .pretraining import PretrainingConfig, export, pretrain, process_rank

    try:
        config = PretrainingConfig.from_toml(options.config)
    except TypeError as error:  # a field that is missing or unknown
        raise ValueError(f"{options.config}: {error}") from error
    folder = Path(config.folder)
    is_first = process_rank()[0] == 0  # of several processes, one talks and saves
    if is_first:
        print(f"log: {folder / 'log.jsonl'}", flush=True)
    run = pretrain(config)
    if is_first:
        export(folder, folder / "model")
        print(f"{run.tokens:,} tokens seen; model: {folder / 'model'}")


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


def say(message: str) -> None:
    """A line for the person at the terminal, away from the output."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)
