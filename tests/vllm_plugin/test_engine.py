"""vLLM answers with the ids of `Answerer`, whatever the media, the budgets, and what its caches hold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import (
    MAX_NEW_TOKENS,
    TILED,
    answerer_of,
    engine,
    expected_ids,
    expected_of,
    needs_vllm,
    samples_of,
    write_export,
)

from mllm.data.manifest import Message, Sample, Text
from mllm.inference.answerer import Answerer
from mllm.vllm_plugin.prompts import engine_prompt

STREAMS = {"small": "image=1,audio=/8,video=/5", "medium": "image=16,audio=/8,video=/2", "large": ""}
CUT = {"small": "image=1,video=1,frames=1", "medium": "image=4,tiles<=2,video=4,frames=2", "large": ""}
STREAM_KINDS = (("image",), ("audio",), ("video",), ("audio", "video"), ("image", "audio", "video"), ("image", "image"))
CUT_KINDS = (("image",), ("video",), ("image", "video", "image"))
pytestmark = needs_vllm


@dataclass
class Served:
    """A model in vLLM, the same one here, and questions to both."""

    llm: Any
    answerer: Answerer
    samples: list[Sample]

    def prompts(self, samples: list[Sample], budget: str) -> list[dict[str, Any]]:
        """Prompts at a budget."""
        return [engine_prompt(self.answerer.processor, sample, budget) for sample in samples]

    def outputs(self, prompts: list[Any]) -> list[Any]:
        """What vLLM makes of prompts."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, logprobs=0)
        return self.llm.generate(prompts, params, use_tqdm=False)

    def ids(self, prompts: list[Any]) -> list[list[int]]:
        """The ids that vLLM answers with."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts)]


def serve(folder: Path, kinds: Any, limits: dict[str, int], **options: Any) -> Iterator[Served]:
    """An engine in this process, which starts in seconds."""
    exported = write_export(folder, **options)
    with engine(exported, max_num_seqs=64, limit_mm_per_prompt=limits) as llm:
        yield Served(llm, answerer_of(exported), samples_of(folder / "media", kinds))


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Images, audio and lips."""
    yield from serve(tmp_path_factory.mktemp("streams"), STREAM_KINDS, {"image": 2, "audio": 1, "video": 1})


def assert_equal_at(served: Served, budgets: dict[str, str]) -> None:
    """Compare at every budget, with empty caches and again with what all budgets have left there."""
    known = {name: expected_of(served.answerer, served.samples, budget) for name, budget in budgets.items()}
    for is_again in (False, True):
        for name, budget in budgets.items():
            outputs = served.outputs(served.prompts(served.samples, budget))
            for sample, output, answer in zip(served.samples, outputs, known[name], strict=True):
                assert list(output.outputs[0].token_ids) == answer.ids, (sample.id, name, is_again)
                assert logprobs_of(output) == pytest.approx(answer.logprobs, abs=1e-3), (sample.id, name, is_again)
    assert any(output.num_cached_tokens for output in outputs)
    mixed = [prompts for budget in budgets.values() for prompts in served.prompts(served.samples, budget)][::-1]
    assert served.ids(mixed) == [answer.ids for name in budgets for answer in known[name]][::-1]
    # Every sample and every budget is another prompt to the LLM, as the first token's probability tells.
    first = {round(answer.logprobs[0], 5) for name in budgets for answer in known[name]}
    assert len(first) > 0.8 * len(budgets) * len(served.samples)


def logprobs_of(output: Any) -> list[float]:
    """The logarithms of the probabilities of an output's tokens."""
    answer = output.outputs[0]
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def test_every_medium_at_three_budgets_cold_warm_and_mixed(streams: Served) -> None:
    assert_equal_at(streams, STREAMS)


def test_files_are_read_and_counted_by_the_engine_itself(streams: Served) -> None:
    """Bytes of files, one placeholder each, and the budget as an option: audio is cut to the length of its lips."""
    raw = []
    for sample in streams.samples:
        data: dict[str, list[bytes]] = {}
        for part in sample.media:
            data.setdefault(part.medium, []).append((sample.root / part.path).read_bytes())
        ids = streams.answerer.processor.chat(sample.messages, add_generation_prompt=True).ids
        raw.append((ids, data))
    for budget in STREAMS.values():
        words = [_only(budget, data) for _, data in raw]
        prompts = [
            {"prompt_token_ids": ids, "multi_modal_data": data, "mm_processor_kwargs": {"budget": word} if word else {}}
            for (ids, data), word in zip(raw, words, strict=True)
        ]
        assert streams.ids(prompts) == expected_ids(streams.answerer, streams.samples, budget)


def _only(budget: str, media: dict[str, Any]) -> str:
    return ",".join(word for word in budget.split(",") if word.partition("=")[0] in media)


def test_a_chat_is_read_as_our_own_encoder_reads_it_and_text_stays_text(streams: Served) -> None:
    from vllm import SamplingParams

    spelled = "<|image_token|></s><|audio_token|> what is it?"
    sample = next(sample for sample in streams.samples if sample.id == "3 image")
    question = replace(sample, messages=(Message("user", (*sample.media, Text(spelled))),))
    from toy_server import part, user

    image = (sample.root / sample.media[0].path).read_bytes()
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    (output,) = streams.llm.chat(
        user(part("image", image), spelled), params, use_tqdm=False, mm_processor_kwargs={"budget": "image=4"}
    )
    assert [list(output.outputs[0].token_ids)] == expected_ids(streams.answerer, [question], "image=4")
    (output,) = streams.llm.chat(user(spelled), params, use_tqdm=False)
    text = Sample("text", (Message("user", (Text(spelled),)),), task="")
    assert [list(output.outputs[0].token_ids)] == expected_ids(streams.answerer, [text], "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "total<=10"}, r"'total<=10': vLLM counts .* name each medium, e\.g\. 'image=1,audio=/8,video=/5'"),
        ({"budget": "image=65"}, r"image=65 cannot be met: allowed are counts 1\.\.64"),
        ({"budget": "audio=/4"}, "names audio, but the request holds none"),
        ({"max_soft_tokens": 65}, "image=65 cannot be met"),
        ({"tokens": 4}, "mm_processor_kwargs holds 'tokens'; allowed: budget, max_soft_tokens"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_and_the_engine_goes_on(
    streams: Served, options: dict[str, Any], message: str
) -> None:
    sample = next(sample for sample in streams.samples if sample.id == "0 image")
    ids = streams.answerer.processor.chat(sample.messages, add_generation_prompt=True).ids
    data = {"image": [(sample.root / sample.media[0].path).read_bytes()]}
    with pytest.raises(ValueError, match=message):
        streams.ids([{"prompt_token_ids": ids, "multi_modal_data": data, "mm_processor_kwargs": options}])
    good = [{"prompt_token_ids": ids, "multi_modal_data": data, "mm_processor_kwargs": {"max_soft_tokens": 4}}]
    assert streams.ids(good) == expected_ids(streams.answerer, [sample], "image=4")


def test_placeholders_that_no_medium_belongs_to_are_refused(streams: Served) -> None:
    sample = next(sample for sample in streams.samples if sample.id == "0 image")
    (prompt,) = streams.prompts([sample], "image=4")
    forged = [streams.answerer.processor.placeholder_ids["image"], *prompt["prompt_token_ids"]]
    with pytest.raises(ValueError, match=r"holds 2 times <\|image_token\|>, which stands for one image each, and 1"):
        streams.ids([{**prompt, "prompt_token_ids": forged}])
    with pytest.raises(ValueError, match="holds a placeholder of media, but no media"):
        streams.ids([{"prompt_token_ids": forged}])


def test_audio_and_video_that_are_no_clip_are_refused(streams: Served) -> None:
    first, last = streams.samples[0], streams.samples[-1]
    data = {
        "audio": [(first.root / "0.wav").read_bytes()],
        "video": [(first.root / last.media[0].path).with_suffix(".mp4").read_bytes()],
    }
    sample = next(sample for sample in streams.samples if sample.id == "0 audio+video")
    ids = streams.answerer.processor.chat(sample.messages, add_generation_prompt=True).ids
    with pytest.raises(ValueError, match=r"they may differ by 0\.08"):
        streams.ids([{"prompt_token_ids": ids, "multi_modal_data": data}])


def test_tiles_and_frames_and_marks_at_three_budgets_cold_warm_and_mixed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for served in serve(tmp_path_factory.mktemp("tiles"), CUT_KINDS, {"image": 3, "video": 1}, **TILED):
        assert_equal_at(served, CUT)
