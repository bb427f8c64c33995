"""An engine that runs the LLM alone, and is handed embeddings, answers as the whole model does."""

from pathlib import Path

import pytest
import torch
from engine_runs import (
    LLM_SIZES,
    MAX_NEW_TOKENS,
    answerer_of,
    engine,
    expected_ids,
    expected_of,
    needs_vllm,
    samples_of,
)
from toy_server import write_run
from transformers import AutoModelForCausalLM

from mllm.checkpoints.export import export
from mllm.vllm_plugin.prompt_embeds import prompt_embeds, unsaid

BUDGETS = ("image=1,audio=/8,video=/5", "image=16,audio=/8,video=/2", "")
KINDS = (("image",), ("audio",), ("video",), ("audio", "video"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and beside it its LLM alone."""
    made = write_run(tmp_path_factory.mktemp("alone"), text=LLM_SIZES)
    export(made, made.parent / "llm", form="llm")
    return made


def test_the_llm_alone_is_a_plain_checkpoint_that_reads_embeddings(run: Path, tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(run.parent / "llm")
    assert type(llm).__name__ == "LlamaForCausalLM"
    answerer = answerer_of(run)
    (sample,) = [one for one in samples_of(tmp_path, [("audio", "video")]) if one.id == "3 audio+video"]
    embeds = prompt_embeds(answerer.model, answerer.processor, sample, "audio=/8,video=/2")
    (expected,) = expected_of(answerer, [sample], "audio=/8,video=/2")
    with torch.no_grad():
        logits = llm(inputs_embeds=embeds[None]).logits[0, -1]
    assert logits.argmax() == expected.ids[0]
    unsaid_ids = list(unsaid(answerer.model))
    assert set(unsaid_ids) == set(answerer.processor.placeholder_ids.values())
    logits[unsaid_ids] = -torch.inf
    assert logits.log_softmax(-1).max().item() == pytest.approx(expected.logprobs[0], abs=1e-4)
    assert not (run.parent / "llm" / "processor_config.json").exists()


@needs_vllm
def test_vllm_answers_embeddings_at_three_budgets_with_warm_caches(run: Path, tmp_path: Path) -> None:
    answerer, samples = answerer_of(run), samples_of(tmp_path, KINDS)
    with engine(run.parent / "llm", enable_prompt_embeds=True) as llm:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, logit_bias=unsaid(answerer.model))
        for budget in (*BUDGETS, *BUDGETS):
            embeds = [prompt_embeds(answerer.model, answerer.processor, sample, budget) for sample in samples]
            outputs = llm.generate([{"prompt_embeds": each} for each in embeds], params, use_tqdm=False)
            ids = [list(output.outputs[0].token_ids) for output in outputs]
            assert ids == expected_ids(answerer, samples, budget)
