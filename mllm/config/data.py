"""Holds what a user writes about the form data come in: the blocks `reader` and `stream` of a run config. Knows no
torch.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from mllm.config.checks import check_at_least
from mllm.config.reading import ConfigError

SpeechFormat = Literal["auto_avsr", "omni_csv", "fairseq", "lrs", "clips"]
BenchmarkFormat = Literal[
    "vqav2",
    "gqa",
    "textvqa",
    "pope",
    "scienceqa",
    "mme",
    "mmbench",
    "vizwiz",
    "seedbench",
    "chartqa",
    "docvqa",
    "mmmu",
    "ai2d",
]
ConversationFormat = Literal["llava", "sharegpt", "messages", "parquet", "datasets", "webdataset"]
Format = Literal["manifest", ConversationFormat, SpeechFormat, BenchmarkFormat]
SpeechTask = Literal["asr", "vsr", "avsr"]
TextForm = Literal["as_is", "lower", "words"]
SPEECH_FORMATS = get_args(SpeechFormat)
CONVERSATION_FORMATS = get_args(ConversationFormat)
BENCHMARK_FORMATS = get_args(BenchmarkFormat)
STREAM_FORMATS = ("webdataset", "parquet", "datasets")
"""Those that can be read shard by shard."""
TABLE_FORMATS = ("mmmu", "ai2d", "chartqa", "docvqa", "scienceqa")
"""Vision benchmarks that hubs hand out as tables."""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """The form of the files that list samples. What goes with which formats is said below and checked."""

    format: Format = "manifest"
    """Names the form: our own JSONL manifest; conversations of LLaVA, ShareGPT or OpenAI and ms-swift (messages), as
    JSON or JSONL; parquet files, a folder or hub name of Hugging Face datasets, or a folder of WebDataset tars, media
    inside; a list or folder of speech clips; or a folder of a vision benchmark (docs/data.md)."""
    tasks: list[SpeechTask] = field(default_factory=list)
    """Makes these samples of each clip: of its audio (asr), its lips (vsr), both (avsr); all its media allow when
    empty."""
    text: TextForm = "as_is"
    """Keeps transcripts as they are, in lower case, or as words: in lower case, letters, marks and digits of every
    script and apostrophes inside words alone."""
    prompts: dict[SpeechTask, str] = field(default_factory=dict)
    """Sets what is asked, by task, instead of the prompts of Llama-AVSR and Omni-AVSR."""
    transcripts: str | None = None
    """Names, of the format clips, a CSV or TSV of clip and transcript; of auto_avsr, the folder of the text files."""
    max_seconds: float | None = None
    """Refuses longer clips of the format lrs, or cuts them by their word times where `mllm data import` is told to."""

    images: str | None = None
    """Names the folder of a vision benchmark's images, relative to the root, where it is not the usual one; images that
    stand inside a table are written there."""
    annotations: str | None = None
    """Names the file with a vision benchmark's answers (pope: its folder), where it is not beside the questions."""
    ocr_tokens: bool = True
    """Leaves the words that an OCR found in the question of textvqa, as LLaVA does."""
    split: str | None = None
    """Names the split of tables (parquet, arrow), where it is not train, or of a benchmark the one that papers
    print."""

    images_first: bool = False
    """Puts images of the format llava before the text of their turn, as LLaVA's training code does."""

    def __post_init__(self) -> None:
        self._check_images()
        if self.format not in SPEECH_FORMATS:
            for key in ("tasks", "prompts", "transcripts", "max_seconds"):
                if getattr(self, key):
                    raise ConfigError(key, f"goes with the formats {', '.join(SPEECH_FORMATS)}, not {self.format}")
            if self.text != "as_is":
                raise ConfigError("text", f"goes with the formats {', '.join(SPEECH_FORMATS)}, not {self.format}")
        if self.transcripts is not None and self.format not in ("clips", "auto_avsr"):
            raise ConfigError("transcripts", f"goes with the formats clips and auto_avsr, not {self.format}")
        if self.max_seconds is not None and (self.format != "lrs" or self.max_seconds <= 0):
            raise ConfigError(
                "max_seconds", f"goes with format lrs and is above 0; got {self.max_seconds}, {self.format}"
            )

    def _check_images(self) -> None:
        if self.images_first and self.format != "llava":
            raise ConfigError("images_first", f"goes with the format llava, not {self.format}")
        if self.split is not None and self.format not in (*TABLE_FORMATS, "parquet", "datasets"):
            allowed = ", ".join((*TABLE_FORMATS, "parquet", "datasets"))
            raise ConfigError("split", f"goes with the formats {allowed}, not {self.format}")
        if self.format not in BENCHMARK_FORMATS and (self.images is not None or self.annotations is not None):
            key = "images" if self.images is not None else "annotations"
            raise ConfigError(key, f"goes with vision benchmarks, not {self.format}")
        if self.format != "textvqa" and not self.ocr_tokens:
            raise ConfigError("ocr_tokens", f"goes with the format textvqa, not {self.format}")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Shards that are read while the run goes on, without their samples being listed or scanned first; see
    data/shard_stream.py."""

    shuffle_samples: int = 4096
    """Shuffles among so many samples at a time of each micro-batch of a step; so many are looked at before the first
    step as well. Only texts are kept of them, about 2 kB each, never media."""

    shards_ahead: int = 1
    """Fetches so many shards of a hub before their turn, for each micro-batch of a step."""
    max_disk_gb: float | None = None
    """Keeps so many gigabytes of a hub's shards at most, for each process, in the run folder, and deletes those that
    were trained on; all stay in the hub's own cache when left out."""

    def __post_init__(self) -> None:
        check_at_least(self, ["shuffle_samples"])
        check_at_least(self, ["shards_ahead"], 0)
        if self.max_disk_gb is not None and not 0 < self.max_disk_gb < math.inf:
            raise ConfigError("max_disk_gb", f"is {self.max_disk_gb}; it must be above 0")
