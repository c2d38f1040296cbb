"""What speculation brings on this machine at batch 1, as ratios.

    python scripts/measure_speculation.py
    python scripts/measure_speculation.py --tries 5 --json figures.json
    python scripts/measure_speculation.py --model MODEL --speculative draft:SMALLER_MODEL

quote: answers to the prompts of data/summarise_and_quote.json, greedy. random: random prompts,
whose answers are drawn at temperature 1. Each prompt is answered with and without speculation in
turns, by one engine with the same programs; a figure is made of the medians of each prompt's times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from measuring import Figures, machine, report

from jaxllm import LLM, SamplingParams
from jaxllm.outputs import RequestOutput
from jaxllm.prompts import tokenize_chat

MODEL = "smollm2-135m-instruct"
PROMPTS = Path(__file__).parent / "data" / "summarise_and_quote.json"
NUM_RANDOM, RANDOM_LEN = 4, 100


def quoting(llm: LLM) -> list[tuple[list[int], SamplingParams]]:
    """The prompts of the file, through the model's chat template."""
    params = SamplingParams(temperature=0, max_tokens=160)
    tokenizer = llm.get_tokenizer()
    prompts = []
    for entry in json.loads(PROMPTS.read_text()):
        content = f"{entry['task']}\n\n{entry['text']}"
        chat = tokenize_chat(
            [{"role": "user", "content": content}], tokenizer, add_generation_prompt=True
        )
        prompts.append((chat.token_ids, params))
    return prompts


def random_text(llm: LLM) -> list[tuple[list[int], SamplingParams]]:
    """Tokens without sense, and answers that hold as little."""
    import numpy as np

    draws = np.random.default_rng(0)
    vocab_size = llm.engine.vocab_size
    return [
        (
            draws.integers(100, vocab_size, RANDOM_LEN).tolist(),
            SamplingParams(temperature=1, seed=i, max_tokens=100, ignore_eos=True),
        )
        for i in range(NUM_RANDOM)
    ]


def compare(llm: LLM, prompts: list[tuple[list[int], SamplingParams]], tries: int) -> Figures:
    """Times of all prompts with and without, and what was guessed."""
    engine: Any = llm.engine
    speculator = engine.speculator
    seconds: dict[bool, float] = {True: 0.0, False: 0.0}
    num_steps: dict[bool, int] = {True: 0, False: 0}
    num_tokens = num_equal = num_drafts = num_accepted = 0
    for prompt, params in prompts:
        times: dict[bool, list[float]] = {True: [], False: []}
        outputs: dict[bool, RequestOutput] = {}
        for number in range(2 * tries):
            speculates = bool(number % 2)
            engine.speculator = speculator if speculates else None
            before, started = engine.meter.num_steps, time.perf_counter()
            [outputs[speculates]] = llm.generate([prompt], params, use_tqdm=False)
            times[speculates].append(time.perf_counter() - started)
            if number < 2:
                num_steps[speculates] += engine.meter.num_steps - before
        for speculates, of_prompt in times.items():
            seconds[speculates] += statistics.median(of_prompt)
        answer, metrics = outputs[True].outputs[0].token_ids, outputs[True].metrics
        assert metrics is not None
        num_tokens += len(answer)
        num_equal += answer == outputs[False].outputs[0].token_ids
        num_drafts += metrics.num_draft_tokens
        num_accepted += metrics.num_accepted_tokens
    engine.speculator = speculator
    return {
        "tokens": num_tokens,
        "tokens_per_second_without": num_tokens / seconds[False],
        "tokens_per_second": num_tokens / seconds[True],
        "times_as_fast": seconds[False] / seconds[True],
        "steps_without": num_steps[False],
        "steps": num_steps[True],
        "drafts": num_drafts,
        "accepted": num_accepted,
        "equal_answers": f"{num_equal} of {len(prompts)}",
    }


def main() -> None:
    """Measures both kinds of text, prints the figures, and keeps them where --json says."""
    parser = argparse.ArgumentParser(description="figures of speculation")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--speculative", default="ngram", help="ngram or draft:MODEL")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tries", type=int, default=3, help="of each prompt, both ways")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    limits: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 512}
    options = {**limits, "max_model_len": 1024, "compilation": "ahead", "dtype": args.dtype}
    results: dict[str, Figures] = {"machine": machine()}
    with LLM(args.model, **options, speculative=args.speculative) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8), use_tqdm=False)
        results["quote"] = compare(llm, quoting(llm), args.tries)
        results["random"] = compare(llm, random_text(llm), args.tries)
    report(results, args.json)


if __name__ == "__main__":
    main()
