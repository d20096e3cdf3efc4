"""CLIP's byte-pair encoding of prompts, as transformers' `CLIPTokenizer` computes it."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from dtrak_jax.checks import one_of
from dtrak_jax.files import at, read_json, write_bytes, write_json

CONFIG = "tokenizer_config.json"
ADDED = "added_tokens_decoder"
WORD_END = "</w>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"
    r"[^\s\p{L}\p{N}]+"
)
"""The pieces that a text is cut into: an ending after an apostrophe, letters, a digit, other signs."""

NAMED = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""The tokens with a task, and what they are where the folder does not say."""

FIXED = {
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "padding_side": ("right",),
    "truncation_side": ("right",),
    "split_special_tokens": (False,),
}
"""Settings that this tokenizer does not have, and the values that it implies."""

UNSET = 10**6
"""Folders that state no length have a larger one."""


@dataclass(frozen=True)
class Tokenizer:
    """Maps prompts to the ids of their tokens, int32 [n, length].

    A row is the start token, the prompt's tokens, the end token, and the padding token
    up to `length`. A longer prompt loses its last tokens: `cut` returns these.
    """

    backend: tokenizers.Tokenizer
    start: int
    end: int
    pad: int
    length: int

    @classmethod
    def from_folder(
        cls, folder: epath.PathLike, length: int, vocab_size: int | None = None
    ) -> "Tokenizer":
        """Returns the tokenizer of a folder of transformers.

        The folder has tokenizer.json, or vocab.json and merges.txt; and it may have
        tokenizer_config.json, special_tokens_map.json and added_tokens.json.

        Args:
          length: the length of the text network, `max_position_embeddings`.
          vocab_size: the number of tokens of the text network, if that is to be checked.

        Raises:
          FileNotFoundError: the folder has no vocabulary.
          ValueError: it is not CLIP's, or does not fit the text network.
        """
        folder = at(folder)
        settings = _settings(folder)
        for name, allowed in FIXED.items():
            one_of(
                f"{folder}/{CONFIG}: {name}", settings.get(name, allowed[0]), allowed
            )
        stated = settings.get("model_max_length") or UNSET
        if stated != length and stated < UNSET:
            raise ValueError(
                f"{folder}/{CONFIG}: model_max_length is {stated}, but the text network "
                f"has {length} positions (max_position_embeddings): they do not belong "
                "together."
            )
        named = {name: settings.get(name) or token for name, token in NAMED.items()}
        named = {name: _content(token) for name, token in named.items()}
        backend = _backend(folder, named["unk_token"])
        backend.add_tokens(_added(settings))
        ids = backend.get_vocab()
        for i, fields in settings[ADDED].items():
            if ids[fields["content"]] != int(i):
                raise ValueError(
                    f"{folder} says that the token {fields['content']!r} has id {i}, but "
                    f"by its vocabulary it has {ids[fields['content']]}."
                )
        last, largest = max(ids.items(), key=lambda item: item[1])
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"{folder} has the token {last!r} with id {largest}, but the text "
                f"network has {vocab_size} tokens (vocab_size): they do not belong "
                "together."
            )
        start, end, pad = (
            ids[named[f"{name}_token"]] for name in ("bos", "eos", "pad")
        )
        return cls(backend, start, end, pad, length)

    @classmethod
    def learn(cls, texts: Iterable[str], length: int) -> "Tokenizer":
        """Returns a tokenizer that merges what occurs together in texts, twice or more.

        As CLIP's, its vocabulary is all bytes, all bytes that end a word, the merged
        tokens, start and end: it has tokens for every prompt.
        """
        signs = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            min_frequency=2,
            initial_alphabet=signs,
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        backend = _pipeline(BPE(end_of_word_suffix=WORD_END))
        backend.train_from_iterator(texts, trainer)
        merges = list(map(tuple, json.loads(backend.to_str())["model"]["merges"]))
        start, end = NAMED["bos_token"], NAMED["eos_token"]
        endings = [sign + WORD_END for sign in signs]
        tokens = dict.fromkeys([*signs, *endings, *map("".join, merges), start, end])
        ids = dict(zip(tokens, itertools.count()))
        backend = _pipeline(_bpe(ids, merges, end))
        backend.add_special_tokens([start, end])
        return cls(backend, ids[start], ids[end], ids[end], length)

    def save(self, folder: epath.PathLike) -> None:
        """Writes a folder that `from_folder` and transformers' CLIPTokenizer read."""
        folder, content = at(folder), json.loads(self.backend.to_str())
        merges = [" ".join(pair) for pair in content["model"]["merges"]]
        text = "\n".join(["#version: 0.2", *merges, ""])
        ids = {"bos_token": self.start, "eos_token": self.end, "pad_token": self.pad}
        added = {fields.pop("id"): fields for fields in content["added_tokens"]}
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.length,
            **{name: self.backend.id_to_token(i) for name, i in ids.items()},
            "unk_token": content["model"]["unk_token"],
            ADDED: added,
        }
        write_json(folder / "vocab.json", content["model"]["vocab"])
        write_bytes(folder / "merges.txt", text.encode())
        write_json(folder / CONFIG, settings)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        rows = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt in zip(rows, prompts):
            ids = self._encode(prompt).ids[: self.length - 2]
            ids = [self.start, *ids, self.end]
            row[: len(ids)] = ids
        return rows

    def cut(self, prompt: str) -> str:
        """Returns the end of a prompt that has no place in a row, or "".

        It may begin within a word, of which the row has the first tokens.
        """
        offsets = self._encode(prompt).offsets[self.length - 2 :]
        return prompt[offsets[0][0] :] if offsets else ""

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        return self.backend.encode(prompt, add_special_tokens=False)


def _read(path: epath.Path) -> dict:
    """Returns the content of a JSON file, or nothing if there is no such file."""
    return read_json(path) if path.exists() else {}


def _settings(folder: epath.Path) -> dict:
    """Returns the settings of a folder, with the fields of all added tokens by id."""
    settings = _read(folder / CONFIG)
    if ADDED in settings:
        return settings
    # Up to 4.33 transformers had them in files of their own.
    settings |= _read(folder / "special_tokens_map.json")
    special = {_content(settings.get(name)) for name in NAMED}
    added = {
        i: {"content": token, "special": token in special}
        for token, i in _read(folder / "added_tokens.json").items()
    }
    for fields in _read(folder / "tokenizer.json").get("added_tokens", ()):
        added[fields["id"]] = {k: v for k, v in fields.items() if k != "id"}
    return {**settings, ADDED: added}


def _added(settings: Mapping) -> list[AddedToken]:
    """Returns the tokens that a text is searched for as a whole."""
    stated = sorted(settings[ADDED].items(), key=lambda item: int(item[0]))
    added = {fields["content"]: AddedToken(**fields) for _, fields in stated}
    named = [settings.get(name) or token for name, token in NAMED.items()]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        named += settings.get(name) or ()
    # A token may have several names. As in transformers the last one counts, but for
    # those that are spelled with the same or no properties at all as one before.
    spellings = {}
    for token in named:
        if _content(token) not in added:
            spellings.setdefault((isinstance(token, str), _content(token)), token)
    for (alone, content), token in spellings.items():
        fields = {} if alone else {k: v for k, v in token.items() if k != "__type"}
        fields |= {"content": content, "special": True}
        added[content] = AddedToken(**fields)
    return list(added.values())


def _content(token: str | Mapping | None) -> str | None:
    """Returns a token, which files have alone or among its properties."""
    return token["content"] if isinstance(token, Mapping) else token


def _backend(folder: epath.Path, unknown: str) -> tokenizers.Tokenizer:
    """Returns CLIP's pipeline with the vocabulary of a folder."""
    vocab, merges = _vocabulary(folder)
    try:
        return _pipeline(_bpe(vocab, merges, unknown))
    except Exception as error:  # The library has no narrower class.
        raise ValueError(f"{folder} has a damaged vocabulary: {error}") from error


def _bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str
) -> BPE:
    """Returns CLIP's merging of a word's bytes."""
    return BPE(
        vocab,
        merges,
        unk_token=unknown,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
        fuse_unk=False,
    )


def _pipeline(model: BPE) -> tokenizers.Tokenizer:
    """Returns CLIP's pipeline: normalise, cut into words, and merge their bytes."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _vocabulary(folder: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the ids of tokens, and the pairs of tokens that are merged, in order."""
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json").get("model", {})
        for name, value in (("type", "BPE"), ("end_of_word_suffix", WORD_END)):
            one_of(f"{folder}/tokenizer.json: {name}", model.get(name), (value,))
        vocab, merges = model["vocab"], model["merges"]
    else:
        missing = [f for f in ("vocab.json", "merges.txt") if not (folder / f).exists()]
        if missing:
            raise FileNotFoundError(
                f"{folder} has no {' and no '.join(missing)}; it must hold both, or "
                "tokenizer.json, of a CLIPTokenizer."
            )
        vocab = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    pairs = [tuple(x.split(" ") if isinstance(x, str) else x) for x in merges]
    return vocab, pairs
