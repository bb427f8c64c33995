"""Puts a server together and runs it.

Knows all parts of the server. Does not know the command line.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from mllm.budget import Budget
from mllm.config.long_audio import LongAudio
from mllm.evaluation.request_costs import ModelCosts
from mllm.media import MediaLimits
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor
from mllm.router.choice import BudgetChooser
from mllm.router.router import Router
from mllm.serving.app import Served, build_app
from mllm.serving.budget_table import Measurement, budget_table
from mllm.serving.budgets import BudgetPolicy
from mllm.serving.chat_request import ChatReader
from mllm.serving.decoders import DecoderPool, PooledLoader
from mllm.serving.engine import Engine
from mllm.serving.fetching import Fetcher
from mllm.serving.guard import Guard, timed_protocol
from mllm.serving.limits import Batching, RequestLimits
from mllm.serving.media_cache import MediaCache
from mllm.serving.metrics import Metrics
from mllm.serving.preparation import Preparer
from mllm.serving.scheduler import Scheduler
from mllm.serving.service import AnswerQueue, Service
from mllm.serving.sources import SourceRules
from mllm.serving.transcription_request import TranscriptionReader
from mllm.utils.collector import leave_out_of_collections

MAX_CONNECTIONS = 2_048
SHUTDOWN_SECONDS = 10
SWITCH_SECONDS = 0.0005
"""How long a thread may hold the interpreter while others wait: the front needs it after every call of the system, and
with Python's own 5 ms it would stand behind every thread that prepares a request, each time."""


@dataclass(frozen=True)
class ServerSettings:
    """Says how a model is served.

    Args:
        name: what clients call the model.
        key: that clients must send; None asks for none.
        budget, max_budget: see `BudgetPolicy`.
        url_hosts: hosts that media may be fetched from; none by default.
        media_root: folder whose files may be named; none by default.
        num_decoders, decoder_bytes: processes that decode, and the address space of each.
        cache_bytes: of media that are kept.
        languages: that the model transcribes, the usual one first.
    """

    name: str
    key: str | None = None
    budget: Budget = field(default_factory=Budget)
    max_budget: Budget = field(default_factory=Budget)
    limits: RequestLimits = field(default_factory=RequestLimits)
    media_limits: MediaLimits = field(default_factory=MediaLimits)
    batching: Batching = field(default_factory=Batching)
    measurement: Measurement = field(default_factory=Measurement)
    long_audio: LongAudio = field(default_factory=LongAudio)
    url_hosts: Sequence[str] = ()
    media_root: str | None = None
    num_decoders: int = 2
    decoder_bytes: int = 3 * 2**30
    cache_bytes: int = 256 * 2**20
    languages: Sequence[str] = ("en",)
    router: Router | None = None
    model_folder: Path | None = None


class Server:
    """Serves a model on HTTP.

    Args:
        scheduler: writes the answers; one that runs this model when left out. Where there is another, the model is only
            asked what budgets cost, and may be without weights.

    Raises:
        ValueError: settings that do not go with the model.
    """

    def __init__(
        self,
        model: ElasticForConditionalGeneration,
        processor: ElasticProcessor,
        settings: ServerSettings,
        scheduler: AnswerQueue | None = None,
    ) -> None:
        self.settings = settings
        self.on_close: list[Callable[[], object]] = []
        has_router = settings.router is not None
        policy = BudgetPolicy(processor.space, settings.budget, settings.max_budget, has_router)
        if settings.media_root is not None and not os.path.isdir(settings.media_root):
            raise ValueError(f"media_root {settings.media_root} is no folder")
        fetcher = Fetcher(settings.url_hosts) if settings.url_hosts else None
        sources = SourceRules(fetcher, settings.media_root, settings.media_limits)
        table = budget_table(model, processor, policy, settings.measurement)
        self.metrics = Metrics()
        cache = MediaCache(settings.cache_bytes)
        self.pool = DecoderPool(settings.num_decoders, settings.decoder_bytes)
        loader = PooledLoader(gray=True, limits=settings.media_limits, pool=self.pool)
        preparer = Preparer(
            processor,
            loader,
            policy,
            cache,
            long_audio=settings.long_audio,
            max_prompt_tokens=settings.limits.max_prompt_tokens,
            # Chosen once, before a request is queued: an answer that streams cannot be discarded.
            chooser=BudgetChooser(
                model,
                processor,
                settings.router,
                ModelCosts(model, processor, settings.model_folder),
                max_growths=0,
                is_allowed=policy.is_within,
            ),
        )
        self.scheduler: AnswerQueue = scheduler or self._scheduler(model, processor)
        # Beside those that wait for a decoder there is a thread for requests that need none.
        self.service = Service(preparer, self.scheduler, self.metrics, num_threads=2 * settings.num_decoders + 1)
        self._watch(cache)
        self.served = self._served(processor, policy, sources, table)
        app = build_app(self.service, self.served, self._lifespan)
        self.app = Guard(app, settings.limits, self.metrics, key=settings.key)

    def _scheduler(self, model: ElasticForConditionalGeneration, processor: ElasticProcessor) -> Scheduler:
        engine = Engine(model, processor, on_encoded=lambda item: self.metrics.encoded.labels(item.loaded.medium).inc())
        return Scheduler(
            engine,
            self.settings.batching,
            num_in_preparation=lambda: self.service.num_in_preparation,
            on_batch=self._note_batch,
        )

    def _served(
        self, processor: ElasticProcessor, policy: BudgetPolicy, sources: SourceRules, table: list[dict[str, Any]]
    ) -> Served:
        settings = self.settings
        streams = [medium for medium in ("audio", "video") if medium in processor.placeholder_ids]
        transcription = TranscriptionReader(
            settings.name,
            settings.limits,
            sources,
            policy,
            media=[medium for medium in streams if medium not in processor.sampling],
            prompts=processor.prompts,
            languages=settings.languages,
        )
        budgets = {"default_budget": str(settings.budget) or None, "max_budget": str(settings.max_budget) or None}
        chat = ChatReader(settings.name, settings.limits, sources, policy)
        return Served(settings.name, chat, transcription, table, budgets)

    def _watch(self, cache: MediaCache) -> None:
        self.metrics.watch(
            {
                "mllm_waiting_answers": ("Answers that the model has not begun.", lambda: self.scheduler.num_waiting),
                "mllm_running_answers": ("Answers that are being written.", lambda: self.scheduler.num_running),
                "mllm_preparing_requests": ("Requests being prepared.", lambda: self.service.num_in_preparation),
                "mllm_open_requests": ("Requests that are not answered yet.", lambda: self.app.num_requests),
                "mllm_media_cache_bytes": ("Memory of media that are kept.", lambda: cache.num_bytes),
                "mllm_media_cache_hits": ("Media that were known.", lambda: cache.num_hits),
                "mllm_media_cache_misses": ("Media that were not known.", lambda: cache.num_misses),
                "mllm_decoders_replaced": ("Decoders that were replaced.", lambda: self.pool.num_replaced),
            }
        )

    def _note_batch(self, num_rows: int, seconds: float) -> None:
        self.metrics.batch_rows.observe(num_rows)
        self.metrics.batch_seconds.inc(seconds)

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        self.scheduler.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def close(self) -> None:
        """End threads and processes, and do what else `on_close` holds."""
        self.service.close()
        self.pool.close()
        while self.on_close:
            self.on_close.pop()()

    def run(self, host: str, port: int, *, on_ready: Callable[[str], None]) -> None:
        """Serve until the process is told to end.

        Args:
            port: 0 takes one that is free.
            on_ready: called with the server's address once it takes connections.

        Raises:
            OSError: the address is taken, or is none of this machine.
        """
        limits = self.settings.limits
        config = uvicorn.Config(
            self.app,
            http=timed_protocol(limits.read_seconds),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=limits.max_header_bytes,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        leave_out_of_collections()
        with _listening(host, port) as listener:
            name = f"[{host}]" if ":" in host else host
            on_ready(f"http://{name}:{listener.getsockname()[1]}")
            uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Open a socket that takes connections from now on; those that come before the server runs wait."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return listener
