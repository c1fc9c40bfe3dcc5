"""A recipe says what it means, in TOML and YAML, or is refused with what to change."""

import json
from dataclasses import asdict

import pytest

from modernbert_mini import ConfigError
from modernbert_mini.recipe import PretrainingConfig, count_tokens, find_recipe


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (50_000, 50_000),
        (3e9, 3 * 10**9),
        ("1,024", 1024),
        ("50_000", 50_000),
        ("1.719 trillion", 1_719_000_000_000),
        ("0.5 million", 500_000),
        ("3 Billion", 3 * 10**9),
        ("2thousand", 2000),
    ],
)
def test_tokens_are_counted_as_people_write_them(text, number):
    assert count_tokens(text) == number


@pytest.mark.parametrize("text", ["", "many", "-3", "3 dozen", "1.5", "1.0005 thousand", None, [1]])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(ValueError, match="number of tokens"):
        count_tokens(text)


def test_the_papers_recipe_reads_like_its_table():
    """Table 3 of arXiv:2412.13663, column by column, for the base model."""
    recipe = PretrainingConfig.from_file("modernbert-base")
    columns = recipe.columns()
    assert [c.training_tokens for c in columns] == [1719 * 10**9, 250 * 10**9, 50 * 10**9]
    assert [c.max_sequence_length for c in columns] == [1024, 8192, 8192]
    sequences = [c.batch_tokens // c.max_sequence_length for c in columns]
    assert sequences == [4608, 576, 576]  # the table's 72 is for each of 8 GPUs
    assert [c.microbatch_tokens // c.max_sequence_length for c in columns] == [96, 12, 12]
    assert columns[0].batch_warmup_from // 1024 == 768
    assert [c.batch_warmup_tokens for c in columns] == [50 * 10**9, 0, 0]
    assert [c.learning_rate for c in columns] == [8e-4, 3e-4, 3e-4]
    assert [c.warmup_tokens for c in columns] == [3 * 10**9, 0, 0]
    assert [c.decay_tokens for c in columns] == [0, 0, 50 * 10**9]
    assert [c.global_rope_theta for c in columns] == [None, 160_000, 160_000]
    assert (recipe.optimizer, recipe.betas, recipe.epsilon) == ("StableAdamW", (0.9, 0.98), 1e-6)
    assert recipe.weight_decay == 1e-5 and recipe.fully_decoupled_decay
    assert recipe.mask_probability == 0.3 and recipe.clip_norm == 0
    assert recipe.average == 3


def test_a_recipe_survives_json():
    recipe = PretrainingConfig.from_file("tiny")
    assert PretrainingConfig.from_dict(asdict(recipe)) == recipe


def test_toml_and_yaml_say_the_same(tmp_path):
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text(
        'folder = "run"\nlearning_rate = 8e-4\nbetas = [0.9, 0.95]\ncorpora = { wordnet = 2 }\n'
        '[model]\nhidden_size = 64\n[[phases]]\ntraining_tokens = "3 million"\n'
    )
    yaml.write_text(
        "folder: run\nlearning_rate: 8e-4\nbetas: [0.9, 0.95]\ncorpora: {wordnet: 2}\n"
        "model: {hidden_size: 64}\nphases:\n  - training_tokens: 3 million\n"
    )
    recipe = PretrainingConfig.from_file(toml)
    assert recipe == PretrainingConfig.from_file(yaml)
    (phase,) = recipe.columns()
    assert (phase.training_tokens, phase.warmup_tokens) == (3_000_000, 0)
    assert phase.learning_rate == 8e-4 and phase.model == {"hidden_size": 64}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "folder = ", "no recipe"),
        ("a.yaml", "folder: [", "no recipe"),
        ("a.yaml", "just text", "no recipe"),
        ("a.toml", 'folder = "x"', "no corpora"),
        (
            "a.toml",
            'folder = "x"\ncorpora = { a = 1 }\nlearning_rat = 1',
            "Did you mean learning_rate",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        PretrainingConfig.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpora": {}}, "no corpus"),
        ({"optimizer": "Adam"}, "one of StableAdamW, AdamW"),
        ({"precision": "float16"}, "one of auto, float32, bfloat16"),
        ({"learning_rate": "high"}, "learning_rate 'high'"),
        ({"seed": True}, "seed True"),
        ({"batch_tokens": 0}, "batch_tokens 0"),
        ({"log_every": 0}, "log_every 0"),
        ({"max_sequence_length": 9000}, "max_sequence_length 9,000"),
        ({"microbatch_tokens": 3000}, "a multiple of 3,000"),
        ({"batch_warmup_from": 3000}, "a multiple of"),
        ({"training_tokens": 5000}, "batch_tokens 8,192"),
        ({"decay_tokens": "39.5 million"}, "at most 40,000,000 together"),
        ({"phases": [{"learning_rate": 1}]}, "phase 1: no training_tokens"),
        ({"phases": [{"training_tokens": 1e6, "optimizer": "AdamW"}]}, "phase 1: unknown field"),
    ],
)
def test_an_impossible_recipe_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        PretrainingConfig(**{"folder": "x", "corpora": {"a": 1}} | changes)


def test_a_recipe_is_taken_to_other_text():
    recipe = PretrainingConfig(
        folder="x", corpora={"a": 2}, phases=[{"training_tokens": 1e6, "corpora": {"b": 1}}] * 2
    )
    assert recipe.with_places() == recipe
    assert recipe.with_places(folder="y").columns()[0].corpora == {"b": 1}
    other = recipe.with_places(["c", "d"], "y")
    assert other.folder == "y" and recipe.folder == "x"
    assert [phase.corpora for phase in [other, *other.columns()]] == [{"c": 1, "d": 1}] * 3


def test_the_recipe_for_own_text_starts_from_mini():
    recipe = PretrainingConfig.from_file("own-text")
    assert recipe.initialize_from == recipe.tokenizer == "mini" and not recipe.model


def test_the_recipe_that_goes_on_with_mini_holds_the_same_documents_out(root):
    recipe = PretrainingConfig.from_file("mini")
    first = json.loads((root / "modernbert_mini" / "mini" / "training.json").read_text())["recipe"]
    assert recipe.initialize_from == recipe.tokenizer == "mini" and not recipe.model
    for name in ("held_out_percent", "corpora", "max_sequence_length"):
        assert getattr(recipe, name) == first[name], name
    assert recipe.seed != first["seed"]


def test_a_file_goes_before_a_recipe_of_the_package(tmp_path, monkeypatch):
    assert find_recipe("tiny").name == "tiny.toml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("")
    assert find_recipe("tiny").read_text() == ""
    with pytest.raises(OSError, match="absent.toml"):
        PretrainingConfig.from_file("absent.toml")
