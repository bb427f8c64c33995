"""Puts a page into a server that has been put together.

Knows the server's parts and Gradio. Does not know the command line.
"""

import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mllm.inference.request import DEFAULT_PROMPTS
from mllm.page.callbacks import Callbacks
from mllm.page.client import Client
from mllm.page.covers import Covers
from mllm.page.gate import Gate
from mllm.page.stops import Stop, stops_of
from mllm.page.uploads import Uploads
from mllm.serving.budgets import BudgetPolicy
from mllm.serving.guard import PAGE_ROUTE
from mllm.serving.scheduler import Scheduler
from mllm.serving.server import Server

if TYPE_CHECKING:
    import gradio

UPLOADS_PER_FLIGHT = 4
"""Bytes of kept uploads, as a multiple of those of all requests that are under way."""


def mount_page(server: Server) -> None:
    """Add a page to a server that does not run yet, behind its key and its limits.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
    """
    limits = server.settings.limits
    folder = tempfile.TemporaryDirectory(prefix="mllm-page-")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder.name)
    import gradio

    from mllm.page.layout import CSS, THEME

    uploads = Uploads(folder.name, max_bytes=UPLOADS_PER_FLIGHT * limits.max_bytes_in_flight)
    page = _build(server, uploads)
    page.queue(max_size=limits.max_requests, api_open=False)
    gradio.mount_gradio_app(
        server.app.app,
        page,
        PAGE_ROUTE,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        max_file_size=limits.max_body_bytes,
        theme=THEME,
        css=CSS,
    )
    server.app.app = Gate(server.app.app, uploads, upload_bytes=limits.max_body_bytes)
    server.on_close.append(folder.cleanup)


def _build(server: Server, uploads: Uploads) -> "gradio.Blocks":
    from mllm.page.layout import build_page

    settings, limits = server.settings, server.settings.limits
    processor = server.service.preparer.processor
    stops = {medium: stops_of(server.served.budgets, medium) for medium in processor.space.media}
    covers = None
    # Under another engine the model has no weights here, and a host's own processor does not tell how it saw an image.
    if "image" in stops and isinstance(server.scheduler, Scheduler) and processor.host is None:
        compressors = server.scheduler.engine.model.model.compressors
        covers = Covers(server.service, server.served.chat, compressors["image"])
    callbacks = Callbacks(
        Client(server.app, key=settings.key, model=settings.name),
        uploads,
        stops,
        {**DEFAULT_PROMPTS, **processor.prompts},
        covers=covers,
        most_at_once=max(limits.max_requests // 2, 1),
        most_bytes_at_once=limits.max_bytes_in_flight // 2,
    )
    policy = server.service.preparer.policy
    defaults = {medium: _first_position(stops[medium], policy, medium) for medium in stops}
    return build_page(callbacks, name=settings.name, defaults=defaults)


def _first_position(stops: Sequence[Stop], policy: BudgetPolicy, medium: str) -> int:
    """Where a slider stands at first: at the server's budget if it is trained, else at the most tokens."""
    amount = policy.default.amounts.get(medium)
    names = [stop.budget for stop in stops]
    wanted = f"{medium}={amount}"
    return names.index(wanted) if wanted in names else len(names) - 1


__all__ = ["mount_page"]
