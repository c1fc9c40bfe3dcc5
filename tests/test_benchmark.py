"""The benchmark: what it counts, what it refuses, what it reports."""

import dataclasses
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modernbert_mini import benchmark, heads, model
from modernbert_mini.alternating_attention import window_mask
from modernbert_mini.benchmark import Contender, Entry, Result, Row
from modernbert_mini.config import ModernBertConfig

CPU = torch.device("cpu")
TINY = ModernBertConfig(
    vocab_size=101,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=2,
    local_attention=8,
    pad_token_id=100,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
    initializer_range=0.2,
)
ROWS = {
    task: Row(task, f"some {task}", task, (5, 30, 2, 17, 9, 12))
    for task in ("encode", "score", "train")
}


def needs_transformers():
    pytest.importorskip("transformers", minversion="5")


@pytest.fixture
def alone(monkeypatch):
    """A machine without transformers."""
    find = benchmark.importlib.util.find_spec
    monkeypatch.setattr(
        benchmark.importlib.util,
        "find_spec",
        lambda name, *more: None if name == "transformers" else find(name, *more),
    )


# --- the work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "name"), [("base", "ModernBERT-base"), ("17m", "ettin-encoder-17m")]
)
def test_a_shape_is_the_published_one(reference, shape, name):
    path = reference / "configs" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the reference data")
    published = ModernBertConfig.from_file(path)
    assert benchmark.shape_config(shape) == dataclasses.replace(published, extra={})


def test_every_shape_has_a_config():
    widths = [benchmark.shape_config(shape).hidden_size for shape in benchmark.SHAPES]
    assert widths == [768, 256, 192]


@pytest.mark.parametrize(("texts", "longest"), [(32, 512), (8, 256), (1, 64)])
def test_lengths_are_skewed(texts, longest):
    lengths = benchmark.skewed_lengths(texts, longest)
    assert len(lengths) == texts
    assert 4 <= min(lengths) <= max(lengths) <= longest
    if texts > 1:
        assert max(lengths) == longest
        assert statistics.mean(lengths) > statistics.median(lengths)
        assert list(lengths) != sorted(lengths)


def test_lengths_follow_the_log_normal_law():
    logs = [math.log(x) for x in benchmark.skewed_lengths(1000, 10**9, median=100, deviation=0.9)]
    assert statistics.median(logs) == pytest.approx(math.log(100), abs=0.01)
    assert statistics.stdev(logs) == pytest.approx(0.9, abs=0.01)


def test_a_quick_run_has_the_same_rows_with_less_work():
    full, quick = benchmark.table_rows(), benchmark.table_rows(quick=True)
    assert list(full) == list(quick)
    for name, row in full.items():
        assert (row.task, row.is_padded) == (quick[name].task, quick[name].is_padded)
        assert sum(row.lengths) >= 4 * sum(quick[name].lengths)
    assert full["long"].lengths == (8192,)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("half_window", [0, 1, 4, 8, 100])
def test_pairs_are_those_of_the_mask(length, half_window):
    mask = window_mask(length, half_window)
    assert benchmark.needed_pairs(length, half_window) == mask.sum()
    assert benchmark.needed_pairs(length, None) == length**2


def counted_flops(task: str, config: ModernBertConfig, lengths: tuple[int, ...]) -> tuple:
    """What torch counts in our eager model, text by text, and the labels it was given."""
    row = Row("", "", task, lengths)
    config = dataclasses.replace(config, sparse_prediction=True)
    cls = model.ModernBertModel if task == "encode" else heads.ModernBertForMaskedLM
    net = cls(config, "eager")
    batch = benchmark.make_batch(row, config, CPU)
    labelled = batch.labels != -100
    total = 0
    for i, length in enumerate(lengths):
        labels = batch.labels[i : i + 1, :length]
        if task != "encode" and not (labels != -100).any():
            labels = batch.ids[i : i + 1, :length].clone()
            labels[:, 1:] = -100
            labelled[i, 0] = True
        inputs = {} if task == "encode" else {"labels": labels}
        with FlopCounterMode(display=False) as counter:
            output = net(batch.ids[i : i + 1, :length], **inputs)
            if task == "train":
                output.loss.backward()
        total += counter.get_total_flops()
    return total, int(labelled.sum()), row


@pytest.mark.parametrize("task", ["encode", "score", "train"])
@pytest.mark.parametrize("lengths", [(37,), (5, 30, 1, 17)])
def test_flops_are_those_that_torch_counts(task, lengths):
    # The eager backend computes every pair; with a window beyond the text, all are needed.
    config = dataclasses.replace(TINY, local_attention=200)
    total, hidden, row = counted_flops(task, config, lengths)
    assert benchmark.count_flops(config, row, hidden) == total


def test_pairs_outside_of_the_window_are_not_needed():
    total, _, row = counted_flops("encode", TINY, (37, 5))
    local = TINY.layer_types.count("sliding_attention")
    needless = sum(n**2 - int(window_mask(n, TINY.half_window).sum()) for n in (37, 5))
    expected = total - local * needless * 4 * TINY.hidden_size
    assert local and needless
    assert benchmark.count_flops(TINY, row, 0) == expected


def test_only_real_tokens_have_labels():
    row = Row("", "", "score", benchmark.skewed_lengths(32, 512))
    batch = benchmark.make_batch(row, TINY, CPU)
    real = batch.mask.bool()
    chosen = batch.labels != -100
    assert real.sum(dim=1).tolist() == list(row.lengths)
    assert (batch.ids[real] < TINY.pad_token_id).all()
    assert (batch.ids[~real] == TINY.pad_token_id).all()
    assert not chosen[~real].any()
    assert torch.equal(batch.labels[chosen], batch.ids[chosen])
    assert batch.hidden / sum(row.lengths) == pytest.approx(0.15, abs=0.02)


def test_two_batches_are_the_same():
    a, b = (benchmark.make_batch(ROWS["score"], TINY, CPU) for _ in range(2))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(
    ("names", "shapes", "quick", "expected"),
    [
        (None, None, False, [("17m", n) for n in benchmark.table_rows()]),
        (None, None, True, [("mini", n) for n in benchmark.table_rows()]),
        (None, ["base"], False, [("base", n) for n in ("skewed", "long", "even")]),
        (["mlm-train"], ["base"], False, [("base", "mlm-train")]),
        (["long", "skewed"], ["mini", "17m"], True, None),
    ],
)
def test_the_work_is_what_was_asked_for(names, shapes, quick, expected):
    if expected is None:
        expected = [(shape, name) for shape in shapes for name in ("skewed", "long")]
    work = benchmark.select_work(names, shapes, quick)
    assert [(shape, row.name) for row, shape in work] == expected


# --- who does it ------------------------------------------------------------------------------


def names(row: Row, device: torch.device = CPU) -> list[str]:
    return [contender.name for contender in benchmark.contenders(row, device)]


def test_without_transformers_we_are_alone(alone):
    assert "not installed" in benchmark.missing_reason()
    for row in benchmark.table_rows().values():
        assert names(row) == ["modernbert-mini"]


def test_an_old_transformers_is_not_compared(monkeypatch):
    needs_transformers()
    monkeypatch.setattr(benchmark.importlib.metadata, "version", lambda name: "4.57.1")
    assert "4.57.1 is too old" in benchmark.missing_reason()
    assert names(ROWS["encode"]) == ["modernbert-mini"]


def test_the_contenders_of_a_cpu():
    needs_transformers()
    rows = benchmark.table_rows()
    assert benchmark.missing_reason() is None
    assert names(rows["long"]) == names(rows["even"]) == ["modernbert-mini", "transformers sdpa"]
    assert names(rows["skewed"])[2:] == ["transformers sdpa, sorted, 4 at a time"]
    assert names(rows["mlm-train"])[2:] == ["transformers sdpa, sparse_prediction"]
    assert names(rows["mlm-score"])[2:] == ["transformers sdpa, logits where hidden"]


def test_a_cpu_compiles_only_when_asked():
    plain, compiled = (benchmark.contenders(ROWS["encode"], CPU, asked) for asked in (False, True))
    assert not any(contender.compiled for contender in plain)
    assert set(plain) < set(compiled) and compiled[0] == plain[0]
    assert [c.name for c in compiled if c.compiled and c.is_ours] == ["modernbert-mini, compiled"]
    assert not any(c.compiled for c in benchmark.contenders(ROWS["train"], CPU, True))


@pytest.mark.parametrize("lengths", [(5, 30, 2, 17), (30, 30)], ids=["skewed", "even"])
def test_a_compiled_encoder_gives_the_same_numbers(monkeypatch, lengths):
    compile_, given = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda net, **how: given.append(how) or compile_(net, backend="eager")
    )
    row = Row("", "", "encode", lengths)
    batch = benchmark.make_batch(row, TINY, CPU)
    outputs = []
    for compiled in (False, True):
        contender = Contender("modernbert-mini", "auto", compiled=compiled)
        net = benchmark.build_model(contender, row, TINY, CPU)
        job = benchmark.make_job(contender, net, batch, row)
        outputs.append(job.collect(job.run()))
    assert given == [{"fullgraph": True, "dynamic": True}]
    assert isinstance(net, benchmark.CompiledEncoder)
    assert benchmark.difference(*outputs) < 1e-5


@pytest.mark.parametrize("flash", [False, True])
def test_the_contenders_of_a_gpu(monkeypatch, flash):
    needs_transformers()
    monkeypatch.setattr(benchmark, "has_flash_attention", lambda device: flash)
    monkeypatch.setattr(benchmark, "best_dtype", lambda device: torch.bfloat16)
    encode, train = (names(ROWS[task], torch.device("cuda")) for task in ("encode", "train"))
    assert encode[:2] == ["modernbert-mini", "modernbert-mini, compiled"]
    assert "transformers sdpa, compiled" in encode
    assert ("transformers flash_attention_2" in encode) == flash
    assert ("transformers flash_attention_2, sparse_prediction" in train) == flash
    assert not any("compiled" in name for name in train)


def test_an_older_gpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not any("compiled" in name for name in names(ROWS["encode"], torch.device("cuda")))


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [(True, (8, 0), True), (True, (7, 5), False), (False, (9, 0), False)],
)
def test_flash_attention_needs_its_package_and_an_ampere(
    monkeypatch, installed, capability, expected
):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert benchmark.has_flash_attention(device) == expected
    half = torch.bfloat16 if capability >= (8, 0) else torch.float16
    assert benchmark.best_dtype(device) == half
    assert benchmark.best_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("name", "words"), [("mps", "cpu or cuda"), ("cuda", "no CUDA device")])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        benchmark.find_device(name)


@pytest.mark.parametrize("task", list(ROWS))
def test_both_libraries_have_the_same_weights(task):
    needs_transformers()
    mine, *others = benchmark.contenders(ROWS[task], CPU)
    ours = benchmark.build_model(mine, ROWS[task], TINY, CPU).state_dict()
    theirs = benchmark.build_model(others[0], ROWS[task], TINY, CPU)
    assert type(theirs).__module__.startswith("transformers")
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(x, ours[name]) for name, x in theirs.state_dict().items())
    assert theirs.training == (task == "train")


def test_building_a_model_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    benchmark.build_model(Contender("modernbert-mini", "auto"), ROWS["encode"], TINY, CPU)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("size", [1, 4, 6, 50])
def test_sorted_texts_come_back_in_order(size):
    row, name = ROWS["encode"], "modernbert-mini"
    batch = benchmark.make_batch(row, TINY, CPU)
    whole = Contender(name, "auto")
    net = benchmark.build_model(whole, row, TINY, CPU)
    (expected,), (sorted_,) = (
        job.collect(job.run())
        for c in (whole, Contender(name, "auto", micro_batch=size))
        for job in [benchmark.make_job(c, net, batch, row)]
    )
    assert expected.shape == (sum(row.lengths), TINY.hidden_size)
    torch.testing.assert_close(sorted_, expected, atol=1e-5, rtol=1e-5)


def test_a_training_step_leaves_the_weights_as_they_are():
    row = ROWS["train"]
    contender = Contender("modernbert-mini", "auto", sparse=True)
    net = benchmark.build_model(contender, row, TINY, CPU)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    job = benchmark.make_job(contender, net, benchmark.make_batch(row, TINY, CPU), row)
    losses = {float(job.run()) for _ in range(2)}
    assert len(losses) == 1
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(p.grad is not None for p in net.parameters())


# --- equal first, then timed ------------------------------------------------------------------


def test_the_difference_is_that_of_the_worst_vector():
    a = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    b = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert benchmark.difference([a], [a]) == 0
    assert benchmark.difference([a, a], [a, b]) == pytest.approx(1.0)
    assert benchmark.difference([b], [a]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "other",
    [[torch.ones(3, 2)], [torch.ones(2, 2)] * 2, [torch.full((2, 2), math.nan)]],
    ids=["shape", "number", "nan"],
)
def test_what_cannot_be_compared_is_infinitely_far(other):
    assert benchmark.difference(other, [torch.ones(2, 2)]) == math.inf


@pytest.mark.parametrize("dtype", list(benchmark.TOLERANCE))
def test_the_gate_lets_rounding_pass_and_nothing_else(dtype):
    expected = [torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)]
    bound = benchmark.TOLERANCE[dtype]
    near, far = ([(expected[0].float() * (1 + f * bound)).to(dtype)] for f in (0.5, 2))
    assert 0 < benchmark.require_equal("it", near, expected) < bound
    with pytest.raises(benchmark.UnequalOutputs, match="it and modernbert-mini disagree"):
        benchmark.require_equal("it", far, expected)


@pytest.mark.parametrize("task", list(ROWS))
def test_contenders_that_disagree_are_not_timed(monkeypatch, task):
    """Our model sees one token less on each side, as if the window were cut wrongly."""
    needs_transformers()
    build = benchmark.build_model

    def wrong(contender, row, config, device):
        if contender.is_ours:
            config = dataclasses.replace(config, local_attention=config.local_attention - 2)
        return build(contender, row, config, device)

    monkeypatch.setattr(benchmark, "build_model", wrong)
    monkeypatch.setattr(benchmark, "time_rounds", lambda *a: pytest.fail("timed all the same"))
    with pytest.raises(benchmark.UnequalOutputs):
        benchmark.measure(ROWS[task], "tiny", TINY, CPU, 1)


class Clock:
    """Time that passes only where a run says so."""

    def __init__(self):
        self.now = 0.0
        self.ran = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds):
        def run():
            self.ran.append(name)
            self.now += next(seconds)

        return run


def test_runs_take_turns_and_each_is_first_in_its_turn():
    clock = Clock()
    seconds = {"a": [1.0, 2.0, 3.0], "b": [10.0, 20.0, 30.0]}
    runs = {name: clock.run(name, iter(values)) for name, values in seconds.items()}
    named = []
    timed, probed = benchmark.time_rounds(
        runs, 3, lambda: clock.now, lambda name: named.append(name), clock
    )
    assert timed == seconds
    assert clock.ran == named == ["a", "b", "b", "a", "a", "b"]
    assert probed == [0.0, 11.0, 33.0]


def test_nothing_but_the_run_is_timed():
    clock = Clock()

    def slow(*_):
        clock.now += 100
        return 1.0

    timed, _ = benchmark.time_rounds({"a": clock.run("a", iter([1.0]))}, 1, slow, slow, clock)
    assert timed == {"a": [1.0]}


def test_a_matrix_product_has_a_rate():
    assert 1e8 < benchmark.gemm_rate(CPU, repeats=1) < 1e15


# --- results ----------------------------------------------------------------------------------


def make_result(others: int = 1) -> Result:
    """Ours takes 1 and 4 and 2 seconds; the others 2 × and 3 × and 2 × as long."""
    entries = [Entry("modernbert-mini", [1.0, 4.0, 2.0], 0.0, 10_000_000)]
    for i in range(others):
        name = ["transformers sdpa", "transformers sdpa, sorted, 4 at a time"][i]
        entries.append(Entry(name, [2.0, 12.0, 4.0], 2e-7))
    row = Row("skewed", "encoder, some texts", "encode", (10, 5, 5))
    return Result(row, "tiny", 3_000_000_000, [6e9, 1e9, 3e9], entries)


def test_the_spread_is_median_and_quartiles():
    assert benchmark.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
    assert benchmark.spread([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_taken_within_a_round():
    result = make_result()
    assert result.ratio(result.entries[0]) == (1.0, 1.0, 1.0)
    # Of the medians, 4 and 2, it would be 2 too; of the sums, 18 and 7, it would be 2.6.
    assert result.ratio(result.entries[1]) == (2.0, 2.0, 2.5)


def test_shares_are_of_the_rate_of_that_round():
    result = make_result()
    assert result.gemm_share(result.entries[0]).median == pytest.approx(0.5)
    assert result.gemm_share(result.entries[0]).high == pytest.approx(0.625)


def test_the_table_says_it_all():
    heading, facts, columns, ours, theirs = benchmark.table_lines(make_result())
    assert heading == "encoder, some texts · tiny"
    assert facts == "20 tokens, 1.5 × with padding; 3 GFLOP; outputs differ by 2e-07 at most"
    assert re.split(" {2,}", columns)[1:] == list(benchmark.COLUMNS)
    assert ours.split() == ["modernbert-mini", "2.000", "10", "50%", "10", "MB"]
    assert theirs.split()[-3:] == ["2.00", "×", "(2.00–2.50)"]
    assert ours.index("2.000") + 5 == theirs.index("4.000") + 5 == columns.index("seconds") + 7
    even = dataclasses.replace(make_result(0), row=Row("", "", "encode", (8, 8)))
    assert "padding" not in benchmark.table_lines(even)[1]
    assert "differ" not in benchmark.table_lines(even)[1]


@pytest.mark.parametrize("others", [0, 1, 2])
def test_the_picture_has_a_bar_for_each_contender(others):
    result = make_result(others)
    figure = benchmark.draw([result, result])
    (axes,) = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == ([10.0] * 2 if others == 0 else [2.0] * 2 * others)
    headings = [text.get_text() for text in axes.texts if "some texts" in text.get_text()]
    assert headings == ["encoder, some texts · tiny"] * 2
    title = figure.get_suptitle()
    assert title == (
        "transformers takes 2.0 times as long as we do"
        if others
        else "How many tokens we do in a second"
    )
    assert "seconds" in axes.get_xlabel() or "per second" in axes.get_xlabel()


def test_a_picture_that_cannot_be_written_is_refused_early():
    for name in ("speed.png", "speed.SVG"):
        benchmark.check_plot_name(name)
    for name in ("speed.txt", "speed"):
        with pytest.raises(ValueError, match="ends in one of"):
            benchmark.check_plot_name(name)


SCHEMA = {
    "machine": {
        "device": str,
        "dtype": str,
        "cpu": str,
        "threads": int,
        "cores": int,
        "load_average": (float, type(None)),
        "system": str,
        "python": str,
        "torch": str,
        "transformers": (str, type(None)),
        "modernbert_mini": str,
        "commit": (str, type(None)),
        "date": str,
    },
    "settings": dict,
    "results": [
        {
            "row": str,
            "title": str,
            "shape": str,
            "task": str,
            "lengths": [int],
            "tokens": int,
            "padding": float,
            "flops": int,
            "gemm_flops_per_second": [float],
            "entries": [
                {
                    "name": str,
                    "seconds": [float],
                    "difference": float,
                    "peak_bytes": (int, type(None)),
                    "tokens_per_second": float,
                    "gemm_share": {"low": float, "median": float, "high": float},
                    "times_our_seconds": {"low": float, "median": float, "high": float},
                }
            ],
        }
    ],
}


def check_schema(value, schema, where="report"):
    if isinstance(schema, dict):
        assert value.keys() == schema.keys(), where
        for key, inner in schema.items():
            check_schema(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert value, where
        for item in value:
            check_schema(item, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), where


@pytest.mark.parametrize("task", list(ROWS))
def test_a_measured_row_fits_the_schema(tmp_path, task):
    needs_transformers()
    steps = []
    result = benchmark.measure(ROWS[task], "tiny", TINY, CPU, 2, False, steps.append)
    assert len(steps) == benchmark.count_steps(ROWS[task], CPU, 2, False)
    assert [entry.name for entry in result.entries] == names(ROWS[task])
    assert all(len(entry.seconds) == 2 for entry in result.entries)
    assert max(entry.difference for entry in result.entries) < 1e-5
    path = tmp_path / "speed.json"
    machine = benchmark.describe_machine(CPU)
    benchmark.write_json(path, machine, {"repeats": 2}, [result])
    report = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    check_schema(report, SCHEMA)
    assert report["machine"]["torch"] == torch.__version__
    assert report["results"][0]["entries"][0]["times_our_seconds"]["median"] == 1


def test_a_row_is_measured_without_transformers(alone):
    result = benchmark.measure(ROWS["encode"], "tiny", TINY, CPU, 1, False)
    assert [entry.name for entry in result.entries] == ["modernbert-mini"]
    assert benchmark.describe_machine(CPU)["transformers"] is None


def test_the_commit_is_that_of_the_package_itself(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    module = tmp_path / "package" / "benchmark.py"
    module.parent.mkdir()
    module.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    monkeypatch.setattr(benchmark, "__file__", str(module))
    assert benchmark.own_commit() is None  # no repository
    subprocess.run([*git, "init", "--quiet"], check=True)
    other = tmp_path / "other.txt"
    other.write_text("")
    subprocess.run([*git, "add", other], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    assert benchmark.own_commit() is None  # a repository that the package is no part of
    subprocess.run([*git, "add", module], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "y"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert head.stdout.startswith(benchmark.own_commit())
    module.write_text("changed")
    assert benchmark.own_commit().endswith("-dirty")
    monkeypatch.setenv("MODERNBERT_COMMIT", "abc1234")
    assert benchmark.own_commit() == "abc1234"


# --- what was recorded ------------------------------------------------------------------------

MACHINE = {
    "device": "cpu",
    "dtype": "float32",
    "cpu": "Some Processor",
    "threads": 2,
    "cores": 4,
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "commit": "abc1234",
    "date": "2026-11-23T12:00:00+00:00",
}


def make_report(others: int = 1, **machine) -> dict:
    return {
        "machine": MACHINE | machine,
        "settings": {"repeats": 3, "quick": False, "seed": 0},
        "results": [make_result(others).to_dict()],
    }


def test_what_was_not_recorded_is_said_in_a_line():
    assert benchmark.recorded("no-such-machine") is None
    assert benchmark.speed_table(None) == "Not yet measured."
    assert benchmark.speed_table(make_report() | {"results": []}) == "Not yet measured."


def test_the_recorded_table_has_a_line_for_each_peer():
    report = make_report(2)
    report["results"][0]["entries"][1]["peak_bytes"] = 50_000_000
    heading, rule, first, second, _, source = benchmark.speed_table(report).splitlines()
    assert heading.count("|") == rule.count("|") == first.count("|") == second.count("|") == 8
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == [
        *("encoder, some texts", "tiny", "transformers sdpa", "**2.00** (2.00–2.50)"),
        *("10 tokens/s", "50%", "10 of 50 MB"),
    ]
    assert "sorted, 4 at a time" in second and second.endswith("| 50% |  |")
    assert source.startswith("Measured on Some Processor, 2 of 4 cores, float32, torch 2.13.0")


def test_the_table_of_a_machine_without_transformers():
    report = make_report(0, transformers=None)
    *_, row, _, source = benchmark.speed_table(report).splitlines()
    assert row.split("|")[3].strip() == "nobody"
    assert "transformers" not in source


@pytest.mark.parametrize(
    "part",
    ["transformers 5.23.0", "commit abc1234", "2026-11-23:", "medians of 3 rounds", "quartiles"],
)
def test_the_provenance_says(part):
    assert part in benchmark.provenance(make_report())


def test_the_provenance_names_the_gpu_and_a_quick_run():
    report = make_report(device="Some Card", commit=None)
    report["settings"]["quick"] = True
    words = benchmark.provenance(report)
    assert words.startswith("Measured on Some Card (Some Processor, 2 of 4 cores)")
    assert "commit unknown" in words and "quick run" in words


@pytest.mark.parametrize("name", ["speed", "compiled", "gpu"])
def test_the_record_is_a_whole_run(name):
    report = benchmark.recorded(name)
    if report is None:
        pytest.skip(f"recorded/{name}.json: not yet measured")
    check_schema(report, SCHEMA)
    assert not report["settings"]["quick"] and report["settings"]["repeats"] >= 3
    assert report["machine"]["commit"] and report["machine"]["transformers"]
    assert (report["machine"]["device"] == "cpu") == (name != "gpu")
    for result in report["results"]:
        assert max(entry["difference"] for entry in result["entries"]) < 0.1
        config = benchmark.shape_config(result["shape"])
        row = Row("", "", result["task"], tuple(result["lengths"]))
        batch = benchmark.make_batch(row, config, CPU)
        assert result["flops"] == benchmark.count_flops(config, row, batch.hidden)
    assert benchmark.provenance(report) in benchmark.speed_table(report)


# --- memory -----------------------------------------------------------------------------------

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak"
)


@linux
def test_the_peak_is_that_of_the_run():
    size = 64 * 2**20
    before = torch.ones(size, dtype=torch.uint8)  # stands before, so it does not count
    peak = benchmark.peak_over(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert peak == pytest.approx(size, rel=0.1)
    assert benchmark.peak_over(lambda: before[0], CPU) < size / 10


def test_where_the_system_does_not_tell_there_is_no_peak(monkeypatch):
    def silent(name):
        raise OSError(name)

    monkeypatch.setattr(benchmark, "memory_of_process", silent)
    assert benchmark.peak_over(lambda: None, CPU) is None
    with pytest.raises(OSError, match="VmOdd"):
        monkeypatch.undo()
        benchmark.memory_of_process("VmOdd")


@linux
def test_memory_is_measured_in_a_process_of_its_own():
    wide = dataclasses.replace(TINY, vocab_size=40_001, pad_token_id=40_000)
    row = Row("", "", "score", (300,) * 4)
    peak = benchmark.peak_memory(Contender("modernbert-mini", "auto"), row, wide, CPU)
    logits = 4 * 300 * 4 * wide.vocab_size
    assert logits < peak < 3.5 * logits  # the stream's, and those of the batch


def test_a_process_that_dies_has_no_peak(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false") or "false")
    contender = Contender("modernbert-mini", "auto")
    assert benchmark.peak_memory(contender, ROWS["encode"], TINY, CPU) is None
