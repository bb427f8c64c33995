"""Holds what a user writes for `mllm prepare lips`.

Knows which values make sense. Imports nothing that computes.
"""

from dataclasses import dataclass

NAMED_FACES = ("largest", "left", "right")
"""Faces that can be asked for by name; others are numbers, counted from the left."""


@dataclass(frozen=True, kw_only=True)
class LipCropsConfig:
    """Cut 96 x 96 mouth crops at 25 frames a second and 16 kHz audio out of recordings of talking people.

    A folder is searched with all below it. A .txt beside a recording is its transcript; clips that have one stand in
    manifest.jsonl. Clips that are done are left alone when the command runs again.
    """

    source: str
    """A recording, or a folder of them."""
    out: str
    """Folder to write: crops and audio as in the source folder, prepare.jsonl, manifest.jsonl, contact_sheet.png."""
    face: str = "largest"
    """Which of several people is cut out: largest, left, right, or a number counted from the left, from 0."""
    color: bool = False
    """Write RGB crops instead of gray ones; the lip encoder reads gray either way."""
    max_seconds: float = 120.0
    """Longest recording in seconds; a longer one fails, since what reads crops takes none unless its
    limits.video_seconds is raised."""
    min_frames: int = 12
    """Fewest frames, at 25 a second, of a clip that is not skipped."""
    min_face_coverage: float = 0.75
    """Fraction of the frames, 0 to 1, in which the face must be found; in the others it is interpolated."""
    max_outside: float = 0.2
    """Largest fraction of the crops, 0 to 1, that may lie beyond the border of the image; else the clip is skipped."""
    workers: int = 1
    """Number of processes that work side by side."""
    sheet_clips: int = 40
    """Number of clips on the contact sheet, evenly chosen, followed by as many skipped ones; 0 makes no sheet."""

    def __post_init__(self) -> None:
        if self.face not in NAMED_FACES and not (self.face.isascii() and self.face.isdigit()):
            raise ValueError(f"face must be {', '.join(NAMED_FACES)} or a number from 0, got {self.face!r}")
        if not 0 < self.min_face_coverage <= 1:
            raise ValueError(f"min_face_coverage must be above 0 and at most 1, got {self.min_face_coverage}")
        if not 0 <= self.max_outside <= 1:
            raise ValueError(f"max_outside must be 0 to 1, got {self.max_outside}")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, got {self.max_seconds}")
        for name, least in (("min_frames", 1), ("workers", 1), ("sheet_clips", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def deciding(self) -> dict[str, str | bool | int | float]:
        """The values that decide how a clip comes out; a clip made with others is made again."""
        names = ("face", "color", "min_frames", "min_face_coverage", "max_outside")
        return {name: getattr(self, name) for name in names}
