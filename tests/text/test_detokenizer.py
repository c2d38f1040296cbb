"""Incremental decoding and stop strings, against decoding everything at once and plain find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import TEXTS, gguf_byte_level, gguf_sentencepiece, train_byte_level
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxllm.text.detokenizer import IncrementalDetokenizer
from jaxllm.text.tokenizer import Tokenizer, load_tokenizer_from_gguf

BYTE_LEVEL = load_tokenizer_from_gguf(gguf_byte_level("gpt-2"))
SENTENCEPIECE = load_tokenizer_from_gguf(gguf_sentencepiece())


def metaspace() -> Tokenizer:
    """A decoder that only the windowed decoding knows."""
    backend = SENTENCEPIECE.backend.from_str(SENTENCEPIECE.backend.to_str())
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, SENTENCEPIECE.special_tokens)


METASPACE = metaspace()
TOKENIZERS = [BYTE_LEVEL, SENTENCEPIECE]
NAMES = ["byte level", "sentencepiece"]
texts = st.text(
    st.sampled_from("ab the dog,\n 12éß日本😀👩‍👧") | st.characters(codec="utf-8"), max_size=30
)


def run(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], **options: Any
) -> tuple[str, list[str], str | None]:
    """The final text, the deltas after each token and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    deltas, stop = [], None
    for token_id in ids:
        stop = detokenizer.push([token_id])
        deltas.append(detokenizer.take_delta())
        if stop is not None:
            break
    stop = detokenizer.finish() or stop
    deltas.append(detokenizer.take_delta())
    assert "".join(deltas) == detokenizer.text
    assert detokenizer.take_delta() == ""
    return detokenizer.text, deltas, stop


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, METASPACE], ids=[*NAMES, "metaspace"])
@given(prompt=texts, text=texts, special=st.booleans(), skip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_deltas_make_the_text_that_decoding_at_once_makes(
    tokenizer: Tokenizer, prompt: str, text: str, special: bool, skip: bool
) -> None:
    if tokenizer is METASPACE:  # it has no byte fallback
        prompt, text = (x.encode("ascii", "ignore").decode() for x in (prompt, text))
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=special)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id or 0]
    before = tokenizer.decode(prompt_ids, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=skip)
    final, _, stop = run(tokenizer, prompt_ids, ids, skip_special_tokens=skip)
    assert before + final == whole
    assert stop is None


@given(ids=st.lists(st.integers(0, 255), max_size=40), split=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_as_all_at_once(ids: list[int], split: int) -> None:
    """Token ids 3 to 258 are the single bytes; most of these sequences are not valid UTF-8."""
    ids = [token_id + 3 for token_id in ids]
    prompt, output = ids[:split], ids[split:]
    final, _, _ = run(BYTE_LEVEL, prompt, output)
    whole = BYTE_LEVEL.decode(ids)
    before = BYTE_LEVEL.decode(prompt)
    assert whole.endswith(final)
    definite = whole[: len(whole) - len(final)]
    # a prompt that ends inside a character gives that character to the output
    assert before in (definite, definite + "\ufffd")


def test_invalid_fallback_bytes_keep_the_valid_characters_around_them() -> None:
    ids = [3 + byte for byte in "é😀".encode() + b"\xff\xe2\x82" + "ß".encode()]
    final, deltas, _ = run(SENTENCEPIECE, [1], ids)
    assert final == "é😀" + "\ufffd" * 3 + "ß"
    assert deltas[:6] == ["", "é", "", "", "", "😀"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)
def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    first = 3 if tokenizer is SENTENCEPIECE else None
    spelled = [3 + b if first else BYTE_LEVEL.encode("😀")[0] for b in "😀".encode()]
    ids = spelled if first else BYTE_LEVEL.encode("😀")
    _, deltas, _ = run(tokenizer, tokenizer.encode("a"), ids)
    assert [d for d in deltas if d] == ["😀"]
    final, deltas, _ = run(tokenizer, tokenizer.encode("a"), ids[:-1])
    assert set(final) == {"\ufffd"}
    assert "".join(deltas[:-1]) == ""


def test_a_continued_text_keeps_its_space_and_a_new_one_loses_the_added_one() -> None:
    prompt = SENTENCEPIECE.encode("The quick")
    ids = SENTENCEPIECE.encode("brown fox", add_special_tokens=False)
    assert run(SENTENCEPIECE, prompt, ids)[0] == " brown fox"
    assert run(SENTENCEPIECE, [1], ids)[0] == "brown fox"
    assert run(SENTENCEPIECE, [], ids)[0] == "brown fox"
    assert run(SENTENCEPIECE, [1], ids, skip_special_tokens=False)[0] == " brown fox"


def test_tokens_outside_the_vocabulary_have_no_text() -> None:
    ids = BYTE_LEVEL.encode("the dog")
    assert run(BYTE_LEVEL, [], [ids[0], 10**6, *ids[1:]])[0] == "the dog"


def test_word_level_tokenizers_without_a_decoder() -> None:
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")))
    assert run(tokenizer, [0], [1, 2, 0])[0] == " b c a"
    assert run(tokenizer, [], [1, 2, 0])[0] == "b c a"


def test_an_endless_incomplete_window_is_given_up() -> None:
    backend = train_byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    broken = backend.token_to_id("Ģ")  # byte 0x80 alone
    _, deltas, _ = run(Tokenizer(backend), [], [broken] * 100)
    assert sum(map(len, deltas[:-1])) >= 60


def reference_stop(
    text: str, stop: Sequence[str], include: bool, unchecked: int = 0
) -> tuple[str, str | None]:
    """The first end of a stop string behind the unchecked characters; of equal ends the longest."""
    for end in range(unchecked + 1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)
@given(
    text=st.text("ab \n😀é", max_size=40),
    stop=st.lists(st.text("ab \n😀é", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 10),
)
@settings(max_examples=250, deadline=None)
def test_stop_strings_equal_a_search_of_the_whole_text(
    tokenizer: Tokenizer, text: str, stop: list[str], include: bool, min_tokens: int
) -> None:
    prompt = tokenizer.encode("the dog")
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = run(tokenizer, prompt, ids)[0]
    early = IncrementalDetokenizer(tokenizer, prompt)
    early.push(ids[:min_tokens])
    unchecked = len(whole) if min_tokens >= len(ids) else len(early.text)
    options: dict[str, Any] = {"stop": stop, "include_stop_str_in_output": include}
    final, deltas, found = run(tokenizer, prompt, ids, min_tokens=min_tokens, **options)
    assert (final, found) == reference_stop(whole, stop, include, unchecked)
    sent = ""
    for delta in deltas:  # nothing is ever taken back
        sent += delta
        assert final.startswith(sent)


def test_a_single_stop_string_is_where_find_says() -> None:
    for text in TEXTS:
        ids = BYTE_LEVEL.encode(text)
        for stop in ("the", "dog.", "😃", "\n\n", "zzz"):
            final, _, found = run(BYTE_LEVEL, [], ids, stop=[stop])
            at = BYTE_LEVEL.decode(ids).find(stop)
            assert final == (BYTE_LEVEL.decode(ids) if at < 0 else BYTE_LEVEL.decode(ids)[:at])
            assert found == (None if at < 0 else stop)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, [], stop=["ab!"])
    letters = [BYTE_LEVEL.encode(c)[0] for c in "xabyab"]
    deltas = []
    for letter in letters:
        detokenizer.push([letter])
        deltas.append(detokenizer.take_delta())
    assert deltas == ["x", "", "", "aby", "", ""]
    assert detokenizer.text == "xabyab"
    assert detokenizer.finish() is None
    assert detokenizer.take_delta() == "ab"


def test_many_tokens_in_one_push_stop_at_the_right_one() -> None:
    ids = [BYTE_LEVEL.encode(c)[0] for c in "one. two."]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, [], stop=["."])
    assert detokenizer.push(ids) == "."
    assert detokenizer.text == "one"
    assert detokenizer.num_tokens == 4
    assert detokenizer.push(ids) == "."
    assert detokenizer.text == "one"
    assert detokenizer.finish() == "."
    assert detokenizer.take_delta() == "one"


def test_smollm2_streams_what_it_decodes(smollm2: Tokenizer) -> None:
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert run(smollm2, smollm2.encode("<|im_start|>user\n"), ids)[0] == smollm2.decode(ids)
