"""What may come at each place of a guess under a form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from masks import allowed, mask_of

from jaxllm.engine.forms import masks_ahead
from jaxllm.engine.sequence import Sequence
from jaxllm.sampling_params import SamplingParams

VOCAB_SIZE, EOS = 40, 39
ANSWERS = [[1, 2, 3], [1, 35, 4, 5, 6, 7], [1, 35, 4, 5, 8, 9], [1, EOS]]


class OneOf:
    """The constraint of answers that are one of a few."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers
        firsts = {answer[0] for answer in answers if answer}
        self.is_complete = not firsts
        self.mask = mask_of(np.isin(np.arange(VOCAB_SIZE), list(firsts)))

    def accept(self, token_id: int) -> None:
        if token_id == 8:
            raise ValueError("too expensive")
        self.__init__([a[1:] for a in self.answers if a[:1] == [token_id]])  # type: ignore[misc]

    def forced(self) -> list[int]:
        firsts = {answer[0] for answer in self.answers if answer}
        if len(firsts) != 1:
            return []
        return [*firsts, *OneOf([answer[1:] for answer in self.answers if answer]).forced()]

    def copy(self) -> OneOf:
        return OneOf(self.answers)


def sequence(**options: object) -> Sequence:
    params = dataclasses.replace(SamplingParams(), **options)  # type: ignore[arg-type]
    return Sequence(0, "r", 0, params, 0, [5, 6, 7], 3, (EOS,), constraint=OneOf(ANSWERS))


@pytest.mark.parametrize(
    ("guess", "options", "expected"),
    [
        ([2, 3], {}, []),  # not allowed
        ([1, 3], {}, [{2, 35, EOS}]),  # cut before what is not
        ([1, EOS, 1], {}, [{2, 35, EOS}]),  # and before what ends it
        ([1, 2, 3], {}, [{2, 35, EOS}]),  # also if what ends it was forced
        ([1, 35, 4, 5], {}, [{2, 35, EOS}, {4}, {5}, {6, 8}]),
        ([1, 35, 4], {}, [{2, 35, EOS}]),  # not in the middle of what is forced
        ([1, 35, 5], {}, [{2, 35, EOS}]),
        ([1, 35, 4], {"presence_penalty": 0.1}, [{2, 35, EOS}, {4}, {5}]),  # takes nothing unseen
        ([1, 35, 4, 5, 8, 9], {}, [{2, 35, EOS}, {4}, {5}, {6, 8}]),  # 8 is too expensive
        ([1, 35, 4], {"stop_token_ids": [35]}, [{2, 35, EOS}]),
    ],
)
def test_a_guess_goes_as_far_as_the_form_and_ends_where_something_is_to_be_chosen(
    guess: list[int], options: dict[str, object], expected: list[set[int]]
) -> None:
    one = sequence(**options)
    masks = masks_ahead(one, guess)
    assert [set(np.flatnonzero(allowed(mask)).tolist()) for mask in masks] == expected
    assert isinstance(one.constraint, OneOf)
    assert one.constraint.answers == ANSWERS  # as it was
