"""What is pushed makes a model and tells nothing of this machine; its card is written from the run."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, trainers

from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.cli import main
from mllm.evaluation.hub import files_to_upload, push_to_hub, stage
from mllm.evaluation.model_card import CARD, NOT_STATED, card_of, licence_of
from mllm.model.trainables import set_trainables

ROW: dict[str, Any] = {
    **{"set": "test", "task": "asr", "kind": None, "snr_db": None, "budget": "audio=/4", "metric": "wer"},
    **{"value": 0.123, "low": 0.1, "high": 0.15, "soft_tokens": 24.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an evaluation, and beside the model what a run leaves otherwise."""
    folder = tmp_path_factory.mktemp("hub")
    parts = tiny.write_parts(folder / "parts")
    (folder / "parts" / "llm" / CARD).write_text("---\nlicense: llama3.2\n---\n\n# An LLM\n")
    model, processor = build(tiny.settings_on(parts, ("audio",)))
    set_trainables(model)
    model.config.sources["audio"]["reference"] = "openai/whisper-tiny"  # as if a hub had it
    save_run(model, processor, folder / "run")
    settings = {
        "data": {"train": [str(folder / "secret" / "train.jsonl")]},
        "sampler": {"mode": "random"},
        "train": {"max_steps": 5, "learning_rate": 0.001, "seed": 0},
    }
    (folder / "run" / "settings.yaml").write_text(json.dumps(settings))
    (folder / "run" / "evaluation").mkdir()
    (folder / "run" / "evaluation" / "results.json").write_text(json.dumps({"facts": {}, "rows": [ROW]}))
    (folder / "run" / "evaluation" / "pareto.png").write_bytes(b"a plot")
    (folder / "run" / "checkpoint-00000005").mkdir()
    for name in ("log.jsonl", "run.lock", "checkpoint-00000005/tokenizer.json", "skipped-0.jsonl"):
        (folder / "run" / name).write_text("{}")
    return folder / "run"


def test_only_what_makes_the_model_is_uploaded(run: Path) -> None:
    files = files_to_upload(run)
    assert {"config.json", "trainables.safetensors", "processor_config.json", "tokenizer.json"} <= set(files)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(files)
    assert not [file for file in files if file.startswith(("checkpoint", "log", "run", "skipped", "settings", "eval"))]
    with pytest.raises(FileNotFoundError, match="holds no model"):
        files_to_upload(run.parent)


def test_a_card_tells_parts_licences_budgets_training_and_results(run: Path) -> None:
    card = ModelCard(card_of(run, repo="someone/elastic", licence="apache-2.0"))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["openai/whisper-tiny"]
    assert card.data.eval_results is not None
    assert (card.data.eval_results[0].metric_type, card.data.eval_results[0].metric_value) == ("wer", 12.3)
    for line in (
        "# elastic",
        "| llm | llm | llama3.2 |",
        f"| audio | openai/whisper-tiny | {NOT_STATED} |",
        "| audio | pool | `audio=/4`, `audio=/8` |",
        "- data: `train.jsonl`",
        "- 5 steps, learning rate 0.001, seed 0",
        "| test | asr | `audio=/4` | 24 | wer 12.3 | 10.0 to 15.0 |",
        "--sources.NAME FOLDER",
    ):
        assert line in card.text
    assert str(run.parent) not in card.content


def test_what_is_staged_names_no_path_of_this_machine_and_still_loads(run: Path, tmp_path: Path) -> None:
    files = stage(run, tmp_path / "staged", repo="someone/elastic")
    assert {CARD, "results.png"} <= set(files)
    for file in files:
        if file.endswith((".json", ".md")):
            assert str(run.parent) not in (tmp_path / "staged" / file).read_text()
    parts = {name: str(run.parent / "parts" / name) for name in ("llm", "audio")}
    model, _ = load(tmp_path / "staged", device="cpu", sources=parts)
    mine = dict(load(run, device="cpu", sources=parts)[0].named_parameters())
    assert all(value.equal(mine[name]) for name, value in model.named_parameters())


def test_a_vocabulary_is_staged_as_it_is(run: Path, tmp_path: Path) -> None:
    texts = ["a/b /usr /usr/bin / /tmp //x"]  # so that `/` is in a merge, and `/usr` a token
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(texts * 30, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    shutil.copytree(run, tmp_path / "run")
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    stage(tmp_path / "run", tmp_path / "staged", repo="someone/elastic")
    staged = Tokenizer.from_file(str(tmp_path / "staged" / "tokenizer.json"))
    assert staged.encode(texts[0]).ids == tokenizer.encode(texts[0]).ids


def test_sets_that_are_called_by_their_paths_are_told_apart_without_this_machines(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    rows = [{**ROW, "set": str(tmp_path / "corpus" / name / "test.jsonl")} for name in ("images", "speech")]
    (tmp_path / "run" / "evaluation" / "results.json").write_text(json.dumps({"facts": {}, "rows": [*rows, ROW]}))
    card = card_of(tmp_path / "run", repo="someone/elastic")
    for name in ("images/test.jsonl", "speech/test.jsonl", "test"):
        assert f"| {name} | asr | `audio=/4` |" in card
    assert str(tmp_path) not in card


def test_licences_are_read_from_cards_and_never_made_up(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == NOT_STATED
    (tmp_path / CARD).write_text("# A page without a head\n")
    assert licence_of(tmp_path) == NOT_STATED
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == "mit"


class ToyHub(BaseHTTPRequestHandler):
    """Takes one commit, as a model hub does that wants every file in it."""

    received: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            assert b"private" in body
            answer = {"url": f"http://{self.headers['Host']}/someone/elastic"}
        elif self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            }
        else:
            assert "/commit/" in self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/someone/elastic/commit/1"
            answer = {"commitUrl": address, "commitOid": "1", "success": True}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub on this machine; what it was sent, by path."""
    received: dict[str, bytes] = {}
    handler = type("Handler", (ToyHub,), {"received": received})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_HUB_OFFLINE", False)
    yield received
    server.shutdown()


def test_a_push_sends_what_was_staged_as_one_commit(run: Path, tmp_path: Path, hub: dict[str, bytes]) -> None:
    files = stage(run, tmp_path / "staged", repo="someone/elastic")
    assert push_to_hub(run, "someone/elastic", token="hf_none").endswith("/someone/elastic/commit/1")
    assert hub == {file: (tmp_path / "staged" / file).read_bytes() for file in files}
    with pytest.raises(ValueError, match="repo is 'elastic'; write OWNER/NAME"):
        push_to_hub(run, "elastic")


def test_a_dry_run_shows_the_card_and_the_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "--repo", "someone/elastic", "--dry_run", "--license", "mit"]) == 0
    shown = capsys.readouterr().out
    assert "license: mit" in shown
    for file in ("config.json", "trainables.safetensors", "adapter/adapter_model.safetensors", CARD):
        assert f"  {file}\n" in shown


def test_an_export_holds_the_card_of_its_run(run: Path, tmp_path: Path) -> None:
    parts = [f"--sources.{name}={run.parent / 'parts' / name}" for name in ("llm", "audio")]
    assert main(["export", "--model", str(run), "--out", str(tmp_path / "exported"), *parts]) == 0
    text = (tmp_path / "exported" / CARD).read_text()
    assert "are in this checkpoint" in text
    assert "wer 12.3" in text
    files = stage(tmp_path / "exported", tmp_path / "staged", repo="someone/whole")
    assert {"model.safetensors", "results.png", CARD} <= set(files)
    assert (tmp_path / "staged" / CARD).read_text() == text
