"""Several answers to one prompt and beam search on this machine: what they cost, as ratios.

    python scripts/measure_decoding.py answers beams
    python scripts/measure_decoding.py beams --dtype float32 --json figures.json

answers: n = 8 against the prompt alone and the decoding of eight requests that have it. beams: a
search of width 8 against transformers' on the same model, dtype and threads (torch has to be
installed), each in processes of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import Figures, machine, report

from jaxllm.bench.processes import cache_with_models

if TYPE_CHECKING:
    from jaxllm.loading.gguf_source import GGUFFile

MODEL = "smollm2-135m-instruct"
NUM_ANSWERS, PROMPT_LEN, ANSWER_LEN = 8, 1024, 32
BEAM_WIDTH, SEARCHED_LEN = 8, 64
TEXT = "Once upon a time, in a village by the sea, there lived an old fisherman who"
NUM_TRIES = 5


# ---- in the process that is measured


def answers(model: str, cache_dir: str, dtype: str) -> Figures:
    """Medians of tries in turns, each with an empty prefix cache."""
    from jaxllm import LLM, SamplingParams

    options = {"max_num_seqs": NUM_ANSWERS, "max_model_len": 2048, "compilation": "ahead"}
    with LLM(model, cache_dir=cache_dir, dtype=dtype, **options) as llm:
        prompt = [1000 + 7 * i % 20_000 for i in range(PROMPT_LEN)]
        drawn = {"temperature": 1.0, "seed": 1, "ignore_eos": True, "max_tokens": ANSWER_LEN}
        one, several = SamplingParams(**drawn), SamplingParams(**drawn, n=NUM_ANSWERS)
        first = SamplingParams(**{**drawn, "max_tokens": 1})
        seconds: dict[str, list[float]] = {"prompt": [], "decoding": [], "several": []}
        for _ in range(1 + NUM_TRIES):  # one to warm up
            llm.reset_prefix_cache()
            seconds["prompt"].append(_timed(lambda: llm.generate([prompt], first, use_tqdm=False)))
            outputs = llm.generate([prompt] * NUM_ANSWERS, one, use_tqdm=False)
            times = [output.metrics for output in outputs]
            begin = max(each.first_token_time or 0.0 for each in times if each)
            seconds["decoding"].append(
                max(each.finished_time or 0.0 for each in times if each) - begin
            )
            llm.reset_prefix_cache()
            most = _watch_pool(llm)
            seconds["several"].append(
                _timed(lambda: llm.generate([prompt], several, use_tqdm=False))
            )
        block_size = llm.engine.config.block_size
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    num_shared = PROMPT_LEN // block_size
    num_own = -(-(PROMPT_LEN + ANSWER_LEN - 1) // block_size) - num_shared
    return {
        **{f"{name}_s": value for name, value in medians.items()},
        "ratio": medians["several"] / (medians["prompt"] + medians["decoding"]),
        "most_blocks": most[0],
        "ideal_blocks": num_shared + NUM_ANSWERS * num_own,
    }


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _watch_pool(llm: Any) -> list[int]:
    """A list whose entry becomes the most blocks that were held after a step."""
    engine, most = llm.engine, [0]
    step = type(engine).step

    def watched() -> Any:
        outputs = step(engine)
        pool = engine.scheduler.pool
        most[0] = max(most[0], pool.num_blocks - pool.num_free_blocks)
        return outputs

    engine.step = watched
    return most


def own_beams(model: str, cache_dir: str, dtype: str) -> Figures:
    """Seconds of a search in this engine."""
    from jaxllm import LLM, BeamSearchParams

    params = BeamSearchParams(beam_width=BEAM_WIDTH, max_tokens=SEARCHED_LEN, ignore_eos=True)
    options = {"max_num_seqs": BEAM_WIDTH, "max_model_len": 256, "compilation": "ahead"}
    with LLM(model, cache_dir=cache_dir, dtype=dtype, **options) as llm:
        prompt = llm.get_tokenizer().encode(TEXT)
        seconds, best = [], []
        for _ in range(1 + NUM_TRIES):
            llm.reset_prefix_cache()
            seconds.append(
                _timed(lambda: best.append(llm.beam_search([prompt], params, use_tqdm=False)[0]))
            )
    return {"seconds": statistics.median(seconds[1:]), "tokens": best[-1].outputs[0].token_ids}


def their_beams(model: str, cache_dir: str, dtype: str) -> Figures:
    """The same of transformers with the same weights."""
    import transformers

    from jaxllm.loading.gguf_source import GGUFFile
    from jaxllm.loading.hub import find_model
    from jaxllm.text.tokenizer import load_tokenizer_from_gguf

    path = find_model(model, cache_dir=Path(cache_dir)).gguf
    assert path is not None, "transformers is measured with a model of one .gguf file"
    file = GGUFFile(path)
    with tempfile.TemporaryDirectory() as folder:
        _save_for_transformers(file, Path(folder))
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    prompt = load_tokenizer_from_gguf(file.metadata).encode(TEXT)
    inputs = transformers.BatchEncoding(
        {"input_ids": [prompt], "attention_mask": [[1] * len(prompt)]}, tensor_type="pt"
    )
    config = transformers.GenerationConfig(
        do_sample=False, num_beams=BEAM_WIDTH, max_new_tokens=SEARCHED_LEN, pad_token_id=0
    )
    network.generation_config.eos_token_id = None  # it would be taken from there
    seconds, best = [], []
    for _ in range(1 + NUM_TRIES):
        seconds.append(
            _timed(lambda: best.append(network.generate(**inputs, generation_config=config)))
        )
    tokens = best[-1][0, len(prompt) :].tolist()
    return {"seconds": statistics.median(seconds[1:]), "tokens": tokens}


def _save_for_transformers(file: GGUFFile, folder: Path) -> None:
    """A Llama of a .gguf file as a folder that transformers reads. It reads such files itself, but
    not without a further package."""
    import transformers
    from safetensors.numpy import save_file

    config, source = file.config(), file.source()
    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "architectures": ["LlamaForCausalLM"],
    }
    transformers.LlamaConfig(**options).save_pretrained(folder)
    weights = {name: source.read(name) for name in source.shapes}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- in the process that measures


def beams(model: str, cache_dir: str, dtype: str, turns: int) -> Figures:
    """Both in turns, a process each time."""
    own, theirs = [], []
    for _ in range(turns):
        own.append(in_own_process("own_beams", model, cache_dir, dtype))
        theirs.append(in_own_process("their_beams", model, cache_dir, dtype))
    ours, others = own[-1]["tokens"], theirs[-1]["tokens"]
    is_equal = [a == b for a, b in zip(ours, others, strict=False)]
    num_equal = is_equal.index(False) if False in is_equal else len(is_equal)
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(own, theirs, strict=True)]
    return {
        "seconds": statistics.median(each["seconds"] for each in own),
        "transformers_seconds": statistics.median(each["seconds"] for each in theirs),
        "times_as_fast": statistics.median(ratios),
        "all_ratios": " ".join(f"{ratio:.2f}" for ratio in ratios),
        "equal_tokens_of_the_best": f"{num_equal} of {len(ours)}",
    }


def in_own_process(name: str, model: str, cache_dir: str, dtype: str) -> Figures:
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    words = ["--child", name, "--model", model, "--dtype", dtype, "--cache-dir", cache_dir]
    result = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, env=environment
    )
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


CHILDREN: dict[str, Callable[[str, str, str], Figures]] = {
    "answers": answers,
    "own_beams": own_beams,
    "their_beams": their_beams,
}


def main() -> None:
    """Measures what was asked for, prints it, and keeps it where --json says."""
    parser = argparse.ArgumentParser(description="figures of n and of beam search")
    parser.add_argument("figures", nargs="*", help="answers, beams; default: both")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--turns", type=int, default=3, help="of each engine's search")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](args.model, args.cache_dir, args.dtype)))
        return
    if unknown := set(args.figures) - {"answers", "beams"}:
        parser.error(f"unknown figures {', '.join(sorted(unknown))}")
    results: dict[str, Figures] = {"machine": machine()}
    with cache_with_models() as cache_dir:
        for name in args.figures or ["answers", "beams"]:
            if name == "answers":
                results[name] = in_own_process(name, args.model, cache_dir, args.dtype)
            else:
                results[name] = beams(args.model, cache_dir, args.dtype, args.turns)
    report(results, args.json)


if __name__ == "__main__":
    main()
