"""The tokenizer: its properties, then equality with ``transformers``, then hostile input."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from modernbert_mini.sources import CheckpointError
from modernbert_mini.tokenizer import Encoding, Tokenizer, find_special_tokens, train_bpe

CORPUS = [
    "the cat sat on the mat and the other cat sat on the hat",
    "def f(x):\n    return x + 1",
    "Une façade, naïve café; 東京 and Москва.",
]
TEXTS = [
    "",
    " ",
    "   ",
    "a",
    "Hello World!",
    "hello  world   with    runs     of      spaces",
    "\ttabs\tand\nnew\r\nlines\n\n\n",
    "Paris is the [MASK] of France.",
    "Paris is the [MASK]of France.",
    "no space before[MASK], two before  [MASK], a newline\n[MASK]",
    "[CLS] specials [SEP] in [PAD] the [UNK] text [MASK]",
    "<|endoftext|><|padding|>|||IP_ADDRESS|||[unused0] [unused82]",
    "[mask] [Mask] [MASKED] [MASK",
    "def f(x, *, y=None):\n    return {k: v for k, v in x.items() if v != y}  # comment",
    "don't you'll they've I'm we're it's he'd",
    "1234567890 3.14159 1,000,000 0x1F 2^10",
    "ÀÉÎÕÜ ñ ß œ Ł ž",
    "cafe\u0301 is not yet café",
    "日本語のテキスト 한국어 中文 ไทย العربية עברית हिन्दी",
    "🤗 👩\u200d👩\u200d👧\u200d👦 🇫🇷 👍🏽 ☕️",
    "zero\u200bwidth and\u00a0no-break and \ufeffBOM",
    "math: ∑ᵢ xᵢ² ≤ ∫ f(x) dx, ½ ⅓ ﬁ Ⅷ",
    "controls \x00 \x07 \x1b[0m end",
    "x" * 3000,
    "word " * 700,
    "https://example.org/a?b=c&d=%20#e user@example.org",
]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(train_bpe(CORPUS, 300))


@pytest.fixture(scope="module")
def published(reference) -> Tokenizer:
    return Tokenizer.from_pretrained(reference / "ModernBERT-base")


@pytest.fixture(scope="module")
def theirs(reference):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(reference / "ModernBERT-base")


# --- Properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t in TEXTS if "[" not in t and "<|" not in t])
def test_any_text_survives_the_round_trip_up_to_nfc(tiny, text):
    import unicodedata

    ids = tiny.encode(text)
    assert tiny.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_bytes_need_no_unknown_token(tiny):
    for text in TEXTS:
        if "[UNK]" not in text:
            assert tiny.unk_token_id not in tiny.encode(text)


def test_a_text_is_framed_and_a_pair_parted_by_special_tokens(tiny):
    cls, sep = tiny.cls_token_id, tiny.sep_token_id
    a, b = (tiny.encode(text, add_special_tokens=False) for text in ("the cat", "the mat"))
    assert tiny.encode("the cat") == [cls, *a, sep]
    assert tiny.encode("the cat", "the mat") == [cls, *a, sep, *b, sep]
    assert tiny.encode("") == [cls, sep]
    assert tiny.encode("the cat", "") == [cls, *a, sep, sep]


def test_mask_swallows_the_spaces_on_its_left_only(tiny):
    ids = tiny.encode("the   [MASK] cat", add_special_tokens=False)
    the, cat = (tiny.encode(text, add_special_tokens=False) for text in ("the", " cat"))
    assert ids == [*the, tiny.mask_token_id, *cat]


def test_there_are_no_token_types(tiny):
    assert set(tiny("the cat", "the mat")) == {"input_ids", "attention_mask"}


def test_padding_reaches_the_longest_and_is_masked_on_either_side(tiny):
    texts = ["the cat", "", "the cat sat on the mat"]
    plain = tiny(texts)
    longest = max(map(len, plain.input_ids))
    right, left = tiny(texts, padding=True), tiny(texts, padding=True, padding_side="left")
    for row, ids in enumerate(plain.input_ids):
        pads, n = [tiny.pad_token_id] * (longest - len(ids)), len(ids)
        assert right.input_ids[row] == ids + pads
        assert right.attention_mask[row] == [1] * n + [0] * len(pads)
        assert left.input_ids[row] == pads + ids
        assert left.attention_mask[row] == [0] * len(pads) + [1] * n


def test_padding_to_max_length_leaves_longer_texts_alone(tiny):
    batch = tiny(["the cat", "the cat sat on the mat"], padding="max_length", max_length=6)
    assert len(batch.input_ids[0]) == 6
    assert batch.input_ids[1] == tiny.encode("the cat sat on the mat")
    assert len(batch.input_ids[1]) > 6


def test_options_of_one_call_do_not_leak_into_the_next(tiny):
    before = tiny(["the cat", "the cat sat on"])
    tiny(["the cat", "the cat sat on"], padding="max_length", truncation=True, max_length=4)
    assert tiny(["the cat", "the cat sat on"]) == before


def test_truncation_keeps_the_special_tokens(tiny):
    for length in range(2, 12):
        ids = tiny.encode("the cat sat on the mat and so on", truncation=True, max_length=length)
        assert len(ids) == length
        assert (ids[0], ids[-1]) == (tiny.cls_token_id, tiny.sep_token_id)


def test_truncating_a_pair_cuts_where_it_is_told(tiny):
    first, second = "the cat sat on the mat", "and the other cat sat on the hat"
    full = tiny.encode(first, second)
    plain_first = tiny.encode(first)
    limit = len(full) - 2
    only_first = tiny.encode(first, second, truncation="only_first", max_length=limit)
    only_second = tiny.encode(first, second, truncation="only_second", max_length=limit)
    assert len(only_first) == len(only_second) == limit
    assert only_second[: len(plain_first)] == plain_first
    assert only_first[: len(plain_first)] != plain_first
    assert only_first[len(plain_first) - 2 :] == full[len(plain_first) :]


def test_truncation_without_a_length_uses_the_limit_of_the_model():
    tokenizer = Tokenizer(train_bpe(CORPUS, 300), model_max_length=5)
    assert len(tokenizer.encode("the cat sat on the mat", truncation=True)) == 5
    assert len(tokenizer.encode("the cat sat on the mat", truncation=True, max_length=4)) == 4
    assert len(tokenizer.encode("the", padding="max_length")) == 5


def test_no_known_limit_is_said_not_guessed(tiny):
    with pytest.warns(UserWarning, match="names no limit"):
        assert tiny.encode("the cat sat", truncation=True) == tiny.encode("the cat sat")
    with pytest.warns(UserWarning, match="changes nothing"):
        assert tiny.encode("the cat sat", max_length=3) == tiny.encode("the cat sat")


def test_offsets_point_into_the_text(tiny):
    text = "the cat, naïve [MASK] 東京"
    encoding = tiny(text, return_offsets_mapping=True)
    pieces = [text[a:b] for a, b in encoding.offset_mapping]
    assert pieces[0] == pieces[-1] == ""
    assert pieces[1] == "the"
    assert " [MASK]" in pieces
    tensors = tiny([text], return_offsets_mapping=True, return_tensors="pt")
    assert tensors.offset_mapping.shape == (1, len(pieces), 2)
    assert tensors.offset_mapping[0].tolist() == [list(pair) for pair in encoding.offset_mapping]


def test_tensors_are_int64_with_a_batch_dimension(tiny):
    one, two = tiny("the cat", return_tensors="pt"), tiny(["a", "b"], return_tensors="pt")
    assert one.input_ids.shape == one.attention_mask.shape == (1, len(tiny.encode("the cat")))
    assert two.input_ids.shape[0] == 2
    assert {one.input_ids.dtype, one.attention_mask.dtype} == {torch.int64}


def test_an_empty_batch_stays_empty(tiny):
    assert tiny([]) == {"input_ids": [], "attention_mask": []}
    assert tiny([], padding=True, return_tensors="pt").input_ids.shape == (0, 0)


def test_an_encoding_is_a_dict_with_attributes_that_moves(tiny):
    encoding = tiny("the cat", return_tensors="pt")
    assert isinstance(encoding, dict)
    assert encoding.input_ids is encoding["input_ids"]
    assert encoding.to("meta") is encoding
    assert encoding.input_ids.device.type == encoding["attention_mask"].device.type == "meta"
    assert Encoding(tokens=["a"]).to("meta").tokens == ["a"]
    with pytest.raises(AttributeError, match="input_ids"):
        _ = encoding.token_type_ids


def test_ids_and_tokens_convert_both_ways(tiny):
    ids = tiny.encode("the cat")
    tokens = tiny.convert_ids_to_tokens(ids)
    assert tokens[0] == "[CLS]"
    assert tiny.convert_tokens_to_ids(tokens) == ids
    assert tiny.convert_tokens_to_ids("no such token") == tiny.unk_token_id
    assert tiny.convert_ids_to_tokens(tiny.mask_token_id) == "[MASK]"
    assert tiny.convert_ids_to_tokens(torch.tensor(tiny.mask_token_id)) == "[MASK]"
    assert tiny.convert_ids_to_tokens(10**6) is None


def test_decode_takes_an_id_a_list_a_tensor_or_a_batch(tiny):
    batch = tiny(["the cat", "the mat sat"], padding=True, return_tensors="pt").input_ids
    texts = ["the cat", "the mat sat"]
    assert tiny.batch_decode(batch, skip_special_tokens=True) == texts
    assert tiny.batch_decode(batch.tolist(), skip_special_tokens=True) == texts
    assert tiny.decode(batch[1].numpy(), skip_special_tokens=True) == "the mat sat"
    assert tiny.decode(tiny.mask_token_id) == "[MASK]"
    assert tiny.decode([]) == ""


# --- Training ---------------------------------------------------------------------------------


def test_training_gives_the_published_form(tiny):
    form = json.loads(tiny.backend.to_str())
    assert len(tiny) == 300
    assert tiny.vocab_size == 295
    assert form["normalizer"] == {"type": "NFC"}
    assert form["pre_tokenizer"]["type"] == form["decoder"]["type"] == "ByteLevel"
    assert form["pre_tokenizer"]["add_prefix_space"] is False
    specials = {token["content"]: token for token in form["added_tokens"]}
    assert [token["id"] for token in form["added_tokens"]] == list(range(295, 300))
    assert list(specials) == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert [name for name, token in specials.items() if token["lstrip"]] == ["[MASK]"]


def test_training_has_the_published_template(tiny, reference):
    published = json.loads((reference / "ModernBERT-base" / "tokenizer.json").read_text("utf-8"))
    ours = json.loads(tiny.backend.to_str())
    for part in ("single", "pair"):
        assert ours["post_processor"][part] == published["post_processor"][part]
    for part in ("normalizer", "pre_tokenizer"):
        assert ours[part] == published[part]
    settings = [
        {k: v for k, v in form["model"].items() if k not in ("vocab", "merges")}
        for form in (ours, published)
    ]
    assert settings[0] == settings[1]


def test_training_is_reproducible_and_needs_no_list():
    first, second = train_bpe(CORPUS, 320), train_bpe((text for text in CORPUS), 320)
    assert first.to_str() == second.to_str()


def test_training_learns_the_frequent_word(tiny):
    assert len(tiny.encode(" cat", add_special_tokens=False)) == 1


def test_training_refuses_a_vocabulary_below_the_bytes():
    with pytest.raises(ValueError, match="at least 261"):
        train_bpe(CORPUS, 260)
    assert train_bpe(CORPUS, 261).get_vocab_size() == 261


# --- Special tokens by role -------------------------------------------------------------------


def renamed_backend():
    """A backend whose special tokens have the names that mmBERT gives them."""
    from tokenizers import Tokenizer as Backend

    text = train_bpe(CORPUS, 300).to_str()
    names = {"[UNK]": "<unk>", "[CLS]": "<bos>", "[SEP]": "<eos>", "[PAD]": "<pad>"}
    for old, new in {**names, "[MASK]": "<mask>"}.items():
        text = text.replace(old, new)
    return Backend.from_str(text)


def test_roles_are_found_whatever_the_names():
    assert find_special_tokens(renamed_backend()) == {
        "unk_token": "<unk>",
        "cls_token": "<bos>",
        "sep_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }


def test_files_decide_over_what_is_found(tmp_path):
    renamed_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<unk>"}}')
    assert Tokenizer.from_pretrained(tmp_path).pad_token == "<unk>"
    (tmp_path / "tokenizer_config.json").write_text(
        '{"pad_token": "<eos>", "model_max_length": 7, "padding_side": "left"}'
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("<eos>", "<mask>")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (7, "left")
    padded = tokenizer(["the cat sat", "a"], padding=True)
    assert padded.attention_mask[1][0] == 0


def test_an_absurd_limit_counts_as_none(tmp_path):
    renamed_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert Tokenizer.from_pretrained(tmp_path).model_max_length is None


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path):
    renamed_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "[MASK]"}')
    with pytest.raises(CheckpointError, match=r"mask_token '\[MASK\]'"):
        Tokenizer.from_pretrained(tmp_path)


# --- Equality with transformers ---------------------------------------------------------------


def test_the_published_tokenizer_encodes_as_expected(published, reference):
    expected = json.loads((reference / "ModernBERT-base" / "expected.json").read_text("utf-8"))
    for text, ids in expected["tokenizer"]["encodings"].items():
        assert published.encode(text) == ids
    for name, token_id in zip(
        ("unk", "cls", "sep", "pad", "mask"), range(50280, 50285), strict=True
    ):
        assert getattr(published, f"{name}_token_id") == token_id
    assert len(published) == 50368


@pytest.mark.parametrize("text", TEXTS)
def test_one_text_encodes_and_decodes_as_in_transformers(published, theirs, text):
    ours, other = (t(text, return_offsets_mapping=True) for t in (published, theirs))
    assert ours == dict(other)
    for skip in (False, True):
        assert published.decode(ours.input_ids, skip) == theirs.decode(
            other["input_ids"], skip_special_tokens=skip
        )
    assert published.convert_ids_to_tokens(ours.input_ids) == theirs.convert_ids_to_tokens(
        other["input_ids"]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "padding_side": "left"},
        {"padding": "max_length", "max_length": 40},
        {"truncation": True, "max_length": 9},
        {"truncation": "longest_first", "max_length": 3},
        {"truncation": True, "padding": "max_length", "max_length": 16},
        {"add_special_tokens": False, "truncation": True, "max_length": 1},
        {"add_special_tokens": False},
    ],
    ids=str,
)
def test_batches_and_pairs_as_in_transformers(published, theirs, options):
    assert published(TEXTS, **options) == dict(theirs(TEXTS, **options))
    pairs = TEXTS[::-1]
    assert published(TEXTS, pairs, **options) == dict(theirs(TEXTS, pairs, **options))


@pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first"])
def test_pair_truncation_as_in_transformers(published, theirs, strategy):
    first, second = ["one two three four five six"] * 2, ["seven eight nine ten", "a " * 30]
    for max_length in (8, 11, 20):
        options = {"truncation": strategy, "max_length": max_length}
        try:
            other = theirs(first, second, **options)
        except Exception as error:
            with pytest.raises(type(error)):
                published(first, second, **options)
        else:
            assert published(first, second, **options) == dict(other)


def test_tensors_as_in_transformers(published, theirs):
    for text in ("Hello World!", ["Hello World!", "Hi"]):
        ours, other = (t(text, padding=True, return_tensors="pt") for t in (published, theirs))
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(ours[key], other[key])


def test_sizes_as_in_transformers(published, theirs):
    assert len(published) == len(theirs)
    assert published.vocab_size == theirs.vocab_size
    assert published.get_vocab() == theirs.get_vocab()


# --- Saving and loading -----------------------------------------------------------------------


@pytest.mark.parametrize("source", ["trained", "published"])
def test_what_is_saved_loads_here_and_in_transformers(tmp_path, request, source):
    transformers = pytest.importorskip("transformers")
    if source == "published":
        tokenizer = request.getfixturevalue("published")
    else:
        tokenizer = Tokenizer(train_bpe(CORPUS, 300), model_max_length=64, padding_side="left")
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)  # must not be saved
    tokenizer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)  # over what is there
    ours, theirs = (
        Tokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    assert [ours.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    for other in (ours, theirs):
        assert other(TEXTS, padding=True)["input_ids"] == tokenizer(TEXTS, padding=True).input_ids
        assert (other.mask_token, other.pad_token_id) == ("[MASK]", tokenizer.pad_token_id)
        assert other.padding_side == tokenizer.padding_side
    assert ours.model_max_length == tokenizer.model_max_length
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_what_transformers_saved_loads_here(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.mask_token_id == theirs.mask_token_id


# --- Hostile or mistaken input ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "NoneType"),
        ((7,), "int"),
        ((b"bytes",), "bytes"),
        ((["fine", None],), "item 1 is a NoneType"),
        (([["the", "cat"]],), "text_pair"),
        (([("the", "cat")],), "text_pair"),
    ],
)
def test_anything_but_strings_is_a_type_error(tiny, arguments, message):
    with pytest.raises(TypeError, match=message):
        tiny(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a", "b"], ["c"]), {}, "2 texts, but 1 pair"),
        ((["a", "b"], "c"), {}, "both"),
        (("a", ["c"]), {}, "both"),
        (("a",), {"padding": "right"}, "padding must be one of"),
        (("a",), {"truncation": "first"}, "truncation must be one of"),
        (("a",), {"return_tensors": "np"}, "return_tensors must be one of"),
        (("a",), {"padding_side": "middle"}, "padding_side must be one of"),
        (("a",), {"truncation": True, "max_length": 1}, "no room for 2 special"),
        (("a", ""), {"truncation": True, "max_length": 2}, "no room for 3 special"),
        ((["the cat", "a"],), {"return_tensors": "pt"}, "pass padding=True"),
    ],
)
def test_mistaken_options_are_value_errors(tiny, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(*arguments, **options)


def test_padding_needs_a_padding_token():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    tokenizer = Tokenizer(Backend(models.BPE()))
    assert tokenizer.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):
        tokenizer(["a", "b"], padding=True)


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"", "empty file"),
        (b"{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS pointer"),
        (b"[]", "a JSON list"),
        (b"{}", "no tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": 3}}', "no tokenizer"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, finding):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=finding) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert caught.value.file.endswith("tokenizer.json")
    assert caught.value.expected and caught.value.remedy


def test_a_truncated_published_file_is_refused(tmp_path, reference):
    whole = (reference / "ModernBERT-base" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_broken_settings_file_is_not_passed_over(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_template_with_an_unknown_token_is_refused(tmp_path, tiny):
    form = json.loads(tiny.backend.to_str())
    del form["post_processor"]["special_tokens"]["[SEP]"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_token": 7},
        {"pad_token": {"lstrip": True}},
        {"model_max_length": "long"},
        {"padding_side": []},
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind_are_refused(tmp_path, tiny, settings):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        Tokenizer.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_the_tokenizer_file_alone_is_enough(tmp_path, reference, published):
    shutil.copy(reference / "ModernBERT-base" / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_token_id == published.mask_token_id
    assert tokenizer.pad_token == "[PAD]"


def test_importing_does_not_import_tokenizers():
    code = "import sys, modernbert_mini.tokenizer; print('tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
