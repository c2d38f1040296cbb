"""From the name of a draft model to what makes drafts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from jaxllm.checkpoint import Checkpoint
from jaxllm.config import ModelConfig, ModelError
from jaxllm.engine.draft_model import DraftModel
from jaxllm.engine_options import EngineOptions
from jaxllm.engine_setup import build_model
from jaxllm.models.decoder import Model
from jaxllm.runtime.model_runner import ModelRunner
from jaxllm.runtime.sharding import Placement
from jaxllm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A model that makes drafts for another, its weights not yet read."""

    name: str
    checkpoint: Checkpoint
    model: Model

    @classmethod
    def open(
        cls,
        name: str,
        options: EngineOptions,
        placement: Placement,
        target: ModelConfig,
        cache_dir: Path,
    ) -> Draft:
        """Finds and checks it. target: the model that it makes drafts for. Raises ModelError for
        files that cannot be used, ValueError for a model that does not fit."""
        checkpoint = Checkpoint.open(name, None, cache_dir)
        size = checkpoint.config.vocab_size
        if size != target.vocab_size:
            raise ValueError(
                f"draft model {name!r}: its vocabulary has {size} tokens and the model's has "
                f"{target.vocab_size}; they must have the same one"
            )
        try:
            model = build_model(checkpoint.config, options, placement)
        except ValueError as error:
            raise ValueError(f"draft model {name!r}: {error}") from error
        checkpoint.check(model)
        return cls(name, checkpoint, model)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError if it comes with a tokenizer for another vocabulary than the model's.
        Only ordinary tokens count: chat models rename special ones that their bases reserve."""
        try:
            own = self.checkpoint.tokenizer()
        except ModelError:  # it has none, and needs none
            return
        special: set[int] = set()
        for backend in (own.backend, tokenizer.backend):
            special |= backend.get_added_tokens_decoder().keys()
        one, other = (
            {i: text for text, i in t.backend.get_vocab().items() if i not in special}
            for t in (own, tokenizer)
        )
        differing = [i for i in sorted(one.keys() | other.keys()) if one.get(i) != other.get(i)]
        if differing:
            first = differing[0]
            raise ValueError(
                f"draft model {self.name!r}: its tokenizer is for another vocabulary: "
                f"{len(differing)} tokens differ, of them {first} is {one.get(first)!r} and the "
                f"model's is {other.get(first)!r}"
            )

    def proposer(self, runner: ModelRunner, target: ModelRunner) -> DraftModel:
        """What asks it. target: runs the model that it makes drafts for."""
        cost = draft_cost(runner, target)
        logger.info("draft model %s: a draft costs %.2f steps", self.name, cost)
        return DraftModel(
            runner,
            runner.config,
            cost,
            max_len=self.model.config.max_context_len,
            max_rows=runner.max_rows,
            max_steps=runner.max_steps,
        )


def draft_cost(runner: ModelRunner, target: ModelRunner) -> float:
    """A step of a draft model, in steps of its target: what a step of few tokens takes is the time
    to read the weights."""
    return runner.programs.weights_read / target.programs.weights_read
