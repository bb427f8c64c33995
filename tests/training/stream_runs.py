"""Tiny runs on streams: parts, three shards of images with questions and of speech, and the config of a run."""

import json
from pathlib import Path
from typing import Any

import tiny
from harness import log_rows
from webdataset_shards import write_shard

NUM_SAMPLES = 12


def write_world(folder: Path) -> Path:
    """Write tiny parts, and three shards of images with questions and of speech; returns the folder."""
    (folder / "parts.json").write_text(json.dumps(tiny.write_parts(folder / "parts")))
    for shard in range(3):
        samples: dict[str, dict[str, Any]] = {}
        for number in range(shard * 4, shard * 4 + 4):
            names = tiny.write_media(folder / "media", seed=number, seconds=0.4 + 0.1 * (number % 3))
            medium = ("image", "audio")[number % 2]
            content = (folder / "media" / names[medium]).read_bytes()
            text: dict[str, Any] = (
                {"json": {"question": "what is it?", "answer": "red " * (number + 1)}}
                if medium == "image"
                else {"txt": b"place red now"}
            )
            samples[f"{number:09d}"] = {names[medium].rpartition(".")[2]: content, **text}
        write_shard(folder / "shards" / f"{shard:06d}.tar", samples)
    return folder


def values_of(world: Path, out: Path, *, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """A run config of the tiny parts on the shards."""
    parts = json.loads((world / "parts.json").read_text())
    media = {
        medium: {"encoder": parts[medium], **{key: tiny.MEDIA[medium][key] for key in ("compressor", "budgets")}}
        for medium in ("image", "audio")
    }
    values: dict[str, Any] = {
        "train": [str(world / "shards" / "{000000..000002}.tar")],
        "reader": {"format": "webdataset"},
        "stream": {"shuffle_samples": 4},
        "audio_mask_samples": [1000, 2000],
        "num_workers": 0,
        "max_rows": 2,
        **(data or {}),
    }
    return {
        "model": {"llm": parts["llm"], "chat_format": "plain", "adapter": {"rank": 4, "alpha": 8}, **media},
        "data": {key: value for key, value in values.items() if value is not None},
        "sampler": {"mode": "random", "num_budgets": 2},
        "train": {
            "out": str(out),
            "max_steps": 6,
            "save_every": 3,
            "keep_checkpoints": 9,
            "log_every": 1,
            "accumulation": 2,
            "use_cpu": True,
            "progress": False,
            "tensorboard": False,
            **train,
        },
    }


def losses(run: Path) -> list[dict[str, float]]:
    """The rows of a run's log that tell losses."""
    return [row for row in log_rows(run) if "loss" in row]
