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
        ids = torch.tensor([list(prompt)])
        options = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0
        )
        mask = torch.ones_like(ids)
        out = self.module.generate(ids, generation_config=options, attention_mask=mask)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def beam_search(
        self, prompt: Sequence[int], num_tokens: int, eos_token_ids: Sequence[int], **options: Any
    ) -> list[tuple[list[int], float]]:
        """All answers by transformers' own generate, the best first, with their scores. options:
        num_beams, length_penalty, early_stopping."""
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
            out = self.module.generate(ids, generation_config=config, attention_mask=mask)
        answers = []
        for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
            answer = row[len(prompt) :]
            ends = [i + 1 for i, token_id in enumerate(answer) if token_id in eos_token_ids]
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
