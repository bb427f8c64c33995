"""`mllm serve`: a model over HTTP, in the form of OpenAI's API, with a budget in every request."""

import ipaddress
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.budget import Budget
from mllm.config.long_audio import LongAudioOptions
from mllm.config.model import check_at_least
from mllm.config.model_options import ModelOptions
from mllm.serving.limits import Batching, RequestLimits
from mllm.utils.extras import install_line

if TYPE_CHECKING:
    from mllm.serving.server import ServerSettings

SUMMARY = "Serve a model over HTTP, in the form of OpenAI's API."
KEY_VARIABLE = "MLLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Settings(LongAudioOptions, ModelOptions):
    """Serve a model until the process is told to end."""

    name: str | None = None
    """What clients call the model; the name of its folder when left out."""
    host: str = "127.0.0.1"
    """The address that takes connections; one that other machines reach needs a key."""
    port: int = 8000
    """Its port; 0 takes one that is free."""
    api_key_file: str | None = None
    """File that holds the key that clients must send; the environment variable MLLM_API_KEY when left out, and no key
    where there is neither."""
    budget: str = ""
    """The budget of media that a request says nothing of; the most the model was trained on when left out."""
    max_budget: str = ""
    """The most that a request may ask for, e.g. "image=64,audio=/4" or "total<=256"."""
    requests: RequestLimits = field(default_factory=RequestLimits)
    """How many requests there may be, and how large they may be."""
    batching: Batching = field(default_factory=Batching)
    """How answers are written together."""
    url_hosts: list[str] = field(default_factory=list)
    """A host that media may be fetched from, as http and https addresses; may be given several times. Nothing is
    fetched when left out."""
    media_root: str | None = None
    """Folder whose files requests may name as file:///PATH; no file may be named when left out."""
    num_decoders: int = 2
    """Processes that decode media."""
    decoder_mib: int = 3 * 1024
    """Address space of each of them."""
    cache_mib: int = 256
    """Memory for media that were read before."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """A language that the model transcribes; may be given several times, the usual one first."""
    page: bool = False
    """Shows a page for browsers at /page as well; needs the extra `page`."""
    measure_budgets: bool = True
    """Measures at the start what every budget costs, for /v1/budgets."""
    threads: int | None = None
    """CPU threads of the model; as many as torch takes when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.parse(self.budget)
        Budget.parse(self.max_budget)
        check_at_least(self, ("num_decoders", "decoder_mib", "threads"))
        check_at_least(self, ("cache_mib", "port"), 0)
        if not self.languages:
            raise ValueError("languages is empty; name at least one")

    def read_key(self) -> str | None:
        """Read the key that clients must send.

        Raises:
            ValueError: it is empty, or there is none and other machines reach the server.
            OSError: the file cannot be read.
        """
        key = os.environ.get(KEY_VARIABLE)
        if self.api_key_file is not None:
            key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        if key is not None and not key:
            raise ValueError(f"the key is empty; write one into {self.api_key_file or KEY_VARIABLE}, or leave it out")
        if key is None and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reached by other machines and needs a key: give --api_key_file or set "
                f"{KEY_VARIABLE}"
            )
        return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(settings: Settings) -> int:
    """Load, measure, serve."""
    try:
        from mllm.serving.server import Server
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; mllm serve needs: {install_line('serve')}") from error
    import torch

    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, quiet_loading

    if settings.page and find_spec("gradio") is None:
        raise ImportError(f"gradio is not installed; the page needs: {install_line('page')}")
    own = server_settings(settings)
    quiet_loading()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, processor = load_for(settings)
    out = console(stderr=True)
    if settings.measure_budgets:
        out.print("measuring what each trained budget costs; --measure_budgets false leaves it out", soft_wrap=True)
    server = Server(model, processor, own)
    try:
        if settings.page:
            from mllm.page.mount import mount_page  # needs Gradio, which the API does not

            mount_page(server)

        def tell(address: str) -> None:
            page = f" and {address}/page" if settings.page else ""
            out.print(f"serving {own.name} at {address}/v1{page}", soft_wrap=True)

        server.run(settings.host, settings.port, on_ready=tell)
    finally:
        server.close()
    return 0


def server_settings(settings: Settings) -> "ServerSettings":
    """The settings of the command as those of the server.

    Raises:
        ValueError, OSError: as `Settings.read_key`; or limits that are none.
    """
    from mllm.serving.budget_table import Measurement
    from mllm.serving.server import ServerSettings

    return ServerSettings(
        name=settings.name or Path(settings.model).resolve().name,
        key=settings.read_key(),
        budget=Budget.parse(settings.budget),
        max_budget=Budget.parse(settings.max_budget),
        limits=settings.requests,
        media_limits=settings.limits,
        batching=settings.batching,
        measurement=Measurement(repeats=3 if settings.measure_budgets else 0),
        long_audio=settings.read_long_audio(),
        url_hosts=tuple(settings.url_hosts),
        media_root=settings.media_root,
        num_decoders=settings.num_decoders,
        decoder_bytes=settings.decoder_mib * 2**20,
        cache_bytes=settings.cache_mib * 2**20,
        languages=tuple(settings.languages),
    )
