"""What a longer context and a larger rotary base do to a small model, in the package's record.

    python tests/tools/context_extension.py

`mini` was trained on short pieces. Here it goes on with long ones, as in the second phase of the
paper's recipe: with a larger base of the global layers, with the base that it has, and, for
comparison, on short pieces still. The text is docstrings of three packages, a document for each
file, which `mini` has not read. Scores each model on the same held-out text, cut short and long,
and by position. Writes `modernbert_mini/recorded/context_extension.json`: a few minutes on one
core.
"""

import itertools
import json
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from modernbert_mini import data, pretraining
from modernbert_mini.recipe import PretrainingConfig
from modernbert_mini.unpadding import join

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "modernbert_mini" / "recorded" / "context_extension.json"
PACKAGES = ("numpy", "torch", "matplotlib")
SHORT, LONG, BIN = 256, 1024, 128
LENGTHS = (SHORT, LONG)
PIECES = 40  # of the longest, to score on
TIMES = 16  # how much larger the base becomes, as from 10,000 to 160,000
RECIPE = {
    "initialize_from": "mini",
    "tokenizer": "mini",
    "held_out_percent": 20,
    "held_out_tokens": 4096,
    "training_tokens": 160_000,
    "max_sequence_length": SHORT,
    "batch_tokens": 8192,
    "microbatch_tokens": 4096,
    "learning_rate": 1e-3,
    "warmup_tokens": 16_384,
    "decay_tokens": 80_000,
    "log_every": 5,
    "evaluate_every": 1000,
    "checkpoint_every": 1000,
}


def write_text(folder: Path) -> Path:
    """One document for each file of the packages that has enough to say."""
    path = folder / "docstrings.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for package in PACKAGES:
            root = Path(metadata.distribution(package).locate_file(package))
            for source in sorted(root.rglob("*.py")):
                text = "\n\n".join(data._docstrings(source))
                if len(text) > 6000 and "test" not in source.relative_to(root).as_posix():
                    file.write(json.dumps({"text": text}) + "\n")
    return path


def pieces(run: pretraining.Run, length: int) -> list[torch.Tensor]:
    """The same held-out text, cut to pieces of one length."""
    tokenizer, text = run.data.tokenizer, []
    for ids in itertools.chain.from_iterable(itertools.chain(*run.data.held_out.values())):
        whole = torch.from_numpy(np.asarray(ids, dtype=np.int64)).split(LONG - 2)
        text += [part for part in whole if len(part) == LONG - 2]
    text = text[:: max(1, len(text) // PIECES)][:PIECES]
    ends = [torch.tensor([i]) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    parts = itertools.chain.from_iterable(part.split(length - 2) for part in text)
    return [torch.cat((ends[0], part, ends[1])) for part in parts]


@torch.no_grad()
def losses(run: pretraining.Run, length: int) -> np.ndarray:
    """Position and loss of each hidden token in the held-out pieces of one length: (2, M)."""
    model, found = run.model.eval(), []
    collate = pretraining.MaskingCollator(run.data.tokenizer, 0.15, 1.0, 0.0, seed=0)
    for piece in pieces(run, length):
        batch = collate(join([piece]))
        places = (batch["labels"] >= 0).nonzero()[:, 0]
        if len(places):
            loss = F.cross_entropy(model(**batch).logits, piece[places], reduction="none")
            found.append(torch.stack((places.float(), loss)))
    model.train()
    return torch.cat(found, dim=1).numpy()


def score(run: pretraining.Run) -> dict:
    """Mean loss by length of the pieces, and by position in the longest ones."""
    by_length = {n: losses(run, n) for n in LENGTHS}
    places, loss = by_length[LONG]
    bins = (places // BIN).astype(int)
    return {
        "global_rope_theta": run.model.config.rope_parameters["full_attention"]["rope_theta"],
        "tokens": run.tokens,
        "by_length": {n: round(float(x[1].mean()), 4) for n, x in by_length.items()},
        "hidden_tokens": {n: x.shape[1] for n, x in by_length.items()},
        "by_position": [round(float(loss[bins == b].mean()), 4) for b in range(LONG // BIN)],
    }


def main() -> None:
    """Score what `mini` starts with, train in each way, score again, and write the record."""
    with tempfile.TemporaryDirectory() as place:
        text = write_text(Path(place))
        base = PretrainingConfig(
            folder=str(Path(place) / "start"), corpora={str(text): 1}, **RECIPE
        )
        Path(base.folder).mkdir()
        run = pretraining.Run(base, pretraining.prepare_data(base))
        theta = run.model.config.rope_parameters["full_attention"]["rope_theta"]
        found = {"as it ships": score(run)}
        run.model.config.rope_parameters["full_attention"]["rope_theta"] = TIMES * theta
        found["larger base, no training"] = score(run)
        long = {"max_sequence_length": LONG}
        ways = {
            "larger base, long pieces": long | {"global_rope_theta": TIMES * theta},
            "its own base, long pieces": long,
            "its own base, short pieces": {},
        }
        for number, (name, changes) in enumerate(ways.items()):
            config = replace(base, folder=str(Path(place) / str(number)), **changes)
            found[name] = score(pretraining.pretrain(config))
            print(name, found[name]["by_length"], flush=True)
        start = next(e for e in pretraining.read_log(config.folder) if e["event"] == "start")
    record = {
        "what": "held-out loss (nats per hidden token), 15 % hidden",
        "recipe": RECIPE,
        "ways": ways,
        "bin": BIN,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "parameters": start["parameters"],
        "corpora": start["corpora"],
        "machine": start["machine"],
        "date": pretraining.utc_now()[:10],
        "scores": found,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
