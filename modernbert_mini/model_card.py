"""The model card of a training run, written from the run's own log.

No number of the card is typed by hand: ``write_card`` takes the log that ``pretraining.pretrain``
wrote and puts README.md, training.json (the same facts for programs) and loss.png beside the
weights.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from .fill_mask import FillMask
from .heads import ModernBertForMaskedLM
from .tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is [MASK].",
    "Plants create [MASK] through photosynthesis.",
    "He was a German [MASK] and composer.",
    "dog (noun): a domesticated [MASK] that barks",
    "The method returns a [MASK] of strings.",
)
LARGEST_CURVE = 200  # points; more would not show in the figure


def write_card(
    log: list[dict], model: ModernBertForMaskedLM, tokenizer: Tokenizer, target: Path
) -> None:
    """Write README.md, training.json and loss.png into ``target``.

    Args:
        log: the lines of log.jsonl; a run that was resumed has some steps twice, and the last
            of each counts.
        model: the exported one; it answers a few prompts.
        tokenizer: the model's.
        target: the folder of the exported model.
    """
    facts = summarise(log)
    answers = {prompt: FillMask(model, tokenizer)(prompt, top_k=5) for prompt in PROMPTS}
    (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw_curve(facts, target / "loss.png")
    (target / "README.md").write_text(card(facts, answers), encoding="utf-8")


def summarise(log: list[dict]) -> dict[str, Any]:
    """The facts of a run: recipe, data, machine, time, curve, scores, baseline."""
    starts = [line for line in log if line["event"] == "start"]
    steps = {line["step"]: line for line in log if line["event"] == "train"}
    scores = {line["step"]: line for line in log if line["event"] == "evaluation"}
    train, evaluations = ([by[s] for s in sorted(by)] for by in (steps, scores))
    last = max([train[-1], evaluations[-1]], key=lambda line: line["step"])
    # Paths belong to the machine that trained, not to the recipe.
    recipe = {k: v for k, v in starts[-1]["config"].items() if not k.endswith("folder")}
    peak = max(line["lr"] for line in train)
    stride = -(-len(train) // LARGEST_CURVE)
    return {
        "recipe": recipe | {"total_tokens": last["tokens"]},
        "decay_started_at": max(line["tokens"] for line in train if line["lr"] == peak),
        "parameters": starts[-1]["parameters"],
        "corpora": starts[-1]["corpora"],
        "machine": starts[-1]["machine"],
        "finished": any(line["event"] == "end" for line in log),
        "started": starts[0]["time"],
        "ended": train[-1]["time"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "training_seconds": last["seconds"],
        "tokens_per_second": last["tokens_per_second"],
        "resumed": len(starts) - 1,
        "remarks": [line["text"] for line in log if line["event"] == "remark"],
        "unigram": starts[-1]["unigram"],
        "held_out": evaluations[-1]["held_out"],
        "curve": {
            "train": [[line["tokens"], round(line["loss"], 4)] for line in train[::stride]],
            "held_out": [
                [line["tokens"], round(line["held_out"]["all"]["loss"], 4)] for line in evaluations
            ],
        },
    }


def draw_curve(facts: dict[str, Any], path: Path) -> None:
    """Training and held-out loss against tokens seen, with the unigram baseline."""
    from . import plots

    plt = plots.style()
    figure, ax = plt.subplots()
    hidden = facts["recipe"]["mask_probability"] * 100
    for name, words in (
        ("train", f"training, {hidden:g} % hidden"),
        ("held_out", "held-out, 15 % hidden"),
    ):
        tokens, loss = zip(*facts["curve"][name], strict=True)
        form = {"lw": 1} if name == "train" else {"marker": "o", "ms": 4}
        ax.plot([t / 1e6 for t in tokens], loss, label=words, **form)
    baseline = facts["unigram"]["all"]["loss"]
    ax.axhline(baseline, label="unigram baseline", color=plots.PALETTE["black"], lw=1)
    ax.set(xlabel="tokens seen (millions)", ylabel="loss (nats per masked token)")
    ax.set_title("The masked loss falls far below the unigram baseline")
    ax.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def card(facts: dict[str, Any], answers: dict[str, list[dict]]) -> str:
    """The text of README.md."""
    recipe, machine = facts["recipe"], facts["machine"]
    model = recipe["model"]
    scores, baseline = facts["held_out"], facts["unigram"]
    wall = seconds_between(facts["started"], facts["ended"])
    heads = model["num_attention_heads"]
    lines = [
        "---",
        "language: en",
        "license: cc-by-sa-4.0",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags: [modernbert, masked-lm, teaching]",
        "---",
        "",
        "# mini: a small ModernBERT for teaching",
        "",
        f"A masked language model of {facts['parameters']:,} parameters with ModernBERT's "
        "architecture, trained from random weights by the recipe in `pretraining.py`. It exists so "
        "that every chapter runs offline in seconds. It is no model to build a product on.",
        "",
        "```python",
        "from modernbert_mini import FillMask, ModernBertForMaskedLM, Tokenizer",
        "",
        'model = ModernBertForMaskedLM.from_pretrained("mini")',
        'tokenizer = Tokenizer.from_pretrained("mini")',
        'FillMask(model, tokenizer)("The capital of France is [MASK].")',
        "```",
        "",
        "## Architecture",
        "",
        f"{model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, {heads} heads "
        f"of {model['hidden_size'] // heads} dimensions, GeGLU of {model['intermediate_size']}, "
        f"vocabulary of {recipe['vocab_size']:,}; all else as in ModernBERT-base (every third "
        "layer global, a local window of 128 tokens, rotary bases 160,000 and 10,000). Files, "
        "names and tokenizer have the published form, so `transformers` loads the folder too.",
        "",
        "## Held-out scores",
        "",
        f"{recipe['held_out_percent']:g} % of the documents, chosen by their hash, were never "
        "trained on. 15 % of their tokens are hidden behind [MASK], always the same ones. The "
        "unigram baseline knows only how often each token occurs in the training text, and is "
        "scored on the same positions. Loss is in nats per masked token.",
        "",
        "| held-out text | positions | loss | top-1 | top-5 | unigram loss | top-1 | top-5 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(score_row(name, scores[name], baseline[name]) for name in scores),
        "",
        "![Line chart: training and held-out loss in nats per masked token fall fast at first and "
        "then slowly, far below the flat line of the unigram baseline](loss.png)",
        "",
        "## What it says",
        "",
        "| prompt | five best answers |",
        "|---|---|",
        *(answer_row(prompt, candidates) for prompt, candidates in answers.items()),
        "",
        "## Data and licences",
        "",
        "| corpus | licence | documents | training tokens | seen per epoch | share of training |",
        "|---|---|--:|--:|--:|--:|",
        *corpus_rows(facts["corpora"]),
        "",
        *(f"- **{c['name']}**: {c['source']}; sha256 `{c['sha256']}`." for c in facts["corpora"]),
        "",
        "WordNet 3.0 is copyright 2006 by Princeton University; the text of Wikipedia is by its "
        "authors. Since much of the training text is under CC BY-SA 4.0, so are these weights.",
        "",
        "## Recipe",
        "",
        *recipe_lines(facts),
        "",
        "## Hardware and time",
        "",
        f"{machine['processor']}, no GPU: {machine['processes']} process(es) of "
        f"{machine['threads']} thread(s), float32, Python {machine['python']}, torch "
        f"{machine['torch']}. {duration(facts['training_seconds'])} of training steps "
        f"({facts['tokens_per_second']:,} tokens per second), {duration(wall)} from first to last "
        f"line of the log, {facts['started'][:10]}, resumed {facts['resumed']} time(s).",
        *(f"\n{remark}" for remark in facts["remarks"]),
        "",
        "## Limits",
        "",
        f"- It saw {facts['tokens'] / 1e6:.0f} million tokens; ModernBERT-base saw two trillion. "
        "It knows common grammar, how encyclopedias, dictionaries and manuals sound, and few "
        "facts.",
        f"- It was trained on texts of at most {recipe['max_length']} tokens. The code accepts up "
        "to 8,192; what it does there was not measured.",
        "- English only. It repeats what its sources say and how they say it, their biases and "
        "omissions included: nothing was filtered.",
        "- Held-out text is from the same sources as the training text, and those overlap "
        "(dictionary entries quote each other), so the scores say little about other text.",
        "- It is one run with one seed; no setting was tuned beyond checking that it is stable.",
        "",
    ]
    if not facts["finished"]:
        lines.insert(9, "\n> An intermediate state: the run had not ended when this was exported.")
    return "\n".join(lines)


def score_row(name: str, score: dict[str, float], baseline: dict[str, float]) -> str:
    """One line of the table of scores."""
    cells = [f"{score['positions']:,}"]
    for values in (score, baseline):
        cells += [f"{values['loss']:.3f}", f"{values['top1']:.1%}", f"{values['top5']:.1%}"]
    return f"| {name} | {' | '.join(cells)} |"


def answer_row(prompt: str, candidates: list[dict]) -> str:
    """One line of the table of answers."""
    words = (f"{c['token_str'].strip()} {c['score']:.0%}" for c in candidates)
    return f"| {prompt} | {', '.join(words)} |".replace("`", "'")


def corpus_rows(corpora: list[dict]) -> list[str]:
    """The table of corpora: what was seen, and how large its share was."""
    everything = sum(c["train_tokens"] * c["repeats"] for c in corpora)
    return [
        f"| {c['name']} | {c['licence']} | {c['documents']:,} | {c['train_tokens']:,} | "
        f"{c['repeats']} × | {c['train_tokens'] * c['repeats'] / everything:.0%} |"
        for c in corpora
    ]


def recipe_lines(facts: dict[str, Any]) -> list[str]:
    """The recipe as a list."""
    recipe = facts["recipe"]
    first, second = recipe["betas"]
    start, end = facts["decay_started_at"], facts["tokens"]
    return [
        f"- {recipe['mask_probability'] * 100:g} % of the tokens masked (80 % [MASK], 10 % random, "
        "10 % as they were); only masked positions are decoded.",
        f"- Packed batches of about {recipe['batch_tokens']:,} tokens without padding; no document "
        "sees another. Masks are drawn anew each time.",
        f"- {facts['steps']:,} steps, {end / 1e6:.1f} million tokens.",
        f"- AdamW, betas {first} and {second}, eps {recipe['eps']:g}, weight decay "
        f"{recipe['weight_decay']:g} on matrices alone, gradients clipped to norm "
        f"{recipe['clip_norm']:g}.",
        f"- Learning rate: linear to {recipe['peak_lr']:g} over {recipe['warmup_tokens'] / 1e6:g} "
        f"million tokens, constant to {start / 1e6:.1f} million, then 1 - sqrt down to 0.",
        f"- Seed {recipe['seed']}. `training.json` has every setting under `recipe`: "
        "`pretrain(PretrainingConfig(folder=..., **recipe))` trains it again.",
    ]


def seconds_between(start: str, end: str) -> float:
    """Seconds between two times of the log."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def duration(seconds: float) -> str:
    """Seconds as hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
