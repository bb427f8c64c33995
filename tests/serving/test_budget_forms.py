"""Budgets in every form clients know resolve exactly, in one order of precedence, or are refused."""

from typing import Any

import blocks
import pytest
import tiny

from mllm.budget import Budget, Extent, Space
from mllm.serving.budgets import BudgetPolicy, Wishes, amounts_of, read_body_wishes, read_part_wishes
from mllm.serving.errors import RequestError
from mllm.serving.fields import Fields

SPACE = tiny.processor(tiny.settings()).space
IMAGE = Extent("image", grid=(8, 8))
AUDIO = Extent("audio", num_frames=40, frames_per_second=50.0)
LIPS = Extent("video", num_frames=20, frames_per_second=25.0)
EXTENTS = {"image": IMAGE, "audio": AUDIO, "video": LIPS}


def tokens(body: dict[str, Any], *media: tuple[str, dict[str, Any]], default: str = "", cap: str = "") -> list[int]:
    """Soft tokens of every medium of a request, each with what stands beside it."""
    policy = BudgetPolicy(SPACE, Budget.parse(default), Budget.parse(cap))
    fields = Fields(body)
    wishes = read_body_wishes(fields)
    fields.done()
    wishes_of_media = []
    for number, (medium, beside) in enumerate(media):
        part = Fields(beside, f"part[{number}]")
        wishes_of_media.append((medium, read_part_wishes(medium, [part])))
        part.done()
    resolved = policy.resolve(wishes_of_media, wishes)
    return [count.tokens for count in policy.counts([EXTENTS[medium] for medium, _ in media], resolved)]


@pytest.mark.parametrize(
    ("body", "beside", "expected"),
    [
        ({}, {}, 64),
        ({}, {"detail": "low"}, 1),
        ({}, {"detail": "high"}, 64),
        ({}, {"detail": "auto"}, 64),
        ({"media_resolution": "low"}, {}, 1),
        ({"media_resolution": "medium"}, {}, 4),
        ({"media_resolution": "high"}, {"detail": "low"}, 64),
        ({"media_resolution": "high"}, {"media_resolution": "low"}, 1),
        ({"mm_processor_kwargs": {"max_soft_tokens": 16}}, {}, 16),
        ({"mm_processor_kwargs": {"max_soft_tokens": 16}}, {"media_resolution": "low"}, 16),
        ({"mm_processor_kwargs": {"max_soft_tokens": 16}}, {"max_soft_tokens": 4}, 4),
        ({"mm_processor_kwargs": {"budget": "image=3"}}, {"max_soft_tokens": 4}, 3),
        ({"budget": "image=3"}, {"max_soft_tokens": 4, "detail": "low"}, 3),
        ({"budget": {"image": 3}}, {}, 3),
        ({"budget": "image=3"}, {"budget": "image=7"}, 7),
        ({"budget": "total<=20"}, {"detail": "high"}, 16),
        ({"budget": "image=max"}, {}, 64),
    ],
)
def test_the_first_that_speaks_of_an_image_decides(body: dict[str, Any], beside: dict[str, Any], expected: int) -> None:
    assert tokens(body, ("image", beside)) == [expected]


def test_every_medium_and_item_has_its_own() -> None:
    media = (
        ("image", {"detail": "low"}),
        ("image", {"budget": "image=16"}),
        ("audio", {}),
        ("video", {"budget": "video=/5"}),
    )
    assert tokens({"budget": "audio=/8"}, *media) == [1, 16, 5, 4]
    assert tokens({"media_resolution": "low"}, *media) == [1, 16, 5, 4]
    # `budget` names no image, so what stands beside it still counts.
    assert tokens({"budget": "audio=12.5/s"}, ("image", {"max_soft_tokens": 4}), ("audio", {})) == [4, 10]
    # Amounts one by one, and one of them said anew beside its image.
    assert tokens({"budget": "image=64:16:4,audio=/8"}, *[("image", {}), ("audio", {})], *[("image", {})] * 2) == [
        64,
        5,
        16,
        4,
    ]
    assert tokens({"budget": "image=64:16:4"}, *media[1:2], *[("image", {})] * 2) == [16, 16, 4]


def test_a_cap_on_the_sum_takes_the_largest_split() -> None:
    assert tokens({"budget": "total<=30"}, ("image", {}), ("audio", {})) == [16, 10]
    assert tokens({"budget": "total<=30,audio=/8"}, ("image", {}), ("audio", {})) == [16, 5]
    assert tokens({}, ("image", {}), ("audio", {}), cap="total<=30") == [16, 10]
    assert tokens({}, ("image", {}), ("audio", {}), default="total<=30") == [16, 10]
    assert tokens({"budget": "audio=/4"}, ("image", {}), ("audio", {}), default="total<=30") == [64, 10]


def test_the_default_and_the_cap_of_the_server() -> None:
    assert tokens({}, ("image", {}), default="image=4") == [4]
    assert tokens({}, ("image", {"detail": "auto"}), default="image=4") == [4]
    assert tokens({}, ("image", {}), ("audio", {}), cap="image=16,audio=/8") == [16, 5]
    assert tokens({"media_resolution": "high"}, ("image", {}), ("audio", {}), cap="image=16,audio=/8") == [16, 5]
    assert tokens({"budget": "image=9"}, ("image", {}), cap="image=16") == [9]
    assert tokens({"budget": "total<=40"}, ("image", {}), ("audio", {}), cap="total<=30") == [16, 10]
    assert tokens({"budget": "total<=100"}, ("image", {}), ("audio", {}), cap="image=16") == [16, 10]


def choosing(body: dict[str, Any], beside: dict[str, Any], *, space: Space = SPACE, **policy: Any) -> str | None:
    """What is chosen by, of a request about one image; None where its budget is settled."""
    wishes = [("image", read_part_wishes("image", [Fields(beside, "part[0]")]))]
    request = BudgetPolicy(space, **policy).resolve(wishes, read_body_wishes(Fields(body, "")))
    return None if request.choosing is None else str(request.choosing)


def test_open_budgets_are_left_for_the_files_to_settle() -> None:
    auto = Budget.parse("auto,quality>=0.9")
    assert choosing({"budget": "auto"}, {}) == choosing({"budget": "auto"}, {"detail": "low"}) == "auto"
    assert choosing({"budget": "flops<=1e9"}, {}) == "flops<=1000000000"
    assert choosing({"budget": "auto,total<=16"}, {}, cap=Budget.parse("total<=4")) == "auto,total<=4"
    assert choosing({}, {}, default=auto) == choosing({}, {"detail": "auto"}, default=auto) == str(auto)
    assert choosing({}, {"detail": "auto"}, has_router=True) == "auto"
    for body, beside in (({"budget": "image=4"}, {}), ({}, {"detail": "low"}), ({"media_resolution": "low"}, {})):
        assert choosing(body, beside, default=auto, has_router=True) is None
    assert choosing({}, {"detail": "auto"}) is None
    assert choosing({}, {"detail": "auto"}, default=Budget.parse("image=4"), has_router=True) is None


def test_an_open_budget_keeps_to_the_cap_on_tiles_and_frames() -> None:
    tiling = {"kind": "free", "max_tiles": 4, "merge": "flat"}
    tiled = blocks.space(image={"compressor": "query", "budgets": [2, 5, 16], "tiling": tiling})
    cap = Budget.parse("image=5,tiles<=2")
    for body, expected in (("auto", 2), ("auto,tiles<=4", 2), ("auto,tiles<=1", 1)):
        assert choosing({"budget": body}, {}, space=tiled, cap=cap) == f"auto,tiles<={expected}"
    encoder = {"kind": "frames", "count": 4, "trained_counts": [4, 2, 1]}
    framed = blocks.space(image={"budgets": [1, 4]}, video={"encoder": encoder, "budgets": [1, 4]})
    policy = BudgetPolicy(framed, cap=Budget.parse("video=4,frames=2"))
    budgets = ("video=4,frames=2", "video=1,frames=1", "video=4,frames=4", "video=4")
    assert [policy.is_within(Budget.parse(text)) for text in budgets] == [True, True, False, False]


@pytest.mark.parametrize(
    ("body", "beside", "cap", "message"),
    [
        ({"budget": "image=65"}, {}, "", r"image=65 cannot be met: allowed are counts 1\.\.64"),
        ({"budget": "image=0"}, {}, "", r"must be above 0"),
        ({"budget": "image=64:16"}, {}, "", r"image=64:16 is for 2 items, and the request holds 1"),
        ({}, {"budget": "image=64:16"}, "", r"image=64:16 is for 2 items, and the request holds 1"),
        ({"budget": "image=-3"}, {}, "", r"is not a count"),
        ({"budget": "image=4.5"}, {}, "", r"is not a count"),
        ({"budget": "image=1e3"}, {}, "", r"is not a count"),
        ({"budget": "64"}, {}, "", r"write the medium"),
        ({"budget": 64}, {}, "", r"budget is 64; write a text"),
        ({"budget": ["image=4"]}, {}, "", r"budget is \['image=4'\]; write a text"),
        ({"budget": {"image": True}}, {}, "", r"write a text"),
        ({"budget": {"picture": 4}}, {}, "", r"must be medium=amount"),
        ({"budget": "auto,image=4"}, {}, "", r"names image beside auto"),
        ({"budget": "quality>=0.9"}, {}, "", r"names a goal without auto"),
        ({"budget": "auto"}, {"budget": "image=4"}, "", r"is chosen for all media together; give it without part\[0\]"),
        ({}, {"budget": "auto"}, "", r"beside one medium write image=N and no total"),
        ({"budget": "image=4,image=4"}, {}, "", r"names image twice"),
        ({"budget": "image=/4"}, {}, "", r"image=/4 cannot be met"),
        ({"budget": "audio=/4"}, {}, "", r"names audio, but the request holds none"),
        ({"budget": "tiles<=2"}, {}, "", r"does not cut images into tiles"),
        ({"budget": "total<=0"}, {}, "", r"N at least 1"),
        ({"budget": "image=4", "mm_processor_kwargs": {"budget": "image=16"}}, {}, "", r"and budget is image=4"),
        ({"mm_processor_kwargs": {"max_soft_tokens": 65}}, {}, "", r"image=65 cannot be met"),
        ({"mm_processor_kwargs": {"max_soft_tokens": "4"}}, {}, "", r"must be a whole number, got '4'"),
        ({"mm_processor_kwargs": {"max_soft_tokens": True}}, {}, "", r"must be a whole number"),
        ({"mm_processor_kwargs": {"max_pixels": 4}}, {}, "", r"mm_processor_kwargs.max_pixels is not known here"),
        ({"media_resolution": "ultra"}, {}, "", r"is 'ultra'; allowed: low, medium, high"),
        ({}, {"detail": "medium"}, "", r"part\[0\].detail is 'medium'; allowed: low, high, auto"),
        ({}, {"budget": "audio=/4"}, "", r"beside one medium write image=N"),
        ({}, {"budget": "image=4,total<=9"}, "", r"beside one medium write image=N and no total"),
        ({"budget": "total<=9"}, {"budget": "image=4"}, "", r"give it without part\[0\].budget"),
        ({"budget": "image=17"}, {}, "image=16", r"17 soft tokens of image; .* at most image=16, so 16, 4, 1"),
        ({"budget": "image=max"}, {}, "image=16", r"asks for 64 soft tokens"),
        ({}, {"max_soft_tokens": 64}, "image=16", r"asks for 64 soft tokens"),
        ({"budget": "image=64"}, {}, "total<=30", r"takes 64 soft tokens; this server allows total<=30"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused_with_what_is_allowed(
    body: dict[str, Any], beside: dict[str, Any], cap: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tokens(body, ("image", beside), cap=cap)
    assert caught.value.status == 400


def test_images_of_a_request_without_images_are_not_spoken_of() -> None:
    with pytest.raises(RequestError, match="max_soft_tokens is of images, but the request holds none"):
        tokens({"mm_processor_kwargs": {"max_soft_tokens": 4}}, ("audio", {}))
    with pytest.raises(RequestError, match=r"part\[0\].detail is not known here"):
        tokens({}, ("audio", {"detail": "low"}))


@pytest.mark.parametrize(
    ("default", "cap", "message"),
    [
        ("tiles<=2", "", "budget: tiles<=2: this model does not cut"),
        ("", "image=/4", "max_budget image=/4 must be written as the trained budgets are"),
        ("", "audio=/16", "max_budget audio=/16 is below every trained budget"),
        ("image=64", "image=16", "budget image=64 is above max_budget image=16"),
        ("", "auto", "max_budget is 'auto'; write it in amounts"),
        ("image=64:16", "", "budget image=64:16 is for requests of so many items"),
        ("", "image=64:16", "max_budget image=64:16 is for requests of so many items"),
    ],
)
def test_settings_that_no_request_could_meet_are_refused(default: str, cap: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetPolicy(SPACE, Budget.parse(default), Budget.parse(cap))


def test_the_budget_that_was_served_is_told_where_it_is_one() -> None:
    policy = BudgetPolicy(SPACE)
    media = [("image", Wishes("a")), ("audio", Wishes("b"))]
    counts = policy.counts([IMAGE, AUDIO], policy.resolve(media, Wishes("", Budget.parse("audio=12.5/s"))))
    assert amounts_of(["image", "audio"], counts) == "image=64,audio=/4"
    other = policy.counts([IMAGE], policy.resolve([("image", Wishes("a", Budget.parse("image=4")))], Wishes()))
    assert amounts_of(["image", "image"], [counts[0], other[0]]) is None
