"""One tiny run and one server process for all tests of the server."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import tiny
from tiny_routers import image_router
from toy_server import MAX_REQUESTS, Running, server, write_run

from mllm.budget import Budget
from mllm.checkpoints.load import load
from mllm.checkpoints.model_files import fingerprint_of_model
from mllm.inference.answerer import Answerer, Decoding

NUM_FILES = 4
MAX_NEW_TOKENS = 24


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that takes images, audio and lips, with a router of requests about images."""
    made = write_run(tmp_path_factory.mktemp("served"))
    budgets = [Budget.parse(f"image={count}") for count in (1, 4, 16)]
    image_router(tiny.llm_config().hidden_size, budgets, fingerprint=fingerprint_of_model(made)).write(made)
    return made


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Some real media, by medium."""
    folder = tmp_path_factory.mktemp("media")
    return [
        {medium: (folder / name).read_bytes() for medium, name in tiny.write_media(folder, seed=seed).items()}
        for seed in range(NUM_FILES)
    ]


@pytest.fixture(scope="session")
def answerer(run: Path) -> Answerer:
    """Answers as the server should."""
    return Answerer(*load(run, device="cpu"), Decoding(max_new_tokens=MAX_NEW_TOKENS))


@pytest.fixture(scope="session")
def media_root(tmp_path_factory: pytest.TempPathFactory, files: list[dict[str, bytes]]) -> Path:
    """A folder with an image, and a link out of it."""
    root = tmp_path_factory.mktemp("allowed") / "root"
    root.mkdir()
    (root / "an image.png").write_bytes(files[0]["image"])
    (root / "link.png").symlink_to(root.parent / "secret.png")
    return root


@pytest.fixture(scope="session")
def served(run: Path, media_root: Path) -> Iterator[Running]:
    """`mllm serve` with short answers, as the answerer's, fewer requests at once, and a host and a folder of media."""
    words = ["--requests.max_new_tokens", str(MAX_NEW_TOKENS), "--batching.steps_before_joining", "5"]
    words += ["--requests.max_requests", str(MAX_REQUESTS)]
    words += ["--url_hosts", "allowed.example.org", "--media_root", str(media_root)]
    with server(run, *words) as running:
        yield running


@pytest.fixture(scope="session")
def client(served: Running) -> openai.OpenAI:
    """OpenAI's client, which asks once and not again."""
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video with audio."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rng = np.random.default_rng(5)
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 48, 48, "yuv420p"  # type: ignore[attr-defined]
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), format="rgb24")
            container.mux(video.encode(frame))  # type: ignore[attr-defined]
        samples = (8000 * np.sin(np.arange(11_000) / 9)).astype("<i2")[None]
        audio_frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        audio_frame.sample_rate = 16_000
        container.mux(audio.encode(audio_frame))  # type: ignore[attr-defined]
        container.mux(video.encode())  # type: ignore[attr-defined]
        container.mux(audio.encode())  # type: ignore[attr-defined]
    return path.read_bytes()
