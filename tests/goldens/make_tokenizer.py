"""Writes clip_tokenizer.npz: prompts and their ids by transformers' CLIPTokenizer.

    python tests/goldens/make_tokenizer.py [FOLDER]

Needs transformers and open_clip_torch (made with 5.24 and 3.3, the latter by --no-deps), which the tests do not.
The ids are those of CLIP's vocabulary (open_clip/bpe_simple_vocab_16e6.txt.gz, MIT). Of
the vocabulary the file holds the bytes and the merges that these prompts go through:
every step of their encoding has the same choice, so that the ids are the same, which
is asserted. `files` are those of three folders: "sd1" pads with <|endoftext|>, as Stable
Diffusion 1; "sd2" with "!", where files that are as in "sd1" are left out; and "new" is
the latter as transformers 5 writes it. With FOLDER the whole vocabulary is left in FOLDER/sd1 and FOLDER/sd2, with
which `CLIP_TOKENIZERS=FOLDER pytest tests/test_tokenizer.py` repeats the test.
"""

import gzip
import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

PROMPTS = [
    "",
    " ",
    "a",
    "!",
    "a post impressionism painting",
    "a ukiyo e painting",
    "A Photo of an ASTRONAUT riding a HORSE!",
    "wow!!! really?!?! 100% ... yes!",
    "it's they're I'LL we've i'd don't 'tis rock'n'roll '' 'S",
    "année à l'École, Zoë naïve façade ÅNGSTRÖM",
    "de\u0301compose\u0301 e\u0308 n\u0303 \u212b \u1e9b\u0323",
    "İstanbul ǅ ß ẞ ﬁn Σίσυφος",
    "北京的秋天，水墨画 浮世絵 ひらがな カタカナ 한국어",
    "привет мир, Москва ночью",
    "صورة قطة जयपुर शहर ภาพแมว",
    "🎨 👩‍🎨 🏳️‍🌈 👍🏽 1️⃣ ❤️😀😀",
    "tabs\tand\nlines\r\nand\u00a0no-break\u3000wide\u2028sep \u200bzero\u200d  two",
    "   leading and trailing   ",
    "x² ½ ⅷ ١٢٣ 2024 3.14159 1,000",
    "snake_case camelCase kebab-case a/b\\c C++ #hash @at $5 <tag> {b} [c] (d)",
    "<|startoftext|>inside<|endoftext|> and <|ENDOFTEXT|> after <|endoftext|>",
    "\x00\x01\x7f\ufffd\ufeff",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a painting of " + "a very very old castle by the sea, " * 12 + "at dusk",
    "naïve 🎨 " * 40,
    "word " * 75,
    "word " * 76,
    "word " * 74 + "ukiyo-e",
    "x" * 300,
]
BASE = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
VARIANTS = {"sd1": "<|endoftext|>", "sd2": "!"}


def vocabulary():
    """CLIP's ids and merges, as openai/clip-vit-large-patch14 has them."""
    # Importing it would need torchvision.
    package = Path(importlib.util.find_spec("open_clip").origin)
    path = package.with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters]
    tokens += ["".join(pair) for pair in merges] + list(BASE.values())
    return {token: i for i, token in enumerate(tokens)}, merges


def write(folder, vocab, merges, pad):
    """A folder of the files that Stable Diffusion's repositories have."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(lines))
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    named = {k: token | {"content": v} for k, v in BASE.items()}
    named["unk_token"] = token | {"content": "<|endoftext|>"}
    config = {k: v | {"__type": "AddedToken"} for k, v in named.items()}
    config |= {"model_max_length": 77, "pad_token": "<|endoftext|>"}
    config |= {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = json.dumps(named | {"pad_token": pad})
    (folder / "special_tokens_map.json").write_text(special)


def encode(folder):
    """The ids of all prompts, as diffusers' pipelines ask for them."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    return np.array(tokenizer(PROMPTS, **options)["input_ids"], np.int32)


def used_merges(vocab, merges, folder):
    """The merges on the way to every word's tokens."""
    backend = transformers.CLIPTokenizer.from_pretrained(folder).backend_tokenizer
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    used = set()
    for prompt in PROMPTS:
        text = backend.normalizer.normalize_str(prompt)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            parts = [*word[:-1], word[-1] + "</w>"]
            while True:
                pairs = list(itertools.pairwise(parts))
                best = min(
                    pairs, key=lambda pair: ranks.get(pair, len(ranks)), default=0
                )
                if best not in ranks:
                    break
                used.add(best)
                i = pairs.index(best)
                parts[i : i + 2] = ["".join(best)]
    merges = [pair for pair in merges if pair in used]
    kept = {"".join(pair) for pair in merges} | set(BASE.values())
    short = {t: i for t, i in vocab.items() if i < 512 or t in kept}
    return short, merges


def main():
    transformers.logging.set_verbosity_error()
    vocab, merges = vocabulary()
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        ids = {}
        for name, pad in VARIANTS.items():
            write(whole / name, vocab, merges, pad)
            ids[f"ids/{name}"] = encode(whole / name)
        short = used_merges(vocab, merges, whole / "sd1")
        for name, pad in VARIANTS.items():
            folder = Path(temporary) / "short" / name
            write(folder, *short, pad)
            np.testing.assert_array_equal(encode(folder), ids[f"ids/{name}"])
        new = Path(temporary) / "short" / "new"
        transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(new)
        np.testing.assert_array_equal(encode(new), ids["ids/sd2"])
        files = {
            str(path.relative_to(new.parent)): path.read_text()
            for path in sorted(new.parent.glob("*/*"))
            if path.parent.name != "sd2" or path.stem == "special_tokens_map"
        }
        path = Path(__file__).with_name("clip_tokenizer.npz")
        np.savez_compressed(
            path, prompts=json.dumps(PROMPTS), files=json.dumps(files), **ids
        )
    print(path.name, path.stat().st_size, len(short[1]), "merges")


if __name__ == "__main__":
    main()
