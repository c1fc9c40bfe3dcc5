"""What the five tasks of chapter 13 reach, in the package's record.

    python tests/tools/fine_tuned.py                      all tasks, half an hour on two cores
    python tests/tools/fine_tuned.py question-answering   one of them; the others stay

Fine-tunes `mini` with the settings of each task on all its rows, once for each seed, and beside it
the baseline, and the same model with a frozen encoder. For sequence classification, other decays of
the learning rate from layer to layer too. Every score is on the test part. Writes
`modernbert_mini/recorded/fine_tuning.json`.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch

from modernbert_mini import fine_tuning, task_data
from modernbert_mini.fine_tuning import TASKS
from modernbert_mini.pretraining import processor_name
from modernbert_mini.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "modernbert_mini" / "recorded" / "fine_tuning.json"
DECAYS = {"sequence-classification": (1.0, 0.6)}


def run(task, tokenizer, rows, config) -> dict:
    """Scores of one run, on all test rows and on those from articles that `mini` never saw."""
    torch.manual_seed(config.seed)
    model = task.load("mini", rows.train)
    wall, cpu = time.perf_counter(), time.process_time()
    if hasattr(model, "model") or not config.frozen:
        fine_tuning.fine_tune(task, model, tokenizer, rows.train, config)
    trained = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    answers = fine_tuning.predict(task, model, tokenizer, rows.test)
    places = [i for i, row in enumerate(rows.test) if row["unseen"]]
    unseen = task.score([rows.test[i] for i in places], [answers[i] for i in places])
    whole = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {
        "seed": config.seed,
        "scores": task.score(rows.test, answers),
        "unseen": unseen,
        **{name: round(value, 1) for name, value in trained.items()},
        "seconds_with_test": round(whole["wall"], 1),
        "cpu_seconds_with_test": round(whole["cpu"], 1),
        **more(task, rows.test, answers),
    }


def more(task, rows, answers) -> dict:
    """Some answers to look at; for embeddings, how the vectors do together with BM25."""
    if task.name != "sentence-embedding":
        examples = [{**row, "found": answer} for row, answer in zip(rows, answers, strict=True)]
        return {"examples": examples[:: len(rows) // 5][:5]}
    queries, texts = torch.stack(answers).unbind(dim=1)
    both = [task_data.bm25_ranking(rows), queries @ texts.T]
    both = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in both]
    return {"with_bm25": fine_tuning.ranking_scores(rows, sum(both))}


def record(name: str, seeds: list[int]) -> dict:
    """All runs of one task."""
    task, tokenizer = TASKS[name], Tokenizer.from_pretrained("mini")
    rows, baseline = task_data.vital_article_task(name), task_data.BASELINES[name]
    runs = {"fine-tuned": {}, "frozen": {"frozen": True}}
    runs |= {f"layer_decay {x}": {"layer_decay": x} for x in DECAYS.get(name, ())}
    found = {}
    for kind, change in runs.items():
        found[kind] = []
        for seed in seeds:
            found[kind].append(
                run(task, tokenizer, rows, replace(task.defaults, seed=seed, **change))
            )
            print(name, kind, seed, found[kind][-1] | {"examples": "…"}, flush=True)
    return {
        "metric": task.metric,
        "rows": {part: len(getattr(rows, part)) for part in ("train", "validation", "test")},
        "unseen_rows": sum(row["unseen"] for row in rows.test),
        "settings": asdict(task.defaults),
        "baseline": {"name": baseline.name, "scores": baseline.score(task, rows.train, rows.test)},
        "runs": found,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "data": {"source": rows.source, "licence": rows.licence},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that heads are new
    for name in options.tasks:
        new = record(name, options.seeds)
        old = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        RECORD.write_text(json.dumps({**old, name: new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
