"""Sliders stop at the trained budgets and say what the server's table says of them."""

from typing import Any

from mllm.evaluation.bench import MOST_BUDGETS
from mllm.page.drawing import draw_overlay, plot_budgets
from mllm.page.overlay import cell_coverage
from mllm.page.stops import Stop, combinations, stops_of, written_flops


def row(medium: str, amount: str, tokens: int, **changes: Any) -> dict[str, Any]:
    values = {"flops": 2.5e9, "milliseconds": 12.34, "seconds_of_media": None}
    return {"budget": f"{medium}={amount}", "type": medium, "tokens": tokens, **values, **changes}


TABLE = [
    row("image", "64", 64),
    row("image", "1", 1, flops=None, milliseconds=None),
    row("audio", "/4", 50, flops=3e12, seconds_of_media=4.0),
]


def test_stops_are_those_of_the_medium_fewest_tokens_first() -> None:
    assert [stop.line for stop in stops_of(TABLE, "image")] == [
        "image=1: 1 soft token · FLOPs not known · time not measured",
        "image=64: 64 soft tokens · 2.5 GFLOP · 12.3 ms measured",
    ]
    assert [stop.line for stop in stops_of(TABLE, "audio")] == [
        "audio=/4: 50 soft tokens for 4 s · 3 TFLOP · 12.3 ms measured"
    ]
    assert stops_of(TABLE, "video") == ()


def test_flops_have_the_prefix_that_fits() -> None:
    assert [written_flops(own) for own in (999.0, 2e6, 1.234e11)] == ["0.999 kFLOP", "2 MFLOP", "123 GFLOP"]


def test_media_are_combined_and_of_too_many_budgets_both_ends_are_among_those_that_are_left() -> None:
    images = [Stop(f"image={n}", n) for n in (1, 4, 16, 64)]
    audio = [Stop(f"audio=/{n}", 48 // n) for n in (16, 8, 4)]
    few, number = combinations([images])
    assert (few, number) == ([(stop,) for stop in images], 4)
    some, number = combinations([images, audio])
    assert number == 12
    assert len(set(some)) == MOST_BUDGETS
    assert [stop.budget for stop in some[0]] == ["image=1", "audio=/16"]
    assert [stop.budget for stop in some[-1]] == ["image=64", "audio=/4"]
    sums = [sum(stop.tokens for stop in chosen) for chosen in some]
    assert sums == sorted(sums)


def test_borders_are_drawn_between_tokens_and_the_patches_of_one_are_coloured() -> None:
    import torch

    grey, owners = torch.full((3, 4, 4), 0.5), torch.tensor([[0, 0, 1, 1]] * 4)
    plain = draw_overlay(grey, owners, None)
    assert plain.size == (384, 384)
    assert plain.getpixel((60, 60)) == (128, 128, 128)
    assert plain.getpixel((192, 60)) == (255, 255, 255)
    coloured = draw_overlay(grey, owners, cell_coverage(2, (4, 4))[0])
    red, green, _ = coloured.getpixel((60, 60))  # type: ignore[misc]
    assert red > 150 > green
    assert max(coloured.getpixel((300, 60))) < 60  # type: ignore[arg-type]


def test_answers_that_are_equal_have_one_colour_and_formulas_are_not_drawn() -> None:
    figure = plot_budgets(["image=1", "image=4", "image=16"], [1, 4, 16], ["$x$", "a red circle", "a red circle"])
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [1, 4, 16]
    assert bars[1].get_facecolor() == bars[2].get_facecolor() != bars[0].get_facecolor()
    figure.canvas.draw()
