"""What a longer context and a larger rotary base do to a small model, in the package's record.

    python tests/tools/context_extension.py

Trains a small model on pieces of 128 tokens, as the first phase of the paper's recipe, and then
goes on from the same checkpoint in three ways: with pieces of 1,024 and a larger base of the global
layers, with such pieces and the old base, and, for comparison, with short pieces still. Scores each
on the same held-out text, cut to several lengths, and by position. Writes
`modernbert_mini/recorded/context_extension.json`: half an hour on one core.
"""

import itertools
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from modernbert_mini import data, pretraining
from modernbert_mini.recipe import PretrainingConfig
from modernbert_mini.unpadding import join

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "modernbert_mini" / "recorded" / "context_extension.json"
SHORT, LONG = 128, 1024
LENGTHS = (128, 256, 512, 1024)
DRAWS = 8  # of the masks, over which scores are averaged
FIRST = {
    "training_tokens": 3_000_000,
    "max_sequence_length": SHORT,
    "batch_tokens": 8192,
    "microbatch_tokens": 4096,
    "learning_rate": 5e-3,
    "warmup_tokens": 100_000,
}
SECOND = FIRST | {
    "training_tokens": 800_000,
    "learning_rate": 2e-3,
    "warmup_tokens": 0,
    "decay_tokens": 400_000,
}
WAYS = {
    "larger base, long pieces": {"max_sequence_length": LONG, "global_rope_theta": 160_000},
    "old base, long pieces": {"max_sequence_length": LONG},
    "old base, short pieces": {},
}
RECIPE = PretrainingConfig(
    folder="",
    corpora={"python-docs": 1},
    vocab_size=4096,
    held_out_percent=20,
    model={
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "local_attention": 32,
        "max_position_embeddings": LONG,
        "global_rope_theta": 10_000,
    },
    evaluate_every=100,
    checkpoint_every=100,
    phases=[FIRST],
)


def corpus(name: str, config: PretrainingConfig) -> data.Corpus:
    """Python's documentation in long documents: a page, or a module's docstrings together."""
    return data.python_docs(words_per_document=5000)


def pieces(run: pretraining.Run, length: int) -> list[torch.Tensor]:
    """Held-out documents of at least ``LONG`` tokens, cut to pieces of one length."""
    cls, sep = run.data.tokenizer.cls_token_id, run.data.tokenizer.sep_token_id
    room, cut = length - 2, []
    for shard in itertools.chain.from_iterable(run.data.held_out.values()):
        for ids in shard:
            # The same text at every length: whole multiples of the longest piece's.
            text = torch.from_numpy(np.asarray(ids, dtype=np.int64))
            text = text[: len(text) // (LONG - 2) * (LONG - 2)]
            cut += [
                torch.cat((torch.tensor([cls]), part, torch.tensor([sep])))
                for part in text.split(room)
                if len(part)
            ]
    return cut


@torch.no_grad()
def losses(run: pretraining.Run, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and losses of all hidden tokens of the held-out pieces of one length."""
    model, found = run.model.eval(), []
    collate = pretraining.MaskingCollator(run.data.tokenizer, 0.15, 1.0, 0.0, seed=length)
    for _ in range(DRAWS):
        for piece in pieces(run, length):
            batch = collate(join([piece]))
            places = (batch["labels"] >= 0).nonzero()[:, 0]
            if len(places):
                loss = F.cross_entropy(model(**batch).logits, piece[places], reduction="none")
                found.append(torch.stack((places.float(), loss)))
    model.train()
    return tuple(torch.cat(found, dim=1).numpy())


def score(run: pretraining.Run) -> dict:
    """Mean loss by length of the pieces, and by position in the longest ones."""
    by_length = {n: losses(run, n) for n in LENGTHS}
    places, loss = by_length[LONG]
    bins = (places // SHORT).astype(int)
    return {
        "global_rope_theta": run.model.config.global_rope_theta,
        "tokens": run.tokens,
        "by_length": {n: round(float(x.mean()), 4) for n, (_, x) in by_length.items()},
        "hidden_tokens": {n: len(x) for n, (_, x) in by_length.items()},
        "by_position": [round(float(loss[bins == b].mean()), 4) for b in range(LONG // SHORT)],
    }


def main() -> None:
    """Train the first phase once and the second in each way, and write the record."""
    pretraining.load_corpus = corpus
    with tempfile.TemporaryDirectory() as place:
        first = replace(RECIPE, folder=str(Path(place) / "first"))
        run = pretraining.pretrain(first)
        found = {"after the first phase": score(run)}
        run.model.config.rope_parameters["full_attention"]["rope_theta"] = 160_000
        run.model.config.global_rope_theta = 160_000
        found["larger base, no training"] = score(run)
        for number, (name, changes) in enumerate(WAYS.items()):
            folder = Path(place) / str(number)
            shutil.copytree(first.folder, folder)
            phases = [FIRST, SECOND | changes]
            config = replace(first, folder=str(folder), phases=phases)
            found[name] = score(pretraining.pretrain(config, resume=True))
            print(name, found[name]["by_length"], flush=True)
        start = next(e for e in pretraining.read_log(first.folder) if e["event"] == "start")
    recipe = {k: v for k, v in asdict(RECIPE).items() if not k.endswith("folder")}
    record = {
        "what": "held-out loss (nats per hidden token), 15 % hidden, mean over 8 draws of masks",
        "recipe": recipe | {"phases": [FIRST, SECOND]},
        "ways": WAYS,
        "parameters": start["parameters"],
        "corpora": start["corpora"],
        "machine": start["machine"],
        "date": pretraining.utc_now()[:10],
        "scores": found,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
