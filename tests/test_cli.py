"""The command line: its output, its errors, its speed."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modernbert_mini
from modernbert_mini import cli, data
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


# --- fill-mask --------------------------------------------------------------------------------


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


# --- pretrain ---------------------------------------------------------------------------------

RECIPE = """
folder = "{folder}"
total_tokens = 1024
warmup_tokens = 256
decay_tokens = 256
batch_tokens = 256
max_length = 32
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


def test_pretrain_leaves_a_checkpoint_that_fills_masks(run, tmp_path, monkeypatch):
    texts = tuple(f"the cat sat on the mat {n} times" for n in range(100))
    few = data.Corpus("python-docs", texts, "this test", "none", 1, "0")
    monkeypatch.setattr(data, "python_docs", lambda: few)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=(tmp_path / "run").as_posix(), more=""))
    code, out, err = run("pretrain", "--config", recipe)
    assert (code, err) == (0, "")
    assert f"model: {tmp_path / 'run' / 'model'}" in out
    assert (tmp_path / "run" / "log.jsonl").exists()
    code, out, err = run("fill-mask", TEXT, "--model", tmp_path / "run" / "model")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("more", ["no_such_field = 1", "not TOML"])
def test_pretrain_refuses_a_bad_recipe(run, tmp_path, more):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path.as_posix(), more=more))
    code, _, err = run("pretrain", "--config", recipe)
    assert code == 2
    assert err.startswith("modernbert-mini: error: ")
    assert ("no_such_field" if "field" in more else "line") in err


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
    for command in ("fill-mask", "inspect", "pretrain"):
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
