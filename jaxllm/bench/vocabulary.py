"""Where the tokens of made-up prompts come from: a tokenizer, a size, a server, or plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer

Prompt = str | list[int]

# Common words, each one token of most vocabularies.
TEXT = """
the of and to in is was for that it with as his on be at by this had not are but from or have an
they which one you were her all she there would their we him been has when who will more no if out
so said what up its about into than them can only other new some could time these two may then do
first any my now such like our over man me even most made after also did many before must through
back years where much your way well down should because each just those people how too little state
good very make world still own see men work long get here between both life being under never day
same another know while last might us great old year off come since against go came right used take
three states himself few house use during without again place around however home small found
thought went say part once general high upon school every don does got united left number course
war until always away something fact though water less public put think almost hand enough far took
head yet government system better set told
"""
WORDS = tuple(TEXT.split())
CHARS_PER_TOKEN = 4  # of English text, where nobody can count


@dataclass(frozen=True)
class Vocabulary:
    """Draws units and makes prompts of them. Units are token ids, or indices of WORDS where there
    are no ids; a word then counts as a token.

    ids: token ids to draw from. as_text: the endpoint takes no ids.
    """

    ids: np.ndarray | None = None
    tokenizer: Tokenizer | None = None
    as_text: bool = False

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Random units."""
        return rng.choice(len(WORDS) if self.ids is None else self.ids, count).tolist()

    def prompt(self, units: Sequence[int]) -> Prompt:
        """As ids if there are any and the endpoint takes them."""
        return self.text(units) if self.as_text or self.ids is None else list(units)

    def text(self, units: Sequence[int]) -> str:
        """With a tokenizer: a text of at most that many tokens (their text may be tokenized
        otherwise, and is cut then). Without one: a word for each."""
        if self.tokenizer is None:
            return " ".join(WORDS[unit % len(WORDS)] for unit in units)
        text = self.tokenizer.decode(units)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.decode(token_ids[: len(units)])

    def count(self, text: str) -> int:
        """Tokens of a text; without a tokenizer, four characters are one."""
        if self.tokenizer is None:
            return max(1, round(len(text) / CHARS_PER_TOKEN))
        return len(self.tokenizer.encode(text))


def of_tokenizer(tokenizer: Tokenizer, *, as_text: bool = False) -> Vocabulary:
    """All of a tokenizer's ids but the special ones."""
    ids = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(tokenizer.special_token_ids))
    return Vocabulary(ids, tokenizer, as_text)


def of_size(size: int, *, as_text: bool = False) -> Vocabulary:
    """Ids from 0; special ones may be among them."""
    if size < 1:
        raise ValueError(f"--vocab-size must be at least 1, got {size}")
    return Vocabulary(np.arange(size), None, as_text)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder, a .gguf file, a built-in model or org/name. Raises ModelError."""
    from jaxllm.loading.gguf_source import GGUFFile
    from jaxllm.loading.hub import find_model
    from jaxllm.text.tokenizer import load_tokenizer_from_folder, load_tokenizer_from_gguf

    folder = Path(name).expanduser()
    if not folder.is_dir():  # a folder needs no weights here
        files = find_model(name)
        if files.gguf is not None:
            return load_tokenizer_from_gguf(GGUFFile(files.gguf).metadata)
        assert files.folder is not None
        folder = files.folder
    return load_tokenizer_from_folder(folder)
