"""Two processes that share one LLM give the same answers; encoders and compressors are in both."""

from pathlib import Path

from engine_runs import MAX_NEW_TOKENS, answerer_of, engine, expected_ids, needs_vllm, samples_of, write_export

from mllm.vllm_plugin.prompts import engine_prompt

BUDGETS = ("image=4,audio=/8,video=/5", "")
pytestmark = needs_vllm


def test_an_llm_that_is_split_gives_the_same_answers(tmp_path: Path) -> None:
    exported = write_export(tmp_path)
    answerer, samples = answerer_of(exported), samples_of(tmp_path / "media", [("image",), ("audio", "video")])
    limits = {"image": 1, "audio": 1, "video": 1}
    with engine(exported, tensor_parallel_size=2, distributed_executor_backend=None, limit_mm_per_prompt=limits) as llm:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
        for budget in BUDGETS:
            prompts = [engine_prompt(answerer.processor, sample, budget) for sample in samples]
            ids = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
            assert ids == expected_ids(answerer, samples, budget)
