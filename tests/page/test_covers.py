"""What a page asks a server: what tokens cover is computed of the very image, and its requests keep to the rules."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import Siglip2ImageProcessor

from mllm.media import MediaLoader
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.page.client import Client, PageMedium
from mllm.page.covers import Covered, Covers, pixels_of_patches
from mllm.page.overlay import cell_coverage, coverage
from mllm.processing.processor import ElasticProcessor
from mllm.serving.budget_table import Measurement
from mllm.serving.errors import RequestError
from mllm.serving.limits import RequestLimits
from mllm.serving.server import Server, ServerSettings
from mllm.transforms.encoder_inputs import PatchTransform

pytestmark = pytest.mark.slow
QUERIES = {"compressor": {"kind": "query", "keys": "content"}, "budgets": [1, 4, 16]}
KEY = "secret"


@asynccontextmanager
async def running(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, **limits: Any
) -> AsyncIterator[tuple[Server, Client, Covers]]:
    settings = ServerSettings("toy", key=KEY, limits=RequestLimits(**limits), measurement=Measurement(repeats=0))
    server = Server(model, processor, settings)
    client = Client(server.app, key=KEY, model="toy")
    async with server._lifespan(None):
        yield server, client, Covers(server.service, server.served.chat, model.model.compressors["image"])


def within(changes: dict[str, Any], work: Callable[[Server, Client, Covers], Awaitable[Any]], **limits: Any) -> Any:
    """Do something with the server of a tiny model that takes images."""
    settings = tiny.settings(["image"], image=changes)
    made = tiny.model(settings), tiny.processor(settings)

    async def do() -> Any:
        async with running(*made, **limits) as parts:
            return await work(*parts)

    return asyncio.run(do())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("images")
    return [(folder / tiny.write_media(folder, seed=seed)["image"]).read_bytes() for seed in range(2)]


def covered(client: Client, covers: Covers, image: bytes, count: int) -> Awaitable[Covered]:
    return covers.of(client.body("", [PageMedium("image", image, f"image={count}")]))


def test_pooled_tokens_cover_their_cells_of_the_image_as_the_encoder_sees_it(images: list[bytes]) -> None:
    found = within({}, lambda server, client, covers: covered(client, covers, images[0], 16))
    assert torch.equal(found.overlay.weights[0], cell_coverage(16, (8, 8)))
    raw = MediaLoader()("image", images[0])
    expected = torch.from_numpy(np.array(raw.resize((64, 64), 3))).permute(2, 0, 1) / 255
    torch.testing.assert_close(found.pixels, expected, atol=2 / 255, rtol=0)


def test_queries_by_content_look_at_the_features_of_the_very_image(images: list[bytes]) -> None:
    async def look(server: Server, client: Client, covers: Covers) -> list[tuple[torch.Tensor, torch.Tensor]]:
        model = server.scheduler.engine.model
        found = []
        for image in images:
            shown = (await covered(client, covers, image, 4)).overlay.weights[0]
            pixels = server.service.preparer.processor.transform("image", MediaLoader()("image", image)).values
            with torch.no_grad():
                features = model.model.encode("image", pixels[None]).values[0]
            found.append((shown, coverage(model.model.compressors["image"], 4, (8, 8), features=features)))
        return found

    found = within(QUERIES, look)
    for shown, expected in found:
        torch.testing.assert_close(shown, expected)
    assert not torch.allclose(found[0][0], found[1][0])


def test_tiles_are_shown_beside_their_thumbnail_with_the_tokens_that_the_prompt_has() -> None:
    content = io.BytesIO()
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(content, "PNG")
    image = content.getvalue()

    async def look(server: Server, client: Client, covers: Covers) -> tuple[Covered, int]:
        answered = await client.answer(client.body("what?", [PageMedium("image", image, "image=4")], max_tokens=1))
        return await covered(client, covers, image, 4), answered.tokens["image"]

    found, num_tokens = within({"tiling": {"kind": "free", "max_tiles": 2}}, look)
    assert found.pixels.shape == (3, 64, 3 * 64)
    assert found.overlay.owners().shape == (8, 3 * 8)
    assert found.overlay.num_tokens == num_tokens
    torch.testing.assert_close(found.pixels[0, 0, 64:], torch.from_numpy(ramp[0, :, 0]) / 255)  # as wide as two tiles


def test_images_in_their_own_shape_are_put_together_of_their_patches() -> None:
    raw = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8))
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=10)
    patches, _ = PatchTransform(processor)(raw)
    pixels = pixels_of_patches(patches.flatten(0, 1), (2, 5)) / 2 + 0.5  # its mean and deviation are a half
    torch.testing.assert_close(pixels, torch.from_numpy(np.array(raw)).permute(2, 0, 1) / 255)


def test_what_is_refused_is_refused_as_the_server_does_it(images: list[bytes]) -> None:
    async def ask(server: Server, client: Client, covers: Covers) -> list[str]:
        told = []
        for image, count in ((images[0], 100), (b"no image", 4)):
            body = client.body("what?", [PageMedium("image", image, f"image={count}")])
            for work in (client.answer(body), covers.of(body)):
                with pytest.raises(RequestError) as refused:
                    await work
                told.append(refused.value.message)
        return told

    budget, same_budget, file, same_file = within({}, ask)
    assert "image=100 cannot be met" in budget
    assert "not an image in one of the formats" in file
    assert (same_budget, same_file) == (budget, file)


def test_requests_of_a_page_need_the_key_and_count_against_the_limits(images: list[bytes]) -> None:
    async def ask(server: Server, client: Client, covers: Covers) -> list[Any]:
        stranger = Client(server.app, key="wrong", model="toy")
        with pytest.raises(RequestError, match="the key is missing or wrong") as refused:
            await stranger.answer(stranger.body("what?", []))
        assert refused.value.status == 401
        body = client.body("what?", [PageMedium("image", images[0], None)], max_tokens=4)
        return await asyncio.gather(*(client.answer(body) for _ in range(3)), return_exceptions=True)

    answers = within({}, ask, max_requests=2)
    refused = [answer for answer in answers if isinstance(answer, RequestError)]
    assert [error.status for error in refused] == [429]
    assert {answer.text for answer in answers if answer not in refused} == {next(iter(answers)).text}
    assert [answer.tokens for answer in answers if answer not in refused] == [{"image": 64}] * 2
