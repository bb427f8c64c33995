"""What a step trains is a function of (seed, step) alone, and the modes do what they say."""

import pytest
from blocks import space

from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler, Mode

SPACE = space(
    image={"budgets": [1, 4, 16]},
    audio={"budgets": ["/4", "/16"]},
    video={"compressor": "stack", "budgets": ["/2", "/5"]},
)


def budgets(sampler: BudgetSampler, step: int, *media: str) -> list[str]:
    return [str(sampled.budget) for sampled in sampler(step, media or None)]


def test_all_trains_every_combination_of_what_is_present() -> None:
    sampler = BudgetSampler(SPACE, "all")
    assert budgets(sampler, 3, "audio", "video") == [
        "audio=/4,video=/2",
        "audio=/4,video=/5",
        "audio=/16,video=/2",
        "audio=/16,video=/5",
    ]
    assert budgets(sampler, 0, "image") == ["image=16", "image=4", "image=1"]
    assert len(sampler(0)) == 3 * 2 * 2


def test_random_is_the_same_whatever_else_is_in_the_batch() -> None:
    sampler = BudgetSampler(SPACE, "random", seed=7)
    for step in range(20):
        whole = sampler(step)[0].budget.amounts
        assert sampler(step, ["video"])[0].budget.amounts == {"video": whole["video"]}
        assert BudgetSampler(SPACE, "random", seed=7)(step) == sampler(step)


def test_random_covers_the_space_evenly_and_depends_on_the_seed() -> None:
    sampler = BudgetSampler(SPACE, "random", seed=1)
    seen = [budgets(sampler, step, "image")[0] for step in range(3000)]
    counts = [seen.count(f"image={n}") for n in (1, 4, 16)]
    assert sum(counts) == 3000
    assert all(900 < count < 1100 for count in counts)
    assert seen[:50] != [budgets(BudgetSampler(SPACE, "random", seed=2), step, "image")[0] for step in range(50)]


def test_sandwich_is_the_largest_as_teacher_random_ones_and_the_smallest() -> None:
    sampled = BudgetSampler(SPACE, "sandwich", num_budgets=4)(5)
    assert sampled[0].budget == SPACE.largest()
    assert sampled[0].is_teacher
    assert sampled[-1].budget == SPACE.smallest()
    assert sum(one.is_teacher for one in sampled) == 1
    assert sum(one.weight for one in sampled) == 4


def test_equal_budgets_become_one_that_weighs_their_sum() -> None:
    sampler = BudgetSampler(SPACE, "sandwich", num_budgets=6)
    for step in range(10):
        sampled = sampler(step, ["video"])  # only two budgets there
        assert [str(one.budget) for one in sampled] == ["video=/2", "video=/5"]
        assert sum(one.weight for one in sampled) == 6
        assert sampled[0].is_teacher


def test_points_are_trained_as_listed_or_sampled_without_repeats() -> None:
    points = [Budget.parse(text) for text in ("image=16,audio=/4", "image=4,audio=/4", "image=1,audio=/16")]
    assert [sampled.budget for sampled in BudgetSampler(SPACE, "points", points=points)(0)] == points
    some = BudgetSampler(SPACE, "points", num_budgets=2, points=points)
    seen = {tuple(budgets(some, step)) for step in range(60)}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "some"}, "allowed: all, random, sandwich, points"),
        ({"mode": "points"}, "points go with mode points"),
        ({"mode": "all", "num_budgets": 2}, "contradicts mode all"),
        ({"mode": "sandwich", "num_budgets": 1}, "needs at least 2"),
        ({"mode": "random", "points": [Budget.parse("image=1")]}, "points go with mode points"),
    ],
)
def test_contradictions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetSampler(SPACE, **arguments)


@pytest.mark.parametrize("mode", ["all", "random"])
def test_a_row_keeps_one_of_its_media(mode: Mode) -> None:
    speech = space(audio={"budgets": ["/4", "/16", "none"]}, video={"budgets": ["/2", "none"]})
    sampler = BudgetSampler(speech, mode)
    seen = {text for step in range(200) for text in budgets(sampler, step, "audio", "video")}
    assert seen == {
        *(f"audio={audio},video={video}" for audio in ("/4", "/16") for video in ("/2", "none")),
        "audio=none,video=/2",
        "audio=/16,video=/2",  # in place of neither
    }
    assert {text for step in range(50) for text in budgets(sampler, step, "video")} == {"video=/2"}
    assert {text for step in range(50) for text in budgets(sampler, step, "audio")} == {"audio=/4", "audio=/16"}


@pytest.mark.parametrize("mode", ["all", "random", "sandwich"])
def test_what_is_possible_is_what_some_step_samples(mode: Mode) -> None:
    speech = space(audio={"budgets": ["/4", "/16"]}, video={"budgets": ["/2", "/5"]})
    sampler = BudgetSampler(speech, mode)
    for media in (["audio"], ["video"], ["video", "audio"]):
        drawn = {sampled.budget for step in range(60) for sampled in sampler(step, media)}
        assert drawn == set(sampler.possible(media))
    points = BudgetSampler(
        speech, "points", points=(Budget.parse("audio=/4,video=/2"), Budget.parse("audio=/4,video=/5"))
    )
    assert [str(budget) for budget in points.possible(["audio"])] == ["audio=/4"]
