"""What the five tasks of chapter 13 reach, in the package's record.

    make tuned                                                      what the record lacks
    PYTHONPATH=tests python -m tools.fine_tuned question-answering  of one task
    PYTHONPATH=tests python -m tools.fine_tuned --again             all of it, from nothing

For each task: the baseline, `mini` fine-tuned with the task's settings, once for each seed, and
with a frozen encoder; for sequence classification, other decays of the learning rate too. Every
score is on the test part. The first model of each task is saved and scored by transformers too.

Writes `modernbert_mini/recorded/fine_tuning.json` after each run, so a stopped command goes on
where it was: run it again. Runs of other weights, settings or versions of torch are thrown away,
so after `mini` has been trained anew the same command makes the record anew. It takes one thread
and about twelve minutes.
"""

import argparse
import hashlib
import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from modernbert_mini import atomic, fine_tuning, task_data
from modernbert_mini.fine_tuning import TASKS
from modernbert_mini.pretraining import processor_name
from modernbert_mini.sources import find_folder
from modernbert_mini.tokenizer import Tokenizer

from .theirs import Theirs

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "modernbert_mini" / "recorded" / "fine_tuning.json"
SEEDS = (0, 1, 2)
TRIED_DECAYS = {"sequence-classification": (1.0,)}
READS_A_PART = ("sequence-classification",)  # of texts that the baseline reads whole
SCORED_BY_TRANSFORMERS = 100  # rows at least


def jobs(names: list[str]) -> Iterator[tuple[str, str, int]]:
    """Task, kind and seed of every run: first one of each kind, then the other seeds."""
    for name in names:
        yield name, "fine-tuned", SEEDS[0]
    for name in names:
        yield name, "frozen", SEEDS[0]
    for seed in SEEDS[1:]:
        for name in names:
            yield name, "fine-tuned", seed
    for name in names:
        for decay in TRIED_DECAYS.get(name, ()):
            yield name, f"layer_decay {decay}", SEEDS[0]


def settings(task: fine_tuning.Task, kind: str, seed: int) -> fine_tuning.FineTuningConfig:
    """The settings of one run."""
    word, _, value = kind.partition(" ")
    change = {"frozen": {"frozen": True}, "layer_decay": {"layer_decay": float(value or 0)}}
    return replace(task.defaults, seed=seed, **change.get(word, {}))


class TaskRecord:
    """The rows of one task, with the runs on them."""

    def __init__(self, name: str):
        self.task = TASKS[name]
        self.rows = task_data.vital_article_task(name)
        self.tokenizer = Tokenizer.from_pretrained("mini")

    def head(self) -> dict:
        """What does not depend on a seed: where all comes from, and the baseline's scores."""
        rows, name = self.rows, self.task.name
        baseline = task_data.BASELINES[name]
        return {
            "metric": self.task.metric,
            "rows": {part: len(getattr(rows, part)) for part in ("train", "validation", "test")},
            "unseen_rows": len(self._unseen(rows.test)),
            "data": {"source": rows.source, "licence": rows.licence},
            "baseline": {
                "name": baseline.name,
                "scores": baseline.score(self.task, rows.train, rows.test),
                "unseen": self._of_unseen(
                    lambda test: baseline.score(self.task, rows.train, test), rows.test
                ),
            },
        }

    def as_read(self) -> dict:
        """The baseline's scores on what the model reads of each text: its first tokens."""
        task, most = self.task, self.task.defaults.max_length

        def beginnings(rows: list) -> list:
            ids = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=most)
            texts = [self.tokenizer.decode(x, skip_special_tokens=True) for x in ids["input_ids"]]
            return [{**row, "text": text} for row, text in zip(rows, texts, strict=True)]

        baseline = task_data.BASELINES[task.name]
        return baseline.score(task, beginnings(self.rows.train), beginnings(self.rows.test))

    def run(self, kind: str, seed: int) -> tuple[dict, dict]:
        """One run, and what is worth looking at in its answers."""
        task, rows, config = self.task, self.rows, settings(self.task, kind, seed)
        torch.manual_seed(seed)
        model = task.load("mini", rows.train)
        wall, cpu = time.perf_counter(), time.process_time()
        losses = []
        if hasattr(model, "model") or not config.frozen:  # else there is nothing to train
            result = fine_tuning.fine_tune(task, model, self.tokenizer, rows.train, config)
            losses = [round(loss, 3) for loss in result.losses]
        trained = time.perf_counter() - wall, time.process_time() - cpu
        answers = fine_tuning.predict(task, model, self.tokenizer, rows.test)
        tested = time.process_time() - cpu - trained[1]
        run = {
            "seed": seed,
            "scores": task.score(rows.test, answers),
            "unseen": self._score_unseen(answers),
            "seconds": round(trained[0], 1),
            "cpu_seconds": round(trained[1], 1),
            "test_cpu_seconds": round(tested, 1),
        }
        if kind != "fine-tuned" or seed != SEEDS[0]:
            return run, {}
        return {**run, "losses": losses}, {
            "transformers": self._score_by_transformers(model, answers),
            "answers": self._worth_keeping(model, answers),
        }

    def _unseen(self, rows: list) -> list[int]:
        return [i for i, row in enumerate(rows) if row["unseen"]]

    def _of_unseen(self, score: Callable, rows: list) -> dict:
        return score([rows[i] for i in self._unseen(rows)])

    def _score_unseen(self, answers: list) -> dict:
        rows, places = self.rows.test, self._unseen(self.rows.test)
        return self.task.score([rows[i] for i in places], [answers[i] for i in places])

    def _score_by_transformers(self, model, answers: list) -> dict:
        """Save, load with transformers, score some rows with both: every n-th, so of all kinds."""
        import transformers

        some = slice(None, None, max(1, len(answers) // SCORED_BY_TRANSFORMERS))
        rows = self.rows.test[some]
        with tempfile.TemporaryDirectory() as folder:
            fine_tuning.save(self.task, model, self.tokenizer, folder)
            theirs = Theirs.load(self.task.name, folder, self.tokenizer.pad_token_id)
            found = fine_tuning.evaluate(self.task, theirs, self.tokenizer, rows)
        return {
            "version": transformers.__version__,
            "rows": len(rows),
            "ours": self.task.score(rows, answers[some]),
            "theirs": found,
        }

    def _worth_keeping(self, model, answers: list) -> dict:
        """Answers that the chapter counts or shows."""
        name, rows = self.task.name, self.rows.test
        if name == "sentence-embedding":
            queries, texts = torch.stack(answers).unbind(dim=1)  # 2 × (B, C)
            words, vectors = task_data.bm25_ranking(rows), queries @ texts.T  # 2 × (B, B)
            ways = {"BM25": words, "mini": vectors, "both": standard(words) + standard(vectors)}
            return {way: fine_tuning.ranks_of(rows, x).tolist() for way, x in ways.items()}
        if name == "sequence-classification":
            labels = sorted(model.config.label2id)
            return {
                "labels": labels,
                "truth": [labels.index(row["label"]) for row in rows],
                "found": [labels.index(answer) for answer in answers],
            }
        if name == "multiple-choice":
            return {"found": answers}
        if name == "question-answering":
            return {"found": answers, "logits": self._logits(model)}
        return {"found": answers[:8]}

    def _logits(self, model, rows: int = 3) -> list[dict]:
        """How well an answer could start and end at each token, for the first rows."""
        found = []
        for row in self.rows.test[:rows]:
            (feature,) = self.task.features(
                [row], self.tokenizer, model, self.task.defaults.max_length
            )
            with torch.no_grad():
                out = model(**self.task.stream(model, [feature]))
            inside = slice(feature["skip"], -1)
            tokens = [row["context"][a:b] for a, b in feature["offsets"]]
            starts, ends = (
                [round(x, 2) for x in scores[inside].tolist()]
                for scores in (out.start_logits, out.end_logits)
            )
            found.append({"tokens": tokens, "starts": starts, "ends": ends})
        return found


def standard(scores: torch.Tensor) -> torch.Tensor:
    """Scores of each query, (B, B), with mean 0 and standard deviation 1, so that they add up."""
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def same_origin() -> dict:
    """What all runs of a record share, beside the settings."""
    weights = (find_folder("mini") / "model.safetensors").read_bytes()
    return {"weights": hashlib.sha256(weights).hexdigest(), "torch": torch.__version__}


def read() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def write(record: dict) -> None:
    """Write the record whole, tasks in their order, a list of numbers on one line."""
    ordered = {name: record[name] for name in TASKS if name in record}
    text = json.dumps(ordered, indent=1, ensure_ascii=False)
    numbers = r"\[\s+(-?\d[^\[\]{}\"]*?)\s+\]"
    text = re.sub(numbers, lambda found: "[" + " ".join(found[1].split()) + "]", text)
    with atomic.writing(RECORD) as file:
        file.write(text.encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK")
    parser.add_argument("--again", action="store_true", help="throw away what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that heads are new
    record, origin, open_tasks = read(), same_origin(), {}
    for name in options.tasks:
        now = {**origin, "settings": asdict(TASKS[name].defaults)}
        old = record.get(name, {})
        if options.again or any(old.get(key) != value for key, value in now.items()):
            record[name] = {**now, "runs": {}}
    for name, kind, seed in jobs(options.tasks):
        runs = record[name]["runs"].setdefault(kind, [])
        if seed in [run["seed"] for run in runs]:
            continue
        if name not in open_tasks:
            open_tasks[name] = TaskRecord(name)
        if "baseline" not in record[name]:
            record[name] |= open_tasks[name].head()
        if name in READS_A_PART and "as_read" not in record[name]["baseline"]:
            record[name]["baseline"]["as_read"] = open_tasks[name].as_read()
        run, more = open_tasks[name].run(kind, seed)
        runs.append(run)
        record[name] |= more | {
            "cpu": processor_name(),
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
        }
        write(record)
        shown = {key: round(value, 4) for key, value in run["scores"].items()}
        print(f"{name}, {kind}, seed {seed}: {shown}, {run['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
