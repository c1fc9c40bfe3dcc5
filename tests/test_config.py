import json

import pytest

from modernbert_mini.config import ConfigError, ModernBertConfig
from modernbert_mini.model import ModernBertModel

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 60000}


def config(**values):
    return ModernBertConfig.from_dict({"model_type": "modernbert", **SMALL, **values})


def test_defaults_are_those_of_the_base_model(reference):
    published = ModernBertConfig.from_file(reference / "configs" / "ModernBERT-base.json")
    default = ModernBertConfig(classifier_pooling="mean")
    published.extra = {}
    assert published == default


def test_every_published_config_loads(reference):
    paths = sorted((reference / "configs").glob("*.json"))
    assert len(paths) >= 10
    for path in paths:
        loaded = ModernBertConfig.from_file(path)
        assert loaded.head_dim == 64 and loaded.half_window == 64, path.name
        assert loaded.layer_types[:4] == [
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ]
        local = loaded.rope_parameters["sliding_attention"]["rope_theta"]
        assert local == (10_000 if path.name.startswith("ModernBERT") else 160_000)


def test_both_forms_mean_the_same():
    published = config(global_attn_every_n_layers=2, global_rope_theta=5e4, local_rope_theta=7.0)
    newer = config(
        layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
        },
    )
    assert published == newer
    assert newer.global_attn_every_n_layers == 2 and newer.local_rope_theta == 7.0


def test_an_irregular_pattern_has_no_published_form():
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert config(layer_types=kinds).global_attn_every_n_layers is None


def test_partial_rope_parameters_are_filled_in():
    loaded = config(
        rope_parameters={"full_attention": {"rope_theta": 9.0}, "sliding_attention": None}
    )
    assert loaded.rope_parameters["full_attention"] == {"rope_type": "default", "rope_theta": 9.0}
    assert loaded.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0


def test_rope_scaling_of_older_files_reaches_both_kinds():
    loaded = config(rope_scaling={"type": "linear", "factor": 2.0})
    for rope in loaded.rope_parameters.values():
        assert rope["rope_type"] == "linear" and rope["factor"] == 2.0


def test_round_trip_keeps_everything_unknown_keys_too():
    loaded = config(torch_dtype="float32", something={"new": [1, 2]}, num_labels=3)
    again = ModernBertConfig.from_dict(json.loads(json.dumps(loaded.to_dict())))
    assert again == loaded
    assert again.extra == {"torch_dtype": "float32", "something": {"new": [1, 2]}}
    assert again.num_labels == 3 and again.id2label[2] == "LABEL_2"


def test_transformers_reads_what_we_write_and_the_reverse():
    transformers = pytest.importorskip("transformers", minversion="5")
    ours = config(num_labels=3, global_rope_theta=5e4, layer_types=["full_attention"] * 4)
    theirs = transformers.ModernBertConfig.from_dict(ours.to_dict())
    for name in ("layer_types", "num_labels", "id2label", "rope_parameters", "hidden_size"):
        assert getattr(theirs, name) == getattr(ours, name), name
    back = ModernBertConfig.from_dict(theirs.to_dict())
    back.extra = {}
    assert back == ours


def test_overrides_derive_again_what_follows_from_them():
    changed = config().with_overrides(num_hidden_layers=2, num_labels=5, global_rope_theta=1e6)
    assert changed.layer_types == ["full_attention", "sliding_attention"]
    assert changed.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert changed.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert len(changed.id2label) == len(changed.label2id) == 5
    named = config().with_overrides(id2label={0: "no", 1: "yes"})
    assert named.label2id == {"no": 0, "yes": 1}


def test_an_unknown_override_is_refused():
    with pytest.raises(ConfigError, match="unknown field hiden_size"):
        config().with_overrides(hiden_size=3)


IMPOSSIBLE = {
    "heads that do not divide": ({"num_attention_heads": 3}, "16 with 3 heads"),
    "odd heads": ({"hidden_size": 6}, "heads of 3 dimensions"),
    "negative size": ({"intermediate_size": -4}, "intermediate_size -4"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    "endless layers": ({"num_hidden_layers": 10**30}, "num_hidden_layers 10000"),
    "endless width": ({"hidden_size": 2 * 10**9}, "hidden_size 2000000000"),
    "scaling as text": ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    "size as text": ({"hidden_size": "16"}, "hidden_size '16'"),
    "size as switch": ({"hidden_size": True}, "hidden_size True"),
    "negative window": ({"local_attention": -1}, "local_attention -1"),
    "zero period": ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers 0"),
    "certain dropout": ({"mlp_dropout": 1.0}, "mlp_dropout 1.0"),
    "no epsilon": ({"norm_eps": 0}, "norm_eps 0"),
    "infinite theta": ({"global_rope_theta": float("inf")}, "global_rope_theta inf"),
    "bias as text": ({"mlp_bias": "yes"}, "mlp_bias 'yes'"),
    "activation": ({"hidden_activation": "swiglu"}, "hidden_activation 'swiglu'"),
    "head activation": ({"classifier_activation": None}, "classifier_activation None"),
    "pooling": ({"classifier_pooling": "max"}, "classifier_pooling 'max'"),
    "problem": ({"problem_type": "guess"}, "problem_type 'guess'"),
    "layer type": ({"layer_types": ["full_attention", "x", "x", "x"]}, "layer type 'x'"),
    "too few layer types": ({"layer_types": ["full_attention"]}, "1 layer_types for 4 layers"),
    "layer types as number": ({"layer_types": 3}, "layer_types 3"),
    "rope type": (
        {"rope_parameters": {"full_attention": {"rope_type": "spiral"}}},
        "rope type of full_attention 'spiral'",
    ),
    "rope theta": (
        {"rope_parameters": {"sliding_attention": {"rope_theta": -1}}},
        "rope_theta -1 of sliding_attention",
    ),
    "rope parameters as list": ({"rope_parameters": [1]}, "rope_parameters"),
    "pad id": ({"pad_token_id": 60000}, "pad_token_id 60000"),
    "model type": ({"model_type": "bert"}, "model_type 'bert'"),
    "labels": ({"id2label": ["a"]}, "id2label"),
    "number of labels": ({"num_labels": 0}, "num_labels 0"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_configs_are_refused(name, tmp_path):
    values, finding = IMPOSSIBLE[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "modernbert", **SMALL, **values}))
    with pytest.raises(ConfigError) as caught:
        ModernBertConfig.from_file(path)
    error = caught.value
    assert finding in error.found and error.file == path
    assert str(path) in str(error) and error.expected in str(error) and error.remedy in str(error)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "{", "[1]", "\x00\x01", '"text"', "<html>not found</html>"]
)
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no config") as caught:
        ModernBertConfig.from_file(path)
    assert caught.value.file == path


def test_what_passes_can_be_built():
    ModernBertModel(config(vocab_size=50_368, intermediate_size=8))
