"""Runs `mllm page`: `mllm serve` with a page for browsers."""

from dataclasses import dataclass

from mllm.commands import serve

SUMMARY = "Show a model on a page in the browser, with a slider for each budget."


@dataclass(frozen=True, kw_only=True)
class Settings(serve.Settings):
    """Serve a model with a page at /page until the process is told to end; the options are those of `mllm serve`."""

    page: bool = True
    """Shows the page; false leaves the API alone."""


run = serve.run
