"""A budget is exact or refused: grammar, counting rules, joint caps."""

from fractions import Fraction

import pytest
from blocks import medium, space

from mllm.budget import Amount, Budget, Extent, Space, TokenCount, count_tokens
from mllm.model.configuration import ElasticConfig

SPACE = space(
    image={"compressor": "pool", "budgets": [1, 4, 16, 64]},
    audio={"compressor": "pool", "budgets": ["/4", "/8", "/16"]},
    video={"compressor": "stack", "budgets": ["/2", "/5"]},
)
IMAGE = Extent("image", grid=(8, 8))
AUDIO = Extent("audio", num_frames=101, frames_per_second=50.0)
VIDEO = Extent("video", num_frames=53, frames_per_second=25.0)


def tokens(budget: str, *extents: Extent) -> list[int]:
    return [cost.tokens for cost in count_tokens(extents, Budget.parse(budget), SPACE)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "image=64",
        "audio=/4,video=/2",
        "audio=12.5/s",
        "image=max",
        "total<=256",
        "image=3,audio=0.05/s,total<=9",
        "auto,loss<=0.05",
        "audio=/4,video=none",
        "image=64:4:16,audio=/4",
    ],
)
def test_parse_and_format_are_inverse(text: str) -> None:
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


def test_order_and_spaces_do_not_matter() -> None:
    assert Budget.parse(" video = /2 , total <= 40, audio=/4") == Budget.parse("audio=/4,video=/2,total<=40")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture=4", "media: image, audio, video"),
        ("image", "must be medium=amount"),
        ("image=4,image=4", "names image twice"),
        ("image=0", "must be above 0"),
        ("image=-4", "is not a count"),
        ("image=1.5", "is not a count"),
        ("audio=/2.5", "is not a count"),
        ("audio=/", "is not a count"),
        ("audio=1e3/s", "is not a count"),
        ("image=²", "is not a count"),
        ("total<=0", "total<=N"),
        ("total=5", "total<=N"),
        ("total<=4,total<=5", "total<=N"),
        ("auto,loss<=5", "'loss<=5' must be written as loss<=N with N above 0 and at most 1"),
        ("auto,loss>=0.5", "must be written as loss<=N"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)


def test_a_medium_that_is_not_named_gets_the_largest() -> None:
    assert tokens("", IMAGE, AUDIO, VIDEO) == tokens("image=max,audio=max,video=max", IMAGE, AUDIO, VIDEO)
    assert tokens("", IMAGE, AUDIO, VIDEO) == [64, 101 // 4, 53 // 2]


def test_rates_drop_the_remainder_and_seconds_are_rates() -> None:
    assert count_tokens([AUDIO], Budget.parse("audio=/16"), SPACE) == [TokenCount(6, 16)]
    assert count_tokens([AUDIO], Budget.parse("audio=12.5/s"), SPACE) == [TokenCount(25, 4)]


def test_between_the_trained_ones_where_the_compressor_can() -> None:
    assert tokens("image=7", IMAGE) == [7]
    assert tokens("audio=/5", AUDIO) == [20]
    assert tokens("audio=33", AUDIO) == [33]
    assert not SPACE.is_trained(Budget.parse("image=7"))
    assert SPACE.is_trained(Budget.parse("image=16,audio=/4,video=max"))


@pytest.mark.parametrize(
    ("budget", "extent", "message"),
    [
        ("image=65", IMAGE, r"counts 1\.\.64"),
        ("image=/2", IMAGE, r"counts 1\.\.64"),
        ("image=5/s", IMAGE, "need a stream"),
        ("audio=/102", AUDIO, "101 frames is too short"),
        ("audio=102", AUDIO, "cannot give more tokens than frames"),
        ("audio=7/s", AUDIO, r"nearest: 6.25/s, 7\.14"),
        ("video=/3", VIDEO, r"serves only: /2, /5"),
        ("video=10", VIDEO, r"serves only: /2, /5"),
    ],
)
def test_what_cannot_be_met_names_what_can(budget: str, extent: Extent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(budget, extent)


def test_a_medium_the_model_does_not_take_is_refused() -> None:
    speech = Space({"audio": SPACE.media["audio"]})
    with pytest.raises(ValueError, match="does not take image; it takes audio"):
        count_tokens([AUDIO], Budget.parse("image=4"), speech)
    with pytest.raises(ValueError, match="does not take image"):
        count_tokens([IMAGE], Budget.parse(""), speech)


def test_queries_on_a_stream_come_per_window() -> None:
    windows = {"compressor": {"kind": "query", "window_frames": 16, "num_queries": 8}, "budgets": ["/4", "/16"]}
    streamed = space(audio=windows)
    extent = Extent("audio", num_frames=33, frames_per_second=50.0)  # two whole windows and one frame of a third
    assert count_tokens([extent], Budget.parse("audio=/4"), streamed) == [TokenCount(12, 4)]
    with pytest.raises(ValueError, match=r"allowed are /2, /4, /8, /16"):
        count_tokens([extent], Budget.parse("audio=/5"), streamed)
    with pytest.raises(ValueError, match="serves rates only"):
        count_tokens([extent], Budget.parse("audio=5"), streamed)


def test_a_cap_takes_the_largest_split_that_fits() -> None:
    # Image 64/16/4/1, audio 25/12/6, video 26/10: by hand the largest sum of at most 60 is 4 + 25 + 26 = 55, before
    # 16 + 12 + 26 = 54 and 16 + 25 + 10 = 51.
    assert tokens("total<=60", IMAGE, AUDIO, VIDEO) == [4, 25, 26]
    assert tokens("total<=54", IMAGE, AUDIO, VIDEO) == [16, 12, 26]
    assert tokens("image=64,total<=100", IMAGE, AUDIO, VIDEO) == [64, 25, 10]
    assert sum(tokens("total<=17", IMAGE, AUDIO, VIDEO)) <= 17


def test_a_cap_counts_every_item_and_keeps_items_of_a_medium_alike() -> None:
    assert tokens("total<=40", IMAGE, IMAGE) == [16, 16]
    short = Extent("audio", num_frames=9, frames_per_second=50.0)  # too short for /16, so /16 is no choice here
    assert tokens("total<=14", AUDIO, short) == [12, 1]


def test_a_cap_that_nothing_meets_says_what_the_smallest_is() -> None:
    with pytest.raises(ValueError, match="smallest split of this request takes 17 tokens"):
        tokens("total<=16", IMAGE, AUDIO, VIDEO)


def test_ties_favour_image_then_audio() -> None:
    even = space(image={"budgets": [2, 4]}, audio={"budgets": [2, 4]})  # 2 + 4 or 4 + 2
    extents = [Extent("audio", num_frames=9, frames_per_second=50.0), Extent("image", grid=(2, 2))]
    assert [c.tokens for c in count_tokens(extents, Budget.parse("total<=6"), even)] == [2, 4]


def test_space_settings_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"model\.image\.compressor\.kind is 'squeeze'; allowed: pool, query, stack, hybrid"
    ):
        medium("image", {"compressor": "squeeze", "budgets": [1]})
    with pytest.raises(ValueError, match=r"model\.audio\.budgets must be counts only or rates only"):
        medium("audio", {"budgets": ["/4", 5]})
    with pytest.raises(ValueError, match=r"media\.smell is not a medium"):
        ElasticConfig(media={"smell": {"budgets": [1]}})


def test_a_run_of_counts_is_written_as_a_range() -> None:
    even = space(image={"compressor": "query", "budgets": {"start": 2, "stop": 256, "step": 2}})
    assert len(even.media["image"].trained) == 128
    assert even.media["image"].max_tokens == 256
    assert even.largest() == Budget({"image": Amount("tokens", Fraction(256))})
    assert even.smallest() == Budget.parse("image=2")


def test_a_medium_is_left_out_where_training_did_so_and_another_one_stays() -> None:
    left_out = space(audio={"budgets": ["/4", "/8"]}, video={"budgets": ["/2", "none"]})
    budget = Budget.parse("audio=/4,video=none")
    assert count_tokens([AUDIO, VIDEO], budget, left_out) == [TokenCount(25, rate=4), TokenCount(0)]
    assert left_out.is_trained(budget)
    assert [str(amount) for amount in left_out.media["video"].trained] == ["/2"], "what has soft tokens"
    assert TokenCount(0).amount == Amount("none")
    assert left_out.smallest() == Budget.parse("audio=/8,video=/2")
    # A cap may leave lips out, but never the last medium of a request.
    assert [count.tokens for count in count_tokens([AUDIO, VIDEO], Budget.parse("total<=25"), left_out)] == [25, 0]
    with pytest.raises(ValueError, match="total<=11 cannot be met: the smallest split of this request takes 12"):
        count_tokens([AUDIO, VIDEO], Budget.parse("total<=11"), left_out)
    for extents, text in (([VIDEO], "video=none"), ([VIDEO, VIDEO], "video=none")):
        with pytest.raises(ValueError, match="video=none leaves nothing to answer about"):
            count_tokens(extents, Budget.parse(text), left_out)
    with pytest.raises(ValueError, match="video=none cannot be met: this model was not trained without video"):
        tokens("audio=/4,video=none", AUDIO, VIDEO)
    for blocks, message in (
        ({"image": {"budgets": [4, "none"]}}, "an image is never left out"),
        ({"audio": {"budgets": ["/4", "none"]}}, "this model takes no other medium"),
        ({"audio": {"budgets": ["none"]}}, "must be counts only or rates only, and not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            space(**blocks)


def test_items_of_one_medium_may_have_amounts_of_their_own() -> None:
    assert tokens("image=64:4,audio=/8", IMAGE, AUDIO, IMAGE) == [64, 12, 4]
    assert tokens("image=64:4,audio=/8", AUDIO) == [12]
    assert Budget.parse("image=4:4") == Budget.parse("image=4")
    assert SPACE.is_trained(Budget.parse("image=64:4"))
    assert not SPACE.is_trained(Budget.parse("image=64:5"))
    assert tokens("image=64:4,total<=90", IMAGE, IMAGE, AUDIO) == [64, 4, 12]
    for extents in ([IMAGE], [IMAGE] * 3):
        with pytest.raises(ValueError, match=f"image=64:4 is for 2 items, and the request holds {len(extents)}"):
            tokens("image=64:4", *extents)
    with pytest.raises(ValueError, match="is not a count"):
        Budget.parse("image=64:")
    with pytest.raises(ValueError, match="image=none cannot be met: this model was not trained without image"):
        SPACE.check(Budget.parse("image=64:none"))  # before there is a request
