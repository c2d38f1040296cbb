"""What transformers on torch says about a model: greedy tokens, logits, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

NEAR_TIE = 1e-4  # float32 engines may order logits differently that are closer than this


# Which tokens may follow an output [V] bool, and whether the answer is complete with it.
Form = Callable[[list[int]], tuple[np.ndarray, bool]]
NO_ANSWER = -1e6  # transformers subtracts 1e9 from the scores of what is no answer


@dataclass(frozen=True)
class _Form:
    """A form of answers for transformers' generate. Beams that have ended are kept there, with a
    score that no other has; they go on as they like."""

    form: Form
    prompt_len: int

    def options(self) -> dict[str, Any]:
        """Of generate."""
        return {
            "logits_processor": transformers.LogitsProcessorList([self.exclude]),
            "stopping_criteria": transformers.StoppingCriteriaList([self.is_complete]),
        }

    def exclude(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [R, V] with minus infinity for what may not follow ids [R, n]."""
        rows = []
        for row in ids.tolist():
            allowed, is_complete = self.form(row[self.prompt_len :])
            rows.append(allowed | is_complete)
        return scores.masked_fill(~torch.tensor(np.stack(rows)), -np.inf)

    def is_complete(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which of ids [R, n] are whole answers; [R] bool."""
        return torch.tensor([self.form(row[self.prompt_len :])[1] for row in ids.tolist()])


@dataclass(frozen=True)
class TorchModel:
    """A causal model of transformers with plain lists and numpy arrays around it."""

    module: Any

    def __post_init__(self) -> None:
        self.module.generation_config.eos_token_id = None  # generate would fall back to it

    @classmethod
    def from_folder(cls, folder: Path) -> TorchModel:
        """The model as saved, in float32."""
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
        )
        return cls(loaded.eval())

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """[T, V] float32, each row about the token that follows."""
        with torch.no_grad():
            rows = self.module(torch.tensor([list(token_ids)])).logits[0]
        array: np.ndarray = rows.float().numpy()
        return array

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """num_tokens tokens by transformers' own generate, end of sequence ignored."""
        return self.greedy_of_all([prompt], num_tokens)[0]

    def greedy_of_all(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The same of several prompts, padded on the left: the weights are read once a token."""
        width = max(map(len, prompts))
        padding = [[0] * (width - len(prompt)) for prompt in prompts]
        ids = torch.tensor([[*p, *prompt] for p, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[*p, *[1] * len(x)] for p, x in zip(padding, prompts, strict=True)])
        options = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0
        )
        out = self.module.generate(ids, generation_config=options, attention_mask=mask)
        tokens: list[list[int]] = out[:, width:].tolist()
        return tokens

    def beam_search(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        eos_token_ids: Sequence[int],
        form: Form | None = None,
        **options: Any,
    ) -> list[tuple[list[int], float]]:
        """All answers by transformers' own generate, the best first, with their scores. options:
        num_beams, length_penalty, early_stopping. form: see _Form; what transformers fills up the
        answers with, where it finds fewer than num_beams, is left out."""
        ids = torch.tensor([list(prompt)])
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=list(eos_token_ids) or None,
            pad_token_id=0,
            num_return_sequences=options["num_beams"],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        mask = torch.ones_like(ids)
        with torch.no_grad():
            limits = {} if form is None else _Form(form, len(prompt)).options()
            out = self.module.generate(ids, generation_config=config, attention_mask=mask, **limits)
        answers = []
        for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
            answer = row[len(prompt) :]
            ends = [i + 1 for i, token_id in enumerate(answer) if token_id in eos_token_ids]
            if form is not None:
                ends += [i for i in range(1, len(answer) + 1) if form(answer[:i])[1]]
            if score > NO_ANSWER:
                answers.append((answer[: min(ends, default=len(answer))], score))
        return answers

    def greedy_changed(
        self, prompt: Sequence[int], num_tokens: int, change: Callable[[np.ndarray, list[int]], Any]
    ) -> list[int]:
        """The tokens that are most likely after change(logits [V], output so far)."""
        output: list[int] = []
        for _ in range(num_tokens):
            changed = change(self.logits([*prompt, *output])[-1], output)
            output.append(int(np.argmax(changed)))
        return output


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def assert_greedy(
    model: TorchModel, prompt: Sequence[int], actual: Sequence[int], expected: Sequence[int]
) -> None:
    """Token for token; where they part, the model must hold the two tokens for equally likely."""
    assert len(actual) == len(expected)
    for position, (token, wanted) in enumerate(zip(actual, expected, strict=True)):
        if token != wanted:
            row = model.logits([*prompt, *expected[:position]])[-1]
            margin = float(row[wanted] - row[token])
            assert margin < NEAR_TIE, f"token {position}: {token} for {wanted}, {margin:.6f} below"
            return


def assert_beams(
    found: Sequence[tuple[list[int], float]], expected: Sequence[tuple[list[int], float]]
) -> None:
    """The same answers, given with their scores; those whose scores are nearly equal in any order,
    and the last ones may be others that are as good."""
    assert len(found) == len(expected)
    np.testing.assert_allclose(
        [score for _, score in found], [score for _, score in expected], rtol=2e-4, atol=NEAR_TIE
    )
    worst = expected[-1][1]
    for tokens, score in found:
        margin = NEAR_TIE * (1 + abs(score))
        near = [other for other, value in expected if abs(value - score) < margin]
        assert tokens in near or abs(score - worst) < margin
