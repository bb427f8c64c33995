"""Lays out the page: its components, and which button calls what.

Knows Gradio. Does not know the server or the model.
"""

import html
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mllm.page.callbacks import Callbacks, Fields
from mllm.page.stops import Stop
from mllm.serving.errors import RequestError

CSS = """
.slider-line {font-variant-numeric: tabular-nums}
.medium {gap: 0.3em; margin-bottom: 1em}
.stops {display: flex; justify-content: space-between; font-size: 0.8em; opacity: 0.75}
.at-stops .tab-like-container, .at-stops .min_value, .at-stops .max_value {display: none}
#audio .wrap {min-height: 4em}
.overlay img {max-width: 100%; image-rendering: pixelated}
.budgets td {overflow-wrap: anywhere}
.budgets td:nth-child(-n+4) {white-space: nowrap}
.budgets td:nth-child(n+2):nth-child(-n+4) {text-align: right; font-variant-numeric: tabular-nums}
"""
_FONTS = ["system-ui", "sans-serif"]
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])
"""With fonts that every machine has, so that none is fetched."""


OVERLAYS_AT_ONCE = 2
FORGET = '() => ["", "", "", {"__type__": "update", "visible": false}]'
"""Takes away what was answered about another file."""
FORGET_OVERLAY = '() => ["", {"__type__": "update", "visible": false}]'


@dataclass(frozen=True)
class Inputs:
    """The components that a request is read from: per medium a file and a slider."""

    question: gr.Textbox
    files: dict[str, gr.Image | gr.Audio | gr.Video]
    positions: dict[str, gr.Slider | gr.State]
    with_audio: gr.Checkbox | gr.State

    @property
    def components(self) -> list[Any]:
        """All of them in the order that `fields` takes their values in."""
        return [self.question, self.with_audio, *self.files.values(), *self.positions.values()]

    def fields(self, values: Sequence[Any]) -> Fields:
        """Read the values of all components."""
        question, with_audio, *others = values
        files = dict(zip(self.files, others, strict=False))
        positions = dict(zip(self.positions, others[len(files) :], strict=True))
        return Fields(question, files, positions, with_audio is True)


def build_page(callbacks: Callbacks, *, name: str, defaults: dict[str, int]) -> gr.Blocks:
    """Lay out the page of a model.

    Args:
        name: of the model.
        defaults: where each medium's slider stands at first.
    """
    with gr.Blocks(title=f"{name} · mllm", analytics_enabled=False) as page:
        gr.Markdown(f"# {name}\nWhat each image, sound or video may cost is yours to choose.")
        with gr.Row():
            with gr.Column():
                files, positions, with_audio = _media(callbacks, defaults)
            with gr.Column():
                inputs = Inputs(_question(callbacks), files, positions, with_audio)
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask")
                    ask_all = gr.Button("All budgets side by side", elem_id="ask-all", visible=bool(callbacks.stops))
                problem = gr.Textbox(label="this did not work", visible=False, lines=2, elem_id="problem")
                answer = gr.Textbox(label="answer", lines=3, elem_id="answer", interactive=False)
                used = gr.HTML(elem_id="used")
                table = gr.HTML(elem_id="table")
                figure = gr.Plot(visible=False, show_label=False, elem_id="plot")
                if callbacks.covers is not None:
                    _add_overlay(callbacks, inputs, problem)

        async def answered(*values: Any) -> list[Any]:
            result = await callbacks.answer(inputs.fields(values))
            return [result.text, html.escape(result.line)]

        async def compared(*values: Any) -> list[Any]:
            result = await callbacks.side_by_side(inputs.fields(values))
            return [result.table, gr.update(value=result.figure, visible=True)]

        for trigger in (ask.click, inputs.question.submit):
            _connect(trigger, answered, inputs.components, [answer, used], problem, ["", ""], callbacks.most_at_once)
        empty = ["", gr.update(visible=False)]
        _connect(ask_all.click, compared, inputs.components, [table, figure], problem, empty, callbacks.most_at_once)
        for file in files.values():
            file.change(None, None, [answer, used, table, figure], js=FORGET, api_visibility="private")
    return page


def _connect(
    trigger: Callable[..., Any],
    function: Callable[..., Awaitable[list[Any]]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    problem: gr.Textbox,
    empty: list[Any],
    most_at_once: int,
) -> None:
    """Let something on the page call a function, and show what is wrong in its own words.

    Args:
        empty: what the outputs show where there is nothing to show.
        most_at_once: calls by all who look at the page; others wait.
    """

    async def shown(*values: Any) -> list[Any]:
        try:
            return [*await function(*values), gr.update(value="", visible=False)]
        except RequestError as error:
            return [*empty, gr.update(value=error.message, visible=True)]

    # Gradio's own reading of files would decode them in this process, and write images anew.
    trigger(
        shown,
        list(inputs),
        [*outputs, problem],
        preprocess=False,
        api_visibility="private",
        concurrency_limit=most_at_once,
        show_progress="minimal",
    )


def _media(callbacks: Callbacks, defaults: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Make what takes a file of each medium, the sliders, and the box to tick for the audio of a video."""
    makers: dict[str, Callable[[], Any]] = {
        "image": lambda: gr.Image(
            label="image",
            sources=["upload", "webcam", "clipboard"],
            type="filepath",
            height=240,
            buttons=[],
            elem_id="image",
        ),
        "audio": lambda: gr.Audio(
            label="sound", sources=["upload", "microphone"], type="filepath", buttons=[], elem_id="audio"
        ),
        "video": lambda: gr.Video(label="video", sources=["upload", "webcam"], buttons=[], elem_id="video"),
    }
    files, positions = {}, {}
    with_audio: Any = gr.State(False)
    for medium, stops in callbacks.stops.items():
        with gr.Column(elem_classes="medium"):
            files[medium] = makers[medium]()
            if medium == "video" and "audio" in callbacks.stops:
                with_audio = gr.Checkbox(label="read the sound of the video too", elem_id="with-audio")
            positions[medium] = _slider(medium, stops, defaults[medium])
    return files, positions, with_audio


def _question(callbacks: Callbacks) -> gr.Textbox:
    usual = [prompt for media, prompt in callbacks.prompts.items() if set(media) <= set(callbacks.stops)]
    hint = f"left empty: {' or '.join(dict.fromkeys(usual))}" if usual else ""
    return gr.Textbox(label="question", placeholder=hint, elem_id="question")


def _slider(medium: str, stops: Sequence[Stop], position: int) -> gr.Slider | gr.State:
    """Make a slider that stops at the trained budgets, and a line about where it stands, which the browser fills in."""
    slider = None
    if len(stops) > 1:
        slider = gr.Slider(
            0,
            len(stops) - 1,
            value=position,
            step=1,
            label=f"budget of {medium}",
            buttons=[],
            elem_id=f"{medium}-budget",
            elem_classes="at-stops",
        )
        names = "".join(f"<span>{html.escape(stop.budget.partition('=')[2])}</span>" for stop in stops)
        gr.HTML(f'<div class="stops">{names}</div>', padding=False)
    lines = [html.escape(stop.line) for stop in stops]
    line = gr.HTML(lines[position], elem_id=f"{medium}-line", elem_classes="slider-line")
    if slider is None:
        return gr.State(position)
    slider.change(None, slider, line, js=f"(position) => {json.dumps(lines)}[position]", api_visibility="private")
    return slider


def _add_overlay(callbacks: Callbacks, inputs: Inputs, problem: gr.Textbox) -> None:
    with gr.Accordion("What each soft token covers", open=True):
        show = gr.Button("Show what each soft token of the image covers", size="sm", elem_id="show")
        figure = gr.HTML(elem_id="overlay")
        token = gr.Slider(
            0, 1, value=0, step=1, label="soft token (0 shows all)", visible=False, elem_id="token", buttons=[]
        )

    async def shown(*values: Any) -> list[Any]:
        overlay = await callbacks.overlay(inputs.fields(values), 0)
        return [overlay.html, gr.update(maximum=overlay.num_tokens, value=0, visible=True)]

    async def of_token(*values: Any) -> list[Any]:
        *of_fields, position = values
        return [(await callbacks.overlay(inputs.fields(of_fields), position)).html]

    empty = ["", gr.update(visible=False)]
    _connect(show.click, shown, inputs.components, [figure, token], problem, empty, OVERLAYS_AT_ONCE)
    # The slider is left where it is, which may be further on when the figure comes.
    _connect(token.change, of_token, [*inputs.components, token], [figure], problem, [""], OVERLAYS_AT_ONCE)
    # What is shown is of another image or budget as soon as those change.
    changes = [inputs.files["image"].change]
    if isinstance(inputs.positions["image"], gr.Slider):
        changes.append(inputs.positions["image"].change)
    for change in changes:
        change(None, None, [figure, token], js=FORGET_OVERLAY, api_visibility="private")
