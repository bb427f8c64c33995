"""An answer ends where its rules say, and what is handed out while it is written is never taken back."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mllm.budget import Budget
from mllm.config.long_audio import LongAudio
from mllm.inference.answerer import Answerer
from mllm.router.choice import BudgetChooser
from mllm.serving.answering import AnswerRules, AnswerRun, repeats
from mllm.serving.budgets import BudgetPolicy, Wishes
from mllm.serving.decoders import DecoderPool, PooledLoader
from mllm.serving.engine import Engine
from mllm.serving.limits import Batching
from mllm.serving.media_cache import MediaCache, MediaItem, Window
from mllm.serving.preparation import Conversation, Preparer, PromptMedium
from mllm.serving.scheduler import Scheduler

Files = list[dict[str, bytes]]
END = 99
LETTERS = "abcdefghijklmnopqrstuvwxyz é"


def text_of(ids: Any) -> str:
    """Ids as letters; the two halves of é are no character yet."""
    letters = "".join("\ufffd" if token == 200 else "" if token == END else LETTERS[token] for token in ids)
    return letters.replace("\ufffdé", "é")


def written(ids: list[int], **rules: Any) -> AnswerRun:
    """Write an answer from these tokens until it ends."""
    pieces: list[str] = []
    run = AnswerRun(None, AnswerRules(rules.pop("max_new_tokens", 50), needs_text=True, **rules), on_text=pieces.append)  # type: ignore[arg-type]
    for token in ids:
        if run.ending is None:
            before = "".join(pieces)
            run.take(token, {END}, text_of)
            assert "".join(pieces).startswith(before)
            assert run.text.startswith("".join(pieces))
    assert "".join(pieces) == run.text or run.ending is None
    return run


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def test_answers_end_by_their_rules() -> None:
    run = written([*ids_of("hello you"), END, 3])
    assert (run.text, run.ending, run.ids[-1]) == ("hello you", "stop", END)
    assert (written(ids_of("hello you"), max_new_tokens=7).text, written(ids_of("abc"), max_new_tokens=3).ending) == (
        "hello y",
        "length",
    )
    stopped = written(ids_of("one two three"), stop=("thr", "wo t"))
    assert (stopped.text, stopped.ending, stopped.stop_text) == ("one t", "stop", "wo t")
    near = written([*ids_of("one tw"), END], stop=("two",))
    assert (near.text, near.ending, near.stop_text) == ("one tw", "stop", None)
    assert written([200, LETTERS.index("é"), END]).text == "é"


def test_a_loop_is_seen_and_told() -> None:
    loop = written(ids_of("ab" + "cde" * 20), repetition_tokens=12)
    assert (loop.ending, loop.text) == ("repetition", "ab" + "cde" * 4)
    assert written(ids_of("ab" + "cde" * 10), repetition_tokens=0).ending is None
    assert not repeats(list(range(100)), 64)
    assert repeats([1] * 64, 64)
    assert not repeats([*range(40), *range(40)], 80)  # a stretch of 40 is too long to be called a loop


def test_noise_draws_as_a_softmax_does() -> None:
    run = AnswerRun(None, AnswerRules(5, temperature=1.0, seed=3))  # type: ignore[arg-type]
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf")])
    drawn = torch.stack([(logits + run.noise(4)).argmax() for _ in range(4_000)]).bincount(minlength=4) / 4_000
    assert torch.allclose(drawn, logits.softmax(0), atol=0.03)
    assert drawn[3] == 0


class Bench:
    """The parts of a server without HTTP."""

    def __init__(self, answerer: Answerer, batching: Batching) -> None:
        processor = answerer.processor
        self.policy = BudgetPolicy(processor.space)
        self.pool = DecoderPool(1, 3 * 2**30)
        self.cache = MediaCache(64 * 2**20)
        loader = PooledLoader(gray=True, pool=self.pool)
        self.preparer = Preparer(
            processor,
            loader,
            self.policy,
            self.cache,
            long_audio=LongAudio(),
            max_prompt_tokens=400,
            chooser=BudgetChooser(answerer.model, processor),
        )
        self.encoded: list[MediaItem] = []
        self.sizes: list[int] = []
        engine = Engine(answerer.model, processor, on_encoded=self.encoded.append)
        self.scheduler = Scheduler(engine, batching, on_batch=lambda rows, seconds: self.sizes.append(rows))
        self.scheduler.start()

    def run(self, text: str, media: dict[str, bytes], budget: str, rules: AnswerRules) -> AnswerRun:
        """A prepared answer."""
        parts = [PromptMedium(medium, content, 0, medium) for medium, content in media.items()]
        budgets = self.policy.resolve(
            [(medium_part.medium, Wishes()) for medium_part in parts], Wishes("", Budget.parse(budget))
        )
        turns = (("user", (*parts, text)),)
        return AnswerRun(self.preparer.prepare(Conversation(turns, budgets), lambda: False).rows[0], rules)

    def finish(self, runs: list[AnswerRun], seconds: float = 180) -> None:
        """Wait for answers."""
        end = time.monotonic() + seconds
        while any(run.ending is None for run in runs):
            assert time.monotonic() < end
            time.sleep(0.01)

    def close(self) -> None:
        self.scheduler.close()
        self.pool.close()


@pytest.fixture
def make_bench(answerer: Answerer) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**batching: Any) -> Bench:
        made.append(Bench(answerer, Batching(**batching)))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def test_answers_join_and_leave_a_batch_and_are_what_they_are_alone(
    make_bench: Callable[..., Bench], answerer: Answerer, files: Files
) -> None:
    bench = make_bench(max_rows=4, steps_before_joining=2)
    rng = random.Random(1)
    runs, wanted = [], []
    for _ in range(16):
        media = {medium: rng.choice(files)[medium] for medium in ("image", "audio", "video") if rng.random() < 0.6}
        budget = "image=4" if "image" in media else ""
        text, length = f"what is {rng.choice('abc')}?", rng.choice([3, 9, 24])
        runs.append(bench.run(text, media, budget, AnswerRules(length)))
        wanted.append((answerer(text, **media, budget=budget), length))  # type: ignore[arg-type]
    for start in range(0, len(runs), 6):
        bench.scheduler.submit(runs[start : start + 6])
        time.sleep(0.02)
    bench.finish(runs)
    for run, (answer, length) in zip(runs, wanted, strict=True):
        assert len(run.ids) == min(answer.num_new_tokens, length)
        assert run.text == answer.text if length == 24 else answer.text.startswith(run.text)
    assert max(bench.sizes) > 1
    assert len(bench.sizes) > len(runs) / 4  # batches were interrupted for those that waited
    assert len(bench.encoded) == bench.cache.num_misses <= 12


def test_a_prompt_that_ends_with_a_soft_token_is_answered_as_alone_beside_one_that_ends_with_text(
    make_bench: Callable[..., Bench], answerer: Answerer, files: Files
) -> None:
    bench = make_bench()
    image = files[0]["image"]
    soft, text = (bench.run(words, {"image": image}, "image=4", AnswerRules(24)) for words in ("", "what is a?"))
    assert soft.prompt.row.ids[-1] == answerer.processor.placeholder_ids["image"]
    bench.scheduler.submit([soft, text])
    bench.finish([soft, text])
    inputs = answerer.processor(text="", images=[image], budget="image=4")
    ids = answerer.model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert soft.ids == ids.tolist()[: len(soft.ids)]
    assert len(soft.ids) > 1
    assert text.text == answerer("what is a?", image=image, budget="image=4").text


def test_one_answer_that_fails_fails_alone(make_bench: Callable[..., Bench], files: Files, caplog: Any) -> None:
    bench = make_bench()
    good = [bench.run("what?", {"image": files[0]["image"]}, "image=4", AnswerRules(4)) for _ in range(3)]
    bad = bench.run("what?", {"image": files[1]["image"]}, "image=4", AnswerRules(4))
    broken = bad.prompt.items[0].loaded
    object.__setattr__(broken, "values", broken.values[:, :7, :7])  # what its encoder cannot take
    with bench.scheduler._wake:
        bench.scheduler._waiting += [good[0], bad, *good[1:]]
        bench.scheduler._wake.notify()
    bench.finish([*good, bad])
    assert [run.ending for run in (*good, bad)] == ["length"] * 3 + ["failed"]
    assert len({run.text for run in good}) == 1
    assert "could not be written together" in caplog.text


def test_those_that_are_cancelled_leave_the_others_alone(
    make_bench: Callable[..., Bench], answerer: Answerer, files: Files
) -> None:
    bench = make_bench(max_rows=2)
    long = AnswerRules(60)
    runs = [bench.run("go on", {"image": files[0]["image"]}, "image=4", long) for _ in range(4)]
    bench.scheduler.submit(runs)
    while bench.scheduler.num_running < 2:
        time.sleep(0.005)
    for run in (runs[0], runs[3]):
        run.is_cancelled = True
    bench.finish(runs)
    assert [run.ending for run in runs][0::3] == ["cancelled", "cancelled"]
    assert runs[3].ids == []
    assert runs[1].ids == runs[2].ids
    assert len(runs[1].ids) > 24


def test_media_are_kept_by_use_and_within_their_room(make_bench: Callable[..., Bench], files: Files) -> None:
    bench = make_bench()
    made: list[int] = []
    item = bench.run("a", {"image": files[0]["image"]}, "image=4", AnswerRules(1)).prompt.items[0]
    cache = MediaCache(3 * item.num_bytes + 1)

    def get(key: str) -> bool:
        def make() -> tuple[Window, ...]:
            made.append(1)
            time.sleep(0.05)
            return (Window(0, 0, (item,)),)

        return cache.get(key, make)[1]

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(get, ["a"] * 4)) == [False, True, True, True]
    assert len(made) == 1
    assert [get(key) for key in ("b", "c", "a", "d", "b", "a")] == [False, False, True, False, False, True]
    assert cache.num_bytes <= cache.max_bytes

    def fail() -> tuple[Window, ...]:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.get("e", fail)
    assert cache.get("e", lambda: (Window(0, 0, (item,)),))[1] is False


def test_what_a_user_types_is_never_special_on_several_threads(
    make_bench: Callable[..., Bench], answerer: Answerer
) -> None:
    bench = make_bench()
    special = set(answerer.processor.tokenizer.all_special_ids) | set(answerer.processor.placeholder_ids.values())
    text = " ".join(answerer.processor.tokenizer.all_special_tokens) + "<|image_token|><|audio_token|>"
    clean = bench.run("a", {}, "", AnswerRules(1)).prompt.row.ids

    def ids(number: int) -> list[int]:
        return list(bench.run(f"{text} {number}", {}, "", AnswerRules(1)).prompt.row.ids)

    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(ids, range(200)))
    allowed = sum(token in special for token in clean)
    assert all(sum(token in special for token in row) == allowed for row in rows)
