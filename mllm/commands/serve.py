"""`mllm serve`: a model over HTTP, in the form of OpenAI's API, with a budget in every request."""

import ipaddress
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mllm.budget import Budget
from mllm.config.long_audio import LongAudioOptions
from mllm.config.model import check_at_least
from mllm.config.model_options import ModelOptions
from mllm.serving.limits import Batching, RequestLimits
from mllm.utils.extras import install_line
from mllm.utils.signals import sigterm_as_exit

if TYPE_CHECKING:
    from rich.console import Console

    from mllm.router.router import Router
    from mllm.serving.server import Server, ServerSettings

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
    """The budget of media that a request says nothing of, or "auto"; the most the model was trained on when left
    out."""
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
    engine: Literal["mllm", "vllm"] = "mllm"
    """What writes the answers: this process, or vLLM, for load and for several devices; it serves exports."""
    data_parallel: int = 1
    """Engines of vLLM that share the requests, each with the whole model."""
    tensor_parallel: int = 1
    """Devices that share one LLM, for one that does not fit one of them; vLLM only."""
    threads: int | None = None
    """CPU threads of the model; as many as torch takes when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.parse(self.budget)
        Budget.parse(self.max_budget)
        check_at_least(self, ("num_decoders", "decoder_mib", "threads", "data_parallel", "tensor_parallel"))
        check_at_least(self, ("cache_mib", "port"), 0)
        if not self.languages:
            raise ValueError("languages is empty; name at least one")
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse what the engine does not read.

        Raises:
            ValueError: it is named.
        """
        if self.engine == "mllm":
            values = {"data_parallel": self.data_parallel != 1, "tensor_parallel": self.tensor_parallel != 1}
        else:
            values = {
                "checkpoint": self.checkpoint is not None,
                "sources": bool(self.sources),
                "merge_adapter": self.merge_adapter,
                "audio_padding": self.audio_padding != "trained",
                "use_cpu": self.use_cpu,
                "budget auto": Budget.parse(self.budget).auto is not None,
                "batching (all but batching.max_rows)": self.batching != Batching(max_rows=self.batching.max_rows),
            }
        if unread := [name for name, is_set in values.items() if is_set]:
            raise ValueError(f"{unread[0]} is set, which engine {self.engine} does not read")

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
    from mllm.commands.terminal import console, quiet_loading

    try:
        values = server_settings(settings)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; mllm serve needs: {install_line('serve')}") from error
    if settings.page and find_spec("gradio") is None:
        raise ImportError(f"gradio is not installed; the page needs: {install_line('page')}")
    quiet_loading()
    out = console(stderr=True)
    server = (_server_of_vllm if settings.engine == "vllm" else _server_of_model)(settings, values, out)
    try:
        if settings.page:
            from mllm.page.mount import mount_page  # needs Gradio, which the API does not

            mount_page(server)

        def tell(address: str) -> None:
            page = f" and {address}/page" if settings.page else ""
            out.print(f"serving {values.name} at {address}/v1{page}", soft_wrap=True)

        server.run(settings.host, settings.port, on_ready=tell)
    finally:
        server.close()
    return 0


def _server_of_model(settings: Settings, values: "ServerSettings", out: "Console") -> "Server":
    """Load the model and measure it."""
    import torch

    from mllm.checkpoints.load import load_for
    from mllm.serving.server import Server

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, processor = load_for(settings)
    if settings.measure_budgets:
        out.print("measuring what each trained budget costs; --measure_budgets false leaves it out", soft_wrap=True)
    return Server(model, processor, values)


def _server_of_vllm(settings: Settings, values: "ServerSettings", out: "Console") -> "Server":
    """Start vLLM's engine on an export.

    Raises:
        ImportError: vLLM is not installed.
        ValueError, FileNotFoundError: as `check_export`.
    """
    import torch

    from mllm.vllm_plugin.engine_options import EngineOptions, check_export, model_without_weights

    check_export(settings.model)
    try:
        from mllm.serving.vllm_scheduler import VllmScheduler
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; docs/serving.md says what engine vllm needs") from error
    from mllm.checkpoints.expert_folders import read_experts
    from mllm.inference.decoding import end_ids_of
    from mllm.serving.server import Server

    model, processor = model_without_weights(settings.model, limits=settings.limits)
    options = EngineOptions(
        model=settings.model,
        dtype=settings.dtype,
        data_parallel=settings.data_parallel,
        tensor_parallel=settings.tensor_parallel,
        max_prompts=settings.batching.max_rows,
        max_prompt_tokens=settings.requests.max_prompt_tokens,
        max_new_tokens=settings.requests.max_new_tokens,
        max_media=settings.requests.max_media,
        cache_gib=settings.cache_mib / 1024,
        threads=settings.threads,
        is_eager=not torch.cuda.is_available(),
        experts=read_experts(settings.model),
    )
    out.print("starting vLLM, which takes a minute or two", soft_wrap=True)
    with sigterm_as_exit():  # so that processes which are being started do not outlive this one
        scheduler = VllmScheduler(options, processor, end_ids_of(model, processor))
    return Server(model, processor, values, scheduler)


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
        # What budgets take is measured with a model in this process, which is not how vLLM would run it.
        measurement=Measurement(repeats=3 if settings.measure_budgets and settings.engine == "mllm" else 0),
        long_audio=settings.read_long_audio(),
        url_hosts=tuple(settings.url_hosts),
        media_root=settings.media_root,
        num_decoders=settings.num_decoders,
        decoder_bytes=settings.decoder_mib * 2**20,
        cache_bytes=settings.cache_mib * 2**20,
        languages=tuple(settings.languages),
        router=_router_of(settings),
        model_folder=settings.model_folder,
    )


def _router_of(settings: Settings) -> "Router | None":
    """Load the router of the model, if it has one that this engine can ask.

    Raises:
        FileNotFoundError: there is none, and the budget says auto.
        ValueError: it was fitted for another model.
    """
    from mllm.router.router import FILE, load_router

    is_auto = Budget.parse(settings.budget).auto is not None
    has_router = settings.engine == "mllm" and (settings.model_folder / FILE).is_file()
    return load_router(settings.model_folder) if is_auto or has_router else None
