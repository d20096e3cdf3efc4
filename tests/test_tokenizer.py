"""Prompts become the ids that transformers' CLIPTokenizer gives them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dtrak_jax.models.tokenizer import Tokenizer

GOLDEN = Path(__file__).with_name("goldens") / "clip_tokenizer.npz"
WHOLE = os.environ.get("CLIP_TOKENIZERS")
"""The folders that tests/goldens/make_tokenizer.py leaves: CLIP's whole vocabulary."""


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN))
    return arrays | {k: json.loads(str(arrays[k])) for k in ("prompts", "files")}


@pytest.fixture
def folders(golden, tmp_path):
    for name, content in golden["files"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for path in (tmp_path / "sd1").iterdir():
        if not (tmp_path / "sd2" / path.name).exists():
            shutil.copy(path, tmp_path / "sd2")
    return tmp_path


def change(path, **fields):
    """Changes fields of a JSON file."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | fields))


def check(folder, golden, ids):
    tokenizer = Tokenizer.from_folder(folder, 77, 49408)
    computed = tokenizer(golden["prompts"])
    assert computed.dtype == np.int32
    np.testing.assert_array_equal(computed, golden[f"ids/{ids}"])
    return tokenizer


@pytest.mark.parametrize(
    ("name", "ids"), [("sd1", "sd1"), ("sd2", "sd2"), ("new", "sd2")]
)
def test_equals_transformers(name, ids, golden, folders):
    tokenizer = check(folders / name, golden, ids)
    assert (tokenizer.start, tokenizer.end) == (49406, 49407)
    assert tokenizer.pad == {"sd1": 49407, "sd2": 0}[ids]
    row = tokenizer(["a post impressionism painting"])[0]
    assert row[:6].tolist() == [49406, 320, 1549, 36114, 3086, 49407]
    assert (row[6:] == tokenizer.pad).all()


@pytest.mark.skipif(not WHOLE, reason="CLIP_TOKENIZERS is not set")
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_equals_transformers_with_the_whole_vocabulary(name, golden):
    tokenizer = check(Path(WHOLE) / name, golden, name)
    assert tokenizer.backend.get_vocab_size() == 49408


def test_other_layouts(golden, folders):
    """Older tokenizer.json have merges as strings; newer tokenizer_config.json have the
    added tokens; and a vocabulary alone is taken for Stable Diffusion 1's."""
    path = folders / "new" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    change(path, model=model | {"merges": [" ".join(x) for x in model["merges"]]})
    check(folders / "new", golden, "sd2")
    added = {
        str(i): {"content": token, "special": True, "normalized": i > 0}
        for i, token in ((49407, "<|endoftext|>"), (0, "!"), (49406, "<|startoftext|>"))
    }
    decoder = {"added_tokens_decoder": added, "pad_token": "!"}
    change(folders / "sd2" / "tokenizer_config.json", **decoder)
    (folders / "sd2" / "special_tokens_map.json").unlink()
    check(folders / "sd2", golden, "sd2")
    for name in ("tokenizer_config", "special_tokens_map"):
        (folders / "sd1" / f"{name}.json").unlink()
    check(folders / "sd1", golden, "sd1")


def test_added_tokens(folders):
    """Those of textual inversion are found as a whole."""
    folder = folders / "sd1"
    free = len(json.loads((folder / "vocab.json").read_text()))
    change(folder / "added_tokens.json", **{"<cat-toy>": free})
    change(folder / "tokenizer_config.json", model_max_length=6)
    tokenizer = Tokenizer.from_folder(folder, 6)
    expected = [49406, 320, free, 3086, 49407, 49407]
    assert tokenizer(["a<cat-toy> painting"])[0].tolist() == expected
    change(folder / "added_tokens.json", **{"<cat-toy>": 49408})
    change(folder / "tokenizer_config.json", model_max_length=None)
    with pytest.raises(ValueError, match=f"'<cat-toy>' has id 49408, .* has {free}"):
        Tokenizer.from_folder(folder, 77)


def test_what_is_cut(golden, folders):
    tokenizer = Tokenizer.from_folder(folders / "sd1", 77)
    assert tokenizer.cut("word " * 75) == ""
    assert tokenizer.cut("word " * 76) == "word "
    assert tokenizer.cut("Word " * 73 + "ukiyo-É, oh!") == "-É, oh!"
    cut = {prompt: tokenizer.cut(prompt) for prompt in golden["prompts"]}
    cut = {prompt: end for prompt, end in cut.items() if end}
    assert len(cut) == 4
    for prompt, end in cut.items():
        assert prompt.endswith(end)
        seen = prompt.removesuffix(end)
        if seen.endswith(" "):
            np.testing.assert_array_equal(tokenizer([seen]), tokenizer([prompt]))


def test_refuses_what_does_not_fit(folders):
    folder = folders / "sd1"

    def refused(error, match, length=77, vocab_size=None):
        with pytest.raises(error, match=match):
            Tokenizer.from_folder(folder, length, vocab_size)

    refused(ValueError, "model_max_length is 77, .* has 64 positions", 64)
    refused(
        ValueError, r"<\|endoftext\|>' with id 49407, .* has 49407 tokens", 77, 49407
    )
    for name, value, allowed in (
        ("tokenizer_class", "T5Tokenizer", "'CLIPTokenizer'"),
        ("padding_side", "left", "'right'"),
        ("split_special_tokens", True, "False"),
    ):
        kept = (folder / "tokenizer_config.json").read_text()
        change(folder / "tokenizer_config.json", **{name: value})
        refused(ValueError, f"{name} is {value!r}; .*{allowed}")
        (folder / "tokenizer_config.json").write_text(kept)
    with (folder / "merges.txt").open("a") as file:
        file.write("qqq zzz\n")
    refused(ValueError, "damaged vocabulary: .*qqq")
    (folder / "merges.txt").unlink()
    refused(FileNotFoundError, r"has no merges.txt; it must hold both, or tokenizer")
    folder = folders / "new"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder / "tokenizer.json", model=model | {"end_of_word_suffix": ""})
    refused(ValueError, "end_of_word_suffix is ''; .*'</w>'")


def test_merges_are_learnt_from_texts(tmp_path):
    """What occurs twice is one token; every other prompt has tokens, too."""
    texts = ["the digit three", "the digit four", "the Digit four"]
    tokenizer = Tokenizer.learn(texts, length=12)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path, 12, tokenizer.backend.get_vocab_size())
    start, the, digit, four, end, *rest = tokenizer(["THE digit  four"])[0]
    assert (start, end, rest) == (again.start, again.end, 7 * [again.pad])
    names = [tokenizer.backend.id_to_token(i) for i in (the, digit, four)]
    assert names == ["the</w>", "digit</w>", "four</w>"]
    prompts = ["three", "naïve 3!", "", "the digit three by ada and ben"]
    np.testing.assert_array_equal(again(prompts), tokenizer(prompts))
    assert tokenizer.cut(prompts[1]) == "" != tokenizer.cut(prompts[3])
    assert tokenizer.end not in tokenizer(["naïve 3!"])[0][1:9], "nothing is unknown"
