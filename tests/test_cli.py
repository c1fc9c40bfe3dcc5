"""The command line: its output, its errors, its speed."""

import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modernbert_mini
from modernbert_mini import benchmark, cli, data
from modernbert_mini.config import ModernBertConfig
from modernbert_mini.fill_mask import FillMask
from modernbert_mini.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert_mini.sources import find_folder
from modernbert_mini.tokenizer import Tokenizer, train_bpe

TEXT = "the [MASK] sat on the mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole random checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(train_bpe([TEXT, "a cat, a hat and a bat"], 280))
    tokenizer.save_pretrained(folder)
    model = ModernBertForMaskedLM(small_config(len(tokenizer)))
    model.init_weights()
    model.save_pretrained(folder)
    return folder


def small_config(vocab_size: int) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=6,
        initializer_range=0.5,
        pad_token_id=vocab_size - 2,
        cls_token_id=vocab_size - 4,
        sep_token_id=vocab_size - 3,
        bos_token_id=vocab_size - 4,
        eos_token_id=vocab_size - 3,
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: exit code, output, messages."""

    def run(*arguments, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        return code, *capsys.readouterr()

    return run


def run_process(*arguments) -> subprocess.CompletedProcess:
    """Run it as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "modernbert_mini", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def spoken(encoding: str, *arguments) -> bytes:
    """What it prints where standard output has this encoding."""
    command = [sys.executable, "-m", "modernbert_mini", *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, check=True, env=environment).stdout


# --- fill-mask --------------------------------------------------------------------------------


def test_a_terminal_that_knows_few_letters_stops_nothing(folder):
    text = "東京 Δ the cat sat on the [MASK]."
    asked = ("fill-mask", text, "--model", folder, "--top-k", 1)
    assert "東京 Δ" in spoken("utf-8", *asked).decode("utf-8")
    assert "?? ? the cat" in spoken("cp1252", *asked).decode("cp1252")
    (found,) = json.loads(spoken("cp1252", *asked, "--json"))
    assert found["sequence"].startswith("東京 Δ")


def test_fill_mask_names_the_weights_and_prints_the_answers(run, folder):
    code, out, err = run("fill-mask", TEXT, "--model", folder, "--top-k", 3)
    model = ModernBertForMaskedLM.from_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    first, _, text, *answers = out.splitlines()
    assert (code, err) == (0, "")
    assert first == f"weights: {folder.resolve()}, {size:,} parameters, float32"
    assert text == TEXT
    assert len(answers) == 3
    for line, answer in zip(
        answers, FillMask(model, Tokenizer.from_pretrained(folder))(TEXT, top_k=3), strict=True
    ):
        assert line.split("%")[0].strip() == f"{100 * answer['score']:.2f}"
        assert line.endswith(answer["sequence"])


def test_json_is_pure_and_what_the_pipeline_returns(run, folder):
    fill = FillMask(
        ModernBertForMaskedLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    )
    for texts in ([TEXT], [TEXT, "a [MASK] and a [MASK]"]):
        code, out, err = run("fill-mask", *texts, "--model", folder, "--json")
        assert code == 0
        assert err.startswith("weights: ")
        assert json.loads(out) == fill(texts)


def test_several_texts_and_masks_are_told_apart(run, folder):
    code, out, _ = run("fill-mask", TEXT, "a [MASK] and a [MASK]", "--model", folder, "--top-k", 1)
    assert code == 0
    blocks = out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks[1:]] == [TEXT, "a [MASK] and a [MASK]"]
    assert [line for line in out.splitlines() if line.startswith("mask ")] == ["mask 1", "mask 2"]


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_lines_are_read_from_a_pipe(run, folder, arguments):
    lines = f"{TEXT}\r\n\n  \na [MASK], naïve"
    code, out, _ = run("fill-mask", *arguments, "--model", folder, "--json", stdin=lines)
    assert code == 0
    assert json.loads(out) == json.loads(
        run("fill-mask", TEXT, "a [MASK], naïve", "--model", folder, "--json")[1]
    )


def test_a_dash_mixes_piped_lines_with_texts(run, folder):
    _, out, _ = run("fill-mask", "the [MASK]", "-", "a [MASK]", "--model", folder, stdin=TEXT)
    masked = [line for line in out.splitlines() if "[MASK]" in line and "%" not in line]
    assert masked == ["the [MASK]", TEXT, "a [MASK]"]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_can_be_chosen(run, folder, name):
    code, out, _ = run("fill-mask", TEXT, "--model", folder, "--attn-implementation", name)
    assert code == 0
    assert out == run("fill-mask", TEXT, "--model", folder)[1]


def test_the_dtype_can_be_chosen(run, folder):
    code, out, _ = run("fill-mask", TEXT, "--model", folder, "--dtype", "bfloat16")
    assert (code, out.splitlines()[0].rsplit(", ", 1)[1]) == (0, "bfloat16")


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_shows_config_layers_parameters_and_tensors(run, folder):
    code, out, err = run("inspect", folder)
    assert (code, err) == (0, "")
    assert "G L L G" in out
    assert "local, sees 3 tokens on either side; rotary base 10,000" in out
    model = ModernBertForMaskedLM.from_pretrained(folder)
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}" in out
    assert "  4 ×  model.layers.*.attn.Wqkv.weight" in out


def test_inspect_as_json_adds_up(run, folder):
    code, out, _ = run("inspect", folder, "--json")
    report = json.loads(out)
    model = ModernBertForMaskedLM.from_pretrained(folder)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert code == 0
    assert sum(report["parameters"].values()) == sum(sizes.values())
    assert report["parameters"]["embeddings"] == sizes["model.embeddings.tok_embeddings.weight"]
    assert report["parameters"]["head"] == sum(
        n for name, n in sizes.items() if not name.startswith("model.") and "norm" not in name
    )
    assert {tensor["name"] for tensor in report["tensors"]} == set(sizes)
    assert ModernBertConfig.from_dict(report["config"]) == model.config


def test_inspect_reads_shards_and_pickles_too(run, folder, tmp_path):
    model = ModernBertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=10_000)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(model.config.to_dict()))
    names = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(names, tmp_path / "old" / "pytorch_model.bin")
    for kind in ("sharded", "old"):
        code, out, _ = run("inspect", tmp_path / kind, "--json")
        tensors = json.loads(out)["tensors"]
        assert code == 0
        assert {t["name"]: t["shape"] for t in tensors} == {
            name: list(tensor.shape) for name, tensor in names.items()
        }
        assert len({tensor["file"] for tensor in tensors}) == (1 if kind == "old" else 6)


def test_inspect_counts_the_head_that_the_config_names(run, tmp_path):
    model = ModernBertForSequenceClassification(small_config(280))
    model.init_weights()
    model.save_pretrained(tmp_path)
    counts = json.loads(run("inspect", tmp_path, "--json")[1])["parameters"]
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_inspect_of_a_published_config_gives_the_published_size(run, reference):
    code, out, _ = run("inspect", reference / "ModernBERT-base")
    assert code == 0
    assert "parameters: 149,655,232" in out
    assert "holds no weights" in out


# --- benchmark --------------------------------------------------------------------------------


@pytest.fixture
def tiny_work(monkeypatch) -> dict[str, benchmark.Row]:
    """Rows and a shape that take no time."""
    rows = {
        name: benchmark.Row(name, f"the {name} one", task, (3, 20, 7))
        for name, task in (("first", "encode"), ("second", "score"))
    }
    monkeypatch.setattr(benchmark, "table_rows", lambda quick: rows)
    monkeypatch.setattr(benchmark, "shape_config", lambda shape: small_config(280))
    monkeypatch.setattr(benchmark, "gemm_rate", lambda device: 1e9)
    return rows


def test_benchmark_prints_writes_and_draws(run, tiny_work, tmp_path):
    speed, picture = tmp_path / "speed.json", tmp_path / "speed.svg"
    code, out, err = run("benchmark", "--quick", "--json", speed, "--plot", picture)
    assert (code, err) == (0, "")
    machine, _, *tables = out.split("\n", 2)
    report = json.loads(speed.read_text(encoding="utf-8"))
    assert f"torch {torch.__version__}" in machine and report["machine"]["cpu"] in machine
    assert "the first one · mini\n" in tables[0] and "the second one · mini\n" in tables[0]
    assert tables[0].count("modernbert-mini ") == 2
    assert [result["row"] for result in report["results"]] == ["first", "second"]
    assert report["settings"] == {"repeats": 3, "quick": True, "seed": 0}
    assert all(len(e["seconds"]) == 3 for r in report["results"] for e in r["entries"])
    assert "the first one" not in err and picture.read_text().startswith("<?xml")


def test_benchmark_does_what_it_is_asked_for(run, tiny_work):
    threads = torch.get_num_threads()
    try:
        code, out, _ = run(
            *("benchmark", "--quick", "--rows", "second", "--shape", "base", "17m"),
            *("--repeats", 1, "--threads", 1),
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    assert "1 of " in out.splitlines()[0]
    assert [line for line in out.splitlines() if "·" in line] == [
        "the second one · base",
        "the second one · 17m",
    ]


@pytest.mark.parametrize("asked", [False, True])
def test_benchmark_compiles_when_asked(run, tiny_work, monkeypatch, asked):
    given = []
    contenders = benchmark.contenders

    def noted(row, device, compiled=False):
        given.append(compiled)
        return contenders(row, device)  # compiling takes minutes

    monkeypatch.setattr(benchmark, "contenders", noted)
    code, _, err = run("benchmark", "--quick", "--repeats", 1, *["--compile"] * asked)
    assert (code, err) == (0, "")
    assert set(given) == {asked}


def test_benchmark_shows_its_progress_at_a_terminal(run, tiny_work, monkeypatch, capsys):
    # tqdm asks the stream that it writes to
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    code, out, err = run("benchmark", "--quick", "--repeats", 1)
    assert code == 0
    assert "first mini: modernbert-mini" in err
    assert "first mini" not in out


def test_benchmark_that_is_interrupted_keeps_what_is_finished(
    run, tiny_work, tmp_path, monkeypatch
):
    measure = benchmark.measure

    def interrupted(row, *more):
        if row.name == "second":
            raise KeyboardInterrupt
        return measure(row, *more)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    speed, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    code, out, err = run("benchmark", "--quick", "--json", speed, "--plot", picture)
    assert code == 130
    assert err == "modernbert-mini: 1 of 2 rows are finished\n"
    assert "the first one · mini" in out
    assert [result["row"] for result in json.loads(speed.read_text())["results"]] == ["first"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_benchmark_reports_nothing_where_outputs_differ(run, tiny_work, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "difference", lambda a, b: 1.0)
    speed = tmp_path / "speed.json"
    code, out, err = run("benchmark", "--quick", "--json", speed)
    assert code == 2
    assert "disagree" in err and "Nothing was timed" in err
    assert "·" not in out and not speed.exists()


def test_benchmark_names_the_rows_and_shapes_in_its_help(run):
    text = run("benchmark", "--help")[1]
    for name in (*benchmark.table_rows(), *benchmark.SHAPES):
        assert re.search(rf"\b{name}\b", text), name


# --- pretrain ---------------------------------------------------------------------------------

RECIPE = """
folder = "{folder}"
training_tokens = 1024
warmup_tokens = 256
decay_tokens = 256
batch_tokens = 256
max_sequence_length = 32
vocab_size = 300
{more}

[corpora]
python-docs = 1

[model]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 2
num_attention_heads = 2
local_attention = 8
max_position_embeddings = 128
"""


@pytest.fixture
def few(monkeypatch):
    texts = tuple(f"the cat sat on the mat {n} times" for n in range(100))
    corpus = data.Corpus("python-docs", texts, "this test", "none")
    monkeypatch.setattr(data, "python_docs", lambda: corpus)


def test_pretrain_leaves_a_checkpoint_that_fills_masks(run, tmp_path, few):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=(tmp_path / "run").as_posix(), more=""))
    code, out, err = run("pretrain", "--config", recipe)
    assert (code, err) == (0, "")
    assert f"model: {tmp_path / 'run' / 'model'}" in out
    assert re.search(r"held-out loss \d+\.\d+, masked accuracy top-1 [\d.]+%, top-5 [\d.]+%", out)
    for name in ("log.jsonl", "loss.png", "checkpoint.pt", "recipe.json"):
        assert (tmp_path / "run" / name).exists()
    code, out, err = run("fill-mask", TEXT, "--model", tmp_path / "run" / "model")
    assert (code, err) == (0, "")


def test_pretrain_goes_on_only_when_told_to(run, tmp_path, few):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=(tmp_path / "run").as_posix(), more=""))
    assert run("pretrain", "--config", recipe, "--resume")[0] == 0  # nothing there yet: a start
    code, _, err = run("pretrain", "--config", recipe)
    assert code == 2 and "a run in this folder" in err and "--resume" in err
    assert run("pretrain", "--config", recipe, "--resume")[0] == 0


def test_pretrain_takes_text_and_folder_of_the_readers_own(run, tmp_path):
    texts = tmp_path / "letters"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 20)
    for n in range(80):
        (texts / f"{n}.txt").write_text(f"letter {n} of a cat")
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "mine"
    recipe.write_text(RECIPE.format(folder="elsewhere", more="held_out_percent = 20"))
    places = ("--corpus", texts, "--folder", folder)
    code, out, err = run("pretrain", "--config", recipe, *places)
    assert (code, err) == (0, "") and f"model: {folder / 'model'}" in out
    (about,) = json.loads((folder / "corpora.json").read_text())["corpora"]
    assert (about["name"], about["documents"]) == ("letters", 100)


def test_pretrain_that_is_interrupted_says_how_to_go_on(run, tmp_path, few, monkeypatch):
    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("modernbert_mini.pretraining.train", stop)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=(tmp_path / "run").as_posix(), more=""))
    code, _, err = run("pretrain", "--config", recipe)
    assert code == 130 and "--resume" in err


def test_pretrain_reads_yaml_too(run, tmp_path, few):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"folder: {(tmp_path / 'run').as_posix()}\n"
        "corpora: {python-docs: 1}\n"
        "training_tokens: 1 thousand\nwarmup_tokens: 0\ndecay_tokens: 0\nbatch_tokens: 256\n"
        "max_sequence_length: 32\nvocab_size: 300\nlearning_rate: 8e-4\n"
        "model: {hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,"
        " num_attention_heads: 2}\n"
    )
    code, out, err = run("pretrain", "--config", recipe)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("no_such_field = 1", "unknown field 'no_such_field'"),
        ("learning_rat = 1", "Did you mean learning_rate?"),
        ("not TOML", "line"),
        ("seed = 'one'", "seed 'one'"),
        ("optimizer = 'Adam'", "one of StableAdamW, AdamW"),
    ],
)
def test_pretrain_refuses_a_bad_recipe(run, tmp_path, more, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path.as_posix(), more=more))
    code, _, err = run("pretrain", "--config", recipe)
    assert code == 2
    assert err.startswith("modernbert-mini: error: ")
    assert said in err and str(recipe) in err


# --- fine-tune --------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    """Forty rows of two classes that one word tells apart."""
    file = tmp_path / "rows.csv"
    lines = [
        f"the {'cat' if i % 2 else 'hat'} {i} sat,{'cat' if i % 2 else 'hat'}" for i in range(40)
    ]
    file.write_text("text,label\n" + "\n".join(lines) + "\n")
    return file


def test_fine_tune_trains_scores_saves_and_predicts(run, folder, rows, tmp_path):
    new = tmp_path / "new.jsonl"
    new.write_text('{"text": "the cat sat"}\n{"text": "the hat sat"}\n')
    arguments = ["fine-tune", "sequence-classification", rows, "--model", folder, "--test", rows]
    arguments += ["--epochs", 30, "--lr", 0.01, "--layer-decay", 1, "--predict", new]
    output = tmp_path / "tuned"
    code, out, err = run(*arguments, "--output", output, "--json", tmp_path / "report.json")
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == ["cat", "hat"]
    assert "40 rows to train on, 40 to test on" in err and "accuracy 1.0000" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["runs"][0]["accuracy"] == 1 and report["settings"]["lr"] == 0.01
    model = ModernBertForSequenceClassification.from_pretrained(output)
    assert list(model.config.id2label.values()) == ["cat", "hat"]
    assert len(Tokenizer.from_pretrained(output)) == model.config.vocab_size


def test_fine_tune_keeps_a_tenth_for_the_test_and_shows_the_spread(run, folder, rows):
    arguments = ("fine-tune", "sequence-classification", rows, "--model", folder, "--epochs", 0.1)
    code, out, err = run(*arguments, "--seeds", 0, 1)
    assert (code, out) == (0, "")
    train, test = map(int, re.search(r"(\d+) rows to train on, (\d+) to test on", err).groups())
    assert train + test == 40 and 1 <= test <= 10
    assert re.search(r"seed 1: .+; accuracy", err)
    assert re.search(r"accuracy \d\.\d+ ± \d\.\d+ over 2 seeds", err)


def test_fine_tune_states_the_baseline(run, folder, tmp_path):
    rows = [{"words": ["a", "cat"], "labels": ["O", "X"]}] * 4
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["fine-tune", "token-classification", file, "--test", file, "--model", folder]
    code, _, err = run(*arguments, "--epochs", 0.1, "--baseline")
    assert code == 0
    assert "baseline, each word's usual label: accuracy 1.0000, macro_f1 1.0000" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ner", "ROWS"], "task 'ner' is not one of sequence-classification, token-"),
        (["token-classification", "ROWS"], "40 bad rows"),
        (["sequence-classification", "ROWS", "--predict", "BAD"], "line 2: 'text' is empty"),
        (["sequence-classification", "BAD"], "line 2: 'text' is empty"),
        (["sequence-classification", "none.csv"], "none.csv"),
        (["sequence-classification", "ROWS", "--output", "no/such/folder"], "no such folder"),
        (["sequence-classification", "ROWS", "--lr", "0"], "0 is not above 0"),
    ],
)
def test_fine_tune_refuses_before_it_trains(run, rows, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("modernbert_mini.fine_tuning.fine_tune", None)
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\n,a\n")
    names = {"ROWS": rows, "BAD": bad}
    code, out, err = run("fine-tune", *(names.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    assert message in err


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fill-mask", "no mask here", "--model", "FOLDER"], "no [MASK] in the text"),
        (["fill-mask", TEXT, "--model", "/no/such/folder"], "/no/such/folder"),
        (["inspect", "/no/such/folder"], "/no/such/folder"),
        (["fill-mask", TEXT, "--model", "FOLDER", "--attn-implementation", "magic"], "magic"),
        (["fill-mask", TEXT, "--model", "FOLDER", "--device", "toaster"], "toaster"),
        (["fill-mask", TEXT, "--model", "FOLDER", "--top-k", "0"], "not above 0"),
        (["fill-mask", TEXT, "--dtype", "int8"], "invalid choice"),
        (["benchmark", "--rows", "slow"], "no row 'slow': there are skewed, long, even"),
        (["benchmark", "--shape", "huge"], "no shape 'huge': there are base, 17m, mini"),
        (["benchmark", "--repeats", "0"], "not above 0"),
        (["benchmark", "--device", "toaster"], "toaster"),
        (["benchmark", "--device", "mps"], "cpu or cuda"),
        (["benchmark", "--plot", "speed.txt"], "speed.txt: a picture ends in one of"),
        (["benchmark", "--json", "/no/such/folder/speed.json"], "no such folder"),
        (["pretrain", "--config", "/no/such/recipe.toml"], "/no/such/recipe.toml"),
        (["pretrain"], "--config"),
        (["no-such-command"], "invalid choice"),
        ([], "required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_readable_message(run, folder, arguments, message):
    code, out, err = run(*(str(folder) if a == "FOLDER" else a for a in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert "weights" in out or out == ""
    assert err.splitlines()[-1].startswith("modernbert-mini")


@pytest.mark.parametrize("stdin", ["", "\n  \n"])
def test_no_text_and_no_input_is_an_error(run, folder, stdin):
    code, _, err = run("fill-mask", "--model", folder, stdin=stdin)
    assert code == 2
    assert "no text" in err


def test_a_terminal_is_not_waited_for(run, folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    code, _, err = run("fill-mask", "--model", folder)
    assert code == 2
    assert "no text" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_said(run, folder):
    code, _, err = run("fill-mask", TEXT, "--model", folder, "--device", "cuda")
    assert code == 2
    assert "no CUDA device" in err


def test_warnings_are_lines_of_the_command_line(run, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("head.")},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    Tokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    code, _, err = run("fill-mask", TEXT, "--model", tmp_path)
    assert code == 0
    assert err.startswith("modernbert-mini: warning: ")
    assert "head.dense.weight" in err


def test_a_reader_that_leaves_early_is_no_error(folder):
    command = f'"{sys.executable}" -m modernbert_mini inspect "{folder}" --json | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


# --- Help, version, speed ---------------------------------------------------------------------


def test_help_and_version(run):
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"modernbert-mini {modernbert_mini.__version__}")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("fill-mask", "inspect", "benchmark", "pretrain"):
        assert command in out
        assert "--" in run(command, "--help")[1]


def test_the_script_and_the_module_are_the_same(folder):
    script = Path(sys.executable).with_name("modernbert-mini")
    if not script.exists():
        pytest.skip("the package is not installed, so there is no script")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.stdout == run_process("--help").stdout


def imported_by(*arguments) -> set[str]:
    """The modules in memory once a command has run."""
    code = (
        "import sys; from modernbert_mini.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    return set(done.stdout.splitlines())


def test_help_imports_nothing_heavy():
    assert not {"torch", "numpy", "tokenizers"} & imported_by("--help")


def test_filling_a_mask_imports_what_it_needs_and_no_more(folder):
    modules = imported_by("fill-mask", TEXT, "--model", folder)
    assert "torch" in modules
    needless = {"torch._dynamo", "transformers", "matplotlib", "huggingface_hub", "sympy"}
    assert not needless & modules


def test_an_answer_takes_less_than_five_seconds():
    if not (find_folder("mini") / "model.safetensors").exists():
        pytest.skip("the embedded checkpoint is not here yet")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_process("fill-mask", "The capital of France is [MASK].")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weights: mini (embedded in ")
    # processor time, so that other work on the machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
