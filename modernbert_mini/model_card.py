"""The model card of a training run, written from the run's own log.

No number of the card is typed by hand: ``write_card`` takes the log that ``pretraining.pretrain``
wrote and puts README.md, training.json (the same facts for programs) and loss.png beside the
weights.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from .cloze import BLANK
from .config import ModernBertConfig
from .data import corpus_name
from .fill_mask import FillMask
from .heads import ModernBertForMaskedLM
from .recipe import DURATIONS, PretrainingConfig
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
    write_facts(summarise(log), model, tokenizer, target)


def write_facts(
    facts: dict[str, Any], model: ModernBertForMaskedLM, tokenizer: Tokenizer, target: Path
) -> None:
    """Write what ``summarise`` found, or a ``training.json`` says, as ``write_card`` does."""
    answers = {prompt: FillMask(model, tokenizer)(prompt, top_k=5) for prompt in PROMPTS}
    (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw_curve(facts, target / "loss.png")
    text = card(facts, answers, model.config, Path(target).resolve().name)
    (target / "README.md").write_text(text, encoding="utf-8")


def summarise(log: list[dict]) -> dict[str, Any]:
    """The facts of a run: recipe, data, machine, time, curve, scores, baseline."""
    starts = [line for line in log if line["event"] == "start"]
    steps = {line["step"]: line for line in log if line["event"] == "train"}
    scores = {line["step"]: line for line in log if line["event"] == "evaluation"}
    train, evaluations = ([by[s] for s in sorted(by)] for by in (steps, scores))
    last = max([train[-1], evaluations[-1]], key=lambda line: line["step"])
    recipe = without_paths(starts[-1]["config"])
    peak = max(line["lr"] for line in train)
    began_with = starts[0].get("began_with")
    if began_with:  # its scores on the very same positions
        first = {key: evaluations[0].get(key) for key in ("step", "held_out", "cloze")}
        began_with = began_with | {"scores": first if first.pop("step") == 0 else None}
    stride = -(-len(train) // LARGEST_CURVE)
    return {
        "recipe": recipe,
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
        "unigram_cloze": starts[-1].get("unigram_cloze"),
        "cloze": evaluations[-1].get("cloze"),
        "began_with": began_with,
        "curve": {
            "train": [[line["tokens"], round(line["loss"], 4)] for line in train[::stride]],
            "held_out": [
                [line["tokens"], round(line["held_out"]["all"]["loss"], 4)] for line in evaluations
            ],
        },
    }


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe with names for paths, which belong to the machine that trained."""
    recipe = {k: v for k, v in config.items() if not k.endswith("folder")}
    for key in ("tokenizer", "initialize_from"):
        if recipe.get(key) and Path(recipe[key]).expanduser().is_dir():
            recipe[key] = Path(recipe[key]).name
    for part in (parts := [recipe, *map(dict, recipe.get("phases", []))]):
        if "corpora" in part:
            part["corpora"] = {corpus_name(k): v for k, v in part["corpora"].items()}
    return recipe | ({"phases": parts[1:]} if "phases" in recipe else {})


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
    ax.set_title("Training and held-out loss against the tokens seen")
    ax.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def card(
    facts: dict[str, Any], answers: dict[str, list[dict]], config: ModernBertConfig, name: str
) -> str:
    """The text of README.md."""
    recipe, machine = facts["recipe"], facts["machine"]
    scores, baseline = facts["held_out"], facts["unigram"]
    wall = seconds_between(facts["started"], facts["ended"])
    every, thetas = config.global_attn_every_n_layers, config.rope_parameters
    bases = [f"{thetas[kind]['rope_theta']:,.0f}" for kind in sorted(thetas)]
    mini = name == "mini"
    titles = {
        True: "mini: a small ModernBERT for teaching",
        False: f"{name}: a masked language model",
    }
    share_alike = any(c["licence"].startswith("CC BY-SA") for c in facts["corpora"])
    lines = [
        "---",
        "language: en",
        *(["license: cc-by-sa-4.0"] if share_alike else []),
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags: [modernbert, masked-lm]",
        "---",
        "",
        f"# {titles[mini]}",
        "",
        f"A masked language model of {facts['parameters']:,} parameters with ModernBERT's "
        f"architecture, pre-trained {'' if facts.get('began_with') else 'from scratch '}by the "
        "recipe in `pretraining.py`."
        + (
            " It exists so that every chapter runs offline in seconds. It is no model to build a "
            "product on."
            if mini
            else ""
        ),
        "",
        "```python",
        "from modernbert_mini import FillMask, ModernBertForMaskedLM, Tokenizer",
        "",
        f'model = ModernBertForMaskedLM.from_pretrained("{name}")',
        f'tokenizer = Tokenizer.from_pretrained("{name}")',
        'FillMask(model, tokenizer)("The capital of France is [MASK].")',
        "```",
        "",
        "## Architecture",
        "",
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads of {config.head_dim} dimensions, GeGLU of "
        f"{config.intermediate_size}, vocabulary of {config.vocab_size:,}; one layer in {every} "
        f"global, a local window of {config.local_attention} tokens, rotary bases {bases[0]} "
        f"(global) and {bases[1]} (local); all else as in ModernBERT-base. Files, names and "
        "tokenizer have the published form, so `transformers` loads the folder too.",
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
        "![Line chart: training and held-out loss in nats per masked token against the tokens "
        "seen, with the unigram baseline as a flat line](loss.png)",
        "",
        *cloze_lines(facts, name),
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
        *licence_lines(facts["corpora"], share_alike, left_out=mini),
        "## Recipe",
        "",
        *recipe_lines(facts),
        "",
        "## Hardware and time",
        "",
        f"{machine['processor']}, {gpu(machine)}: {machine['processes']} process(es) of "
        f"{machine['threads']} thread(s), {machine.get('precision', 'float32')}, Python "
        f"{machine['python']}, torch "
        f"{machine['torch']}. {duration(facts['training_seconds'])} of training steps "
        f"({facts['tokens_per_second']:,} tokens per second), {duration(wall)} from first to last "
        f"line of the log, {facts['started'][:10]}, resumed {facts['resumed']} time(s).",
        *(f"\n{remark}" for remark in facts["remarks"]),
        "",
        "## Limits",
        "",
        f"- It saw {tokens_seen(facts) / 1e6:.0f} million tokens; ModernBERT-base saw two "
        "trillion. It knows common grammar, how encyclopedias, dictionaries and manuals sound, and "
        "few facts.",
        *cloze_limits(facts),
        f"- It was trained on texts of at most {longest(recipe):,} tokens. The code accepts up to "
        f"{config.max_position_embeddings:,}; what it does beyond was not measured.",
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


def cloze_lines(facts: dict[str, Any], name: str) -> list[str]:
    """The section on everyday facts; nothing where they were not asked."""
    cloze = facts.get("cloze")
    if not cloze:
        return []
    rows = [(name, cloze)]
    began_with = facts.get("began_with") or {}
    if first := (began_with.get("scores") or {}).get("cloze"):
        rows.append((f"{began_with['name']}, which it began with", first))
    if baseline := facts.get("unigram_cloze"):
        rows.append(("unigram baseline", baseline))
    topics: dict[str, list] = {}
    for answer in cloze["answers"]:
        topics.setdefault(answer["topic"], []).append(answer["right_at"])
    missing = cloze["facts"] - cloze["answerable"]
    return [
        "## Everyday facts",
        "",
        f"{cloze['facts']} sentences with a word left out (`cloze.json` of the package). They were "
        "written before any model had answered them, and are not in the training text. A guess "
        "counts if it is a right word, as one token."
        + (f" {missing} have no such word in this vocabulary." if missing else ""),
        "",
        "| | right at once | among the five best |",
        "|---|--:|--:|",
        *(f"| {who} | {score['top1']:.0%} | {score['top5']:.0%} |" for who, score in rows),
        "",
        "| topic | facts | right at once | among the five best |",
        "|---|--:|--:|--:|",
        *(
            f"| {topic} | {len(places)} | {places.count(1)} | {len(places) - places.count(None)} |"
            for topic, places in topics.items()
        ),
        "",
        "`training.json` has every guess, under `cloze`.",
        "",
    ]


def cloze_limits(facts: dict[str, Any]) -> list[str]:
    """What the everyday facts show that the model cannot do."""
    cloze = facts.get("cloze")
    if not cloze:
        return []
    wrong = [answer for answer in cloze["answers"] if answer["right_at"] != 1]
    echoes = sum(repeats_sentence(answer) for answer in wrong)
    found = round(cloze["top5"] * cloze["facts"])
    return [
        f"- Of {cloze['facts']} everyday facts it has {found} among its five best guesses. Of its "
        f"{len(wrong)} wrong first guesses, {echoes} repeat a word of the sentence. It is no "
        "source of facts."
    ]


def repeats_sentence(answer: dict[str, Any]) -> bool:
    """Whether the best guess for a blank is a word that the sentence shows."""
    shown = re.findall(r"\w+", answer["sentence"].replace(BLANK, "").lower())
    return answer["guesses"][0][0].lower() in shown


def tokens_seen(facts: dict[str, Any]) -> int:
    """Tokens of the run, and of the one whose weights it began with."""
    return facts["tokens"] + (facts.get("began_with") or {}).get("tokens", 0)


def origin_lines(facts: dict[str, Any]) -> list[str]:
    """The weights that the run began with."""
    began_with = facts.get("began_with")
    if not began_with:
        return []
    trained = ""
    if "tokens" in began_with:
        million, day = began_with["tokens"] / 1e6, began_with["started"][:10]
        trained = f", trained on {million:.1f} million tokens on {day}; how, `training.json` says"
        trained += " under `began_with`"
    return [f"- Begun with the weights of {began_with['name']}{trained}."]


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


def licence_lines(corpora: list[dict], share_alike: bool, left_out: bool = False) -> list[str]:
    """What the licences of the text ask to be said."""
    said = []
    if any(c["name"] == "wordnet" for c in corpora):
        said.append("WordNet 3.0 is copyright 2006 by Princeton University.")
    if any(c["name"] == "vital-articles" for c in corpora):
        said.append("The text of Wikipedia is by its authors.")
    if share_alike:
        said.append("Since part of the text is under CC BY-SA 4.0, so are these weights.")
    if left_out:
        said.append(
            "Debian's dict-gcide (GPL) and dict-foldoc (GFDL) hold more English, but neither "
            "licence lets what is made of it be passed on under CC BY-SA 4.0: they were left out."
        )
    return [" ".join(said), ""] if said else []


def gpu(machine: dict[str, Any]) -> str:
    """The GPU of a run, or that there was none."""
    device = machine.get("device", "cpu")
    return "no GPU" if device == "cpu" else f"GPU {device}"


def columns(recipe: dict[str, Any]) -> list[PretrainingConfig]:
    """The phases of a recipe without its folder."""
    return PretrainingConfig.from_dict(recipe | {"folder": ""}).columns()


def longest(recipe: dict[str, Any]) -> int:
    """The longest sequence of all phases."""
    return max(phase.max_sequence_length for phase in columns(recipe))


def recipe_lines(facts: dict[str, Any]) -> list[str]:
    """The recipe as a list."""
    recipe = facts["recipe"]
    phases = columns(recipe)
    first, second = recipe["betas"]
    hidden, random = recipe.get("mask_share", 0.8) * 100, recipe.get("random_share", 0.1) * 100
    optimizer = recipe.get("optimizer", "StableAdamW")
    spared = "norms and biases" + ("" if recipe.get("decay_embeddings") else " and the embedding")
    clip = recipe.get("clip_norm", 0.0)
    return [
        f"- {recipe['mask_probability'] * 100:g} % of the tokens masked ({hidden:g} % [MASK], "
        f"{random:g} % random, {100 - hidden - random:g} % as they were); only masked positions "
        "are decoded. Masks are drawn anew each time.",
        *origin_lines(facts),
        "- Packed batches without padding; no document sees another.",
        f"- {facts['steps']:,} steps, {facts['tokens'] / 1e6:.1f} million tokens.",
        f"- {optimizer}, betas {first} and {second}, epsilon {recipe['epsilon']:g}; weight decay "
        f"spares {spared}" + (f"; gradients clipped to norm {clip:g}." if clip else "."),
        *(phase_line(number, phase) for number, phase in enumerate(phases, start=1)),
        f"- Seed {recipe['seed']}. `training.json` has every setting under `recipe`: "
        "`pretrain(PretrainingConfig(folder=..., **recipe))` trains it again"
        + (", from the weights that `initialize_from` names." if facts.get("began_with") else "."),
    ]


def phase_line(number: int, phase: PretrainingConfig) -> str:
    """One column of the recipe in words."""
    million = {name: f"{getattr(phase, name) / 1e6:g}" for name in DURATIONS}
    parts = [
        f"{million['training_tokens']} million tokens",
        f"sequences of at most {phase.max_sequence_length:,}",
        f"batches of {phase.batch_tokens:,} tokens",
        f"learning rate {phase.learning_rate:g}",
        f"weight decay {phase.weight_decay:g}",
    ]
    if phase.batch_warmup_tokens:
        parts[2] += f", from {phase.batch_warmup_from:,} within {million['batch_warmup_tokens']} "
        parts[2] += "million"
    if phase.warmup_tokens:
        parts[3] += f", linear over the first {million['warmup_tokens']} million"
    if phase.decay_tokens:
        parts[3] += f", 1 - sqrt down to 0 over the last {million['decay_tokens']} million"
    if phase.global_rope_theta:
        parts.append(f"global rotary base {phase.global_rope_theta:,.0f}")
    return f"- Phase {number}: {'; '.join(parts)}."


def seconds_between(start: str, end: str) -> float:
    """Seconds between two times of the log."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def duration(seconds: float) -> str:
    """Seconds as hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
