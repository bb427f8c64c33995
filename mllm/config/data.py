"""What a user writes about the form data come in: the `reader` block of a run config. Plain dataclasses, no torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

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
TABLE_FORMATS = ("mmmu", "ai2d", "chartqa", "docvqa", "scienceqa")
"""Vision benchmarks that hubs hand out as tables."""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How files that list samples are read. What goes with which formats is said below and checked."""

    format: Format = "manifest"
    """Our own JSONL manifest; conversations of LLaVA, ShareGPT or OpenAI and ms-swift (messages), as JSON or JSONL;
    parquet files, a folder or hub name of Hugging Face datasets, or a folder of WebDataset tars, media inside; a list
    or folder of speech clips; or a folder of a vision benchmark (docs/data.md)."""
    tasks: list[SpeechTask] = field(default_factory=list)
    """Samples made of each clip: of its sound (asr), its lips (vsr), both (avsr); all its media allow when left out."""
    text: TextForm = "as_is"
    """Transcripts as they are, in lower case, or as words: in lower case, letters, marks and digits of every script
    and apostrophes inside words alone."""
    prompts: dict[SpeechTask, str] = field(default_factory=dict)
    """What is asked, by task, instead of the prompts of Llama-AVSR and Omni-AVSR."""
    transcripts: str | None = None
    """Format clips: a CSV or TSV of clip and transcript. Format auto_avsr: the folder of the text files."""
    max_seconds: float | None = None
    """Format lrs: a longer clip is refused, or cut by its word times where `mllm data import` is told to."""

    images: str | None = None
    """Vision benchmarks: the folder of images, relative to the root, where it is not the usual one; images that
    stand inside a table are written there."""
    annotations: str | None = None
    """Vision benchmarks: the file with the answers (pope: its folder), where it is not beside the questions."""
    ocr_tokens: bool = True
    """Format textvqa: leave the words that an OCR found in the question, as LLaVA does."""
    split: str | None = None
    """Tables (parquet, arrow): the split, where it is not train, or of a benchmark the one that papers print."""

    images_first: bool = False
    """Format llava: images stand before the text of their turn, as LLaVA's training code puts them."""

    def __post_init__(self) -> None:
        self._check_images()
        if self.format not in SPEECH_FORMATS:
            for key in ("tasks", "prompts", "transcripts", "max_seconds"):
                if getattr(self, key):
                    raise ValueError(f"{key} goes with the formats {', '.join(SPEECH_FORMATS)}, not {self.format}")
            if self.text != "as_is":
                raise ValueError(f"text goes with the formats {', '.join(SPEECH_FORMATS)}, not {self.format}")
        if self.transcripts is not None and self.format not in ("clips", "auto_avsr"):
            raise ValueError(f"transcripts goes with the formats clips and auto_avsr, not {self.format}")
        if self.max_seconds is not None and (self.format != "lrs" or self.max_seconds <= 0):
            raise ValueError(f"max_seconds goes with format lrs and is above 0; got {self.max_seconds}, {self.format}")

    def _check_images(self) -> None:
        if self.images_first and self.format != "llava":
            raise ValueError(f"images_first goes with the format llava, not {self.format}")
        if self.split is not None and self.format not in (*TABLE_FORMATS, "parquet", "datasets"):
            allowed = ", ".join((*TABLE_FORMATS, "parquet", "datasets"))
            raise ValueError(f"split goes with the formats {allowed}, not {self.format}")
        if self.format not in BENCHMARK_FORMATS and (self.images is not None or self.annotations is not None):
            raise ValueError(f"images and annotations go with vision benchmarks, not {self.format}")
        if self.format != "textvqa" and not self.ocr_tokens:
            raise ValueError(f"ocr_tokens goes with the format textvqa, not {self.format}")
