"""Two processes that share one LLM give the same answers; encoders and compressors are in both."""

import os
from pathlib import Path

from engine_runs import MAX_NEW_TOKENS, answerer_of, expected_ids, needs_vllm, samples_of, write_export

from mllm.vllm_plugin.engine_options import ENVIRONMENT
from mllm.vllm_plugin.prompts import engine_prompt

BUDGETS = ("image=4,audio=/8,video=/5", "")
pytestmark = needs_vllm


def test_an_llm_that_is_split_gives_the_same_answers(tmp_path: Path) -> None:
    os.environ |= {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    exported = write_export(tmp_path)
    llm = LLM(
        str(exported),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        tensor_parallel_size=2,
        limit_mm_per_prompt={"image": 1, "audio": 1, "video": 1},
    )
    answerer, samples = answerer_of(exported), samples_of(tmp_path / "media", [("image",), ("audio", "video")])
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    for budget in BUDGETS:
        prompts = [engine_prompt(answerer.processor, sample, budget) for sample in samples]
        ids = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
        assert ids == expected_ids(answerer, samples, budget)
