"""The page of a real server in a real browser: its answers are those of `Answerer`, and it speaks to nobody else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import tiny
from browser import Page, chromium, skip_without_browser
from toy_server import Running, data_url, server, user, write_run

from mllm.checkpoints.load import load
from mllm.inference.answerer import Answerer, Decoding

skip_without_browser()
pytestmark = pytest.mark.slow
MAX_NEW_TOKENS = 16
QUESTION = "what is this?"
LEFT, RIGHT, HOME = "\ue012", "\ue014", "\ue011"
"""Keys as WebDriver writes them."""
WATCHER = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open({log!r}, "a") as file:
            file.write(f"{{event}} {{args[1:] if event == 'socket.connect' else args[:2]}}\\n")
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    """Some real files, by medium."""
    folder = tmp_path_factory.mktemp("media")
    return [{m: folder / name for m, name in tiny.write_media(folder, seed=seed).items()} for seed in range(3)]


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return Answerer(*load(run, device="cpu"), Decoding(max_new_tokens=MAX_NEW_TOKENS))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server looked up and connected to, a line each."""
    folder = tmp_path_factory.mktemp("watcher")
    log = folder / "asked.txt"
    log.touch()
    (folder / "sitecustomize.py").write_text(WATCHER.format(log=str(log)))
    return log


@pytest.fixture(scope="module")
def served(run: Path, asked: Path) -> Iterator[Running]:
    # A recording of the microphone may be longer than the second that the tiny encoder reads.
    words = ["--requests.max_new_tokens", str(MAX_NEW_TOKENS), "--threads", "1", "--long_audio", "chunk"]
    with server(run, *words, command="page", modules=[asked.parent]) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, served: Running) -> Page:
    """The page, opened anew."""
    browser.open(f"{served.address}/page")
    return browser


def encoded_images(served: Running) -> float:
    text = httpx.get(f"{served.address}/metrics").text
    found = re.search(r'^mllm_encoded_media_total\{medium="image"\} (\S+)$', text, re.M)
    return float(found[1]) if found else 0.0


def test_an_answer_and_its_count_change_with_the_slider(
    page: Page, media: list[dict[str, Path]], answerer: Answerer
) -> None:
    image = media[0]["image"]
    page.upload("image", image)
    page.type(QUESTION)
    assert page.text("image-line").startswith("image=64: 64 soft tokens · ")
    most = page.ask()
    page.move("image-budget", LEFT)
    line = page.until(lambda: page.text("image-line") if "image=16:" in page.text("image-line") else None)
    assert re.fullmatch(r"image=16: 16 soft tokens · [\d.]+ MFLOP · [\d.]+ ms measured", line)
    fewer = page.ask()
    page.move("image-budget", HOME, LEFT)  # it stops at the fewest trained
    page.until(lambda: page.text("image-line").startswith("image=1: 1 soft token · "))
    fewest = page.ask()
    for (text, used), count in zip((most, fewer, fewest), (64, 16, 1), strict=True):
        expected = answerer.answer(QUESTION, image=image, budget=f"image={count}")
        assert text == expected.text
        assert used.startswith(f"soft tokens: image {count} ")
        assert f"prompt {expected.num_prompt_tokens}," in used
    assert most[0] != fewest[0]


def test_audio_is_transcribed(page: Page, media: list[dict[str, Path]], answerer: Answerer) -> None:
    audio = media[0]["audio"]
    page.upload("audio", audio)
    page.move("audio-budget", HOME)
    page.until(lambda: page.text("audio-line").startswith("audio=/8: "))
    text, used = page.ask()
    expected = answerer.answer(audio=audio, budget="audio=/8")
    assert text == expected.text
    assert used.startswith(f"soft tokens: audio {expected.tokens['audio']} ")


def test_a_video_is_read_with_its_audio_where_that_is_ticked(
    page: Page, tmp_path: Path, media: list[dict[str, Path]], answerer: Answerer
) -> None:
    clip = tmp_path / "clip.mkv"
    tiny.write_clip(media[1]["video"], media[1]["audio"], clip)
    page.upload("video", clip)
    lips = page.ask()
    page.click("#with-audio input")
    both = page.ask()
    assert lips[0] == answerer.answer(video=clip, budget="video=/2").text
    expected = answerer.answer(video=clip, budget="audio=/4,video=/2")
    assert both[0] == expected.text
    assert both[1].startswith(f"soft tokens: audio {expected.tokens['audio']}, video {expected.tokens['video']} ")


def test_audio_of_the_microphone_is_transcribed(page: Page) -> None:
    page.click("#audio button[aria-label='Record audio']")
    page.click("#audio button.record-button")
    page.click("#audio button.stop-button")
    page.until(lambda: page.all("#audio button[aria-label='Play']"))
    _, used = page.ask()
    assert re.match(r"soft tokens: audio \d+ ", used), page.value("problem")


def test_an_image_of_the_camera_is_answered_about(page: Page) -> None:
    page.click("#image button[aria-label='Capture from camera']")
    allow = "Click to Access Webcam"
    page.until(lambda: [button for button in page.all("#image button") if button.text == allow])[0].click()
    page.click("#image button[aria-label='capture photo']")
    page.until(lambda: page.all("#image button[aria-label='Remove Image']"))
    _, used = page.ask()
    assert used.startswith("soft tokens: image 64 "), page.value("problem")


def test_all_budgets_are_answered_side_by_side_about_an_image_that_is_encoded_once(
    page: Page, served: Running, media: list[dict[str, Path]], answerer: Answerer
) -> None:
    image, before = media[1]["image"], encoded_images(served)
    page.upload("image", image)
    page.type(QUESTION)
    page.click("#ask-all")
    page.until(lambda: page.all("#table tbody tr") or page.value("problem"))
    rows = [[cell.text for cell in row.find_elements("css selector", "td")] for row in page.all("#table tbody tr")]
    assert [row[:2] for row in rows] == [[f"image={count}", str(count)] for count in (1, 4, 16, 64)]
    for budget, _, flops, milliseconds, text in rows:
        expected = answerer.answer(QUESTION, image=image, budget=budget)
        assert text == " ".join(expected.text.split()) + (" …" if expected.is_cut else "")
        assert re.fullmatch(r"[\d.]+ MFLOP", flops)
        assert float(milliseconds) > 0
    assert encoded_images(served) == before + 1
    assert page.until(lambda: page.all("#plot img"))[0].size["width"] > 100


def test_an_overlay_shows_what_each_soft_token_covers(page: Page, media: list[dict[str, Path]]) -> None:
    page.upload("image", media[0]["image"])
    page.move("image-budget", LEFT)
    page.click("#show")
    page.until(lambda: "image=16: the areas of all soft tokens, 16 in number" in page.text("overlay"))
    plain = page.one("#overlay img").get_attribute("src")
    page.move("token", RIGHT, RIGHT)
    page.until(lambda: page.text("overlay") == "image=16: soft token 2 of 16 is made of 4 of 64 patches")
    assert page.one("#overlay img").get_attribute("src") != plain


def test_what_is_wrong_is_told_in_the_servers_words(page: Page, served: Running, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken" * 20)
    page.upload("image", file)
    page.type(QUESTION)
    page.click("#ask")
    told = page.until(lambda: page.value("problem"))
    url = data_url("image", file.read_bytes())
    body = {"model": "toy", "messages": user({"type": "image_url", "image_url": {"url": url}}, QUESTION)}
    refused = httpx.post(f"{served.url}/chat/completions", json=body)
    assert refused.status_code == 400
    assert told == refused.json()["error"]["message"]
    assert page.value("answer") == ""
    page.click("#show")
    page.until(lambda: page.value("problem") == told)
    assert not page.all("#overlay img")


def test_a_page_without_anything_says_what_is_missing(page: Page) -> None:
    page.click("#ask")
    page.until(lambda: page.value("problem") == "there is no question and no image, audio or video; add one")
    page.click("#ask-all")
    page.until(lambda: page.value("problem").startswith("there is no image, audio or video whose budget could differ"))


def test_neither_the_browser_nor_the_server_asks_anybody_else(page: Page, served: Running, asked: Path) -> None:
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    loaded = page.driver.execute_script(script)
    assert len(loaded) > 10
    hosts = {urlsplit(name).netloc for name in loaded if not name.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(served.address).netloc}
    lines = asked.read_text().splitlines()
    assert [line for line in lines if "127.0.0.1" not in line and "localhost" not in line] == []


def test_a_page_with_a_key_opens_for_who_gives_it(run: Path, browser: Page, media: list[dict[str, Path]]) -> None:
    words = ["--measure_budgets", "false", "--threads", "1"]
    with server(run, *words, key="secret", command="page") as running:
        assert httpx.get(f"{running.address}/page/").status_code == 401
        host = running.address.removeprefix("http://")
        browser.driver.get(f"http://anybody:secret@{host}/page/")
        browser.open(f"http://{host}/page/")  # the browser keeps the key
        assert "time not measured" in browser.text("image-line")
        browser.upload("image", media[2]["image"])
        assert browser.ask()[1].startswith("soft tokens: image 64 ")
        config = httpx.get(f"{running.address}/page/config", auth=("anybody", "secret")).json()
        assert "secret" not in json.dumps(config)
