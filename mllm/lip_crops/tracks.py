"""Follows faces found frame by frame as people through a clip, and chooses one of them.

Knows where faces are and how large. Does not know what finds them nor what becomes of them.

Shapes: T frames, P points of a face.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm.lip_crops.config import NAMED_FACES

_REACH = 0.5
"""How far a face may move from one frame to the next, in sizes of it."""
_REACH_PER_MISSED_FRAME = 0.05
_GREATEST_GROWTH = 1.6


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One person through a clip: points (T, P) complex, NaN in frames where the face was not found."""

    points: np.ndarray

    @property
    def coverage(self) -> float:
        """The fraction of the frames in which the face was found."""
        return float(self._is_seen.mean())

    @property
    def size(self) -> float:
        """The mean of width and height together, in pixels."""
        return float(np.mean([face_size(face) for face in self.points[self._is_seen]]))

    @property
    def x(self) -> float:
        """The mean position from left to right, in pixels."""
        return float(np.real(self.points[self._is_seen]).mean())

    @property
    def _is_seen(self) -> np.ndarray:
        return np.asarray(~np.isnan(self.points).any(axis=1))


def face_size(face: np.ndarray) -> float:
    """Add width and height of the box around the points (P,)."""
    return float(np.ptp(np.real(face)) + np.ptp(np.imag(face)))


def follow(faces: Sequence[Sequence[np.ndarray]]) -> list[Track]:
    """Join the faces of all frames to people: each continues the nearest earlier one within reach, of like size.

    Args:
        faces: of every frame, the points (P,) complex of each face, in any order.

    Returns:
        In order of appearance. A cut in the film begins new tracks, since faces jump there.
    """
    people: list[dict[int, np.ndarray]] = []
    for number, frame_faces in enumerate(faces):
        pairs = [
            (cost, person, index)
            for person, track in enumerate(people)
            for index, face in enumerate(frame_faces)
            if (cost := _cost(track, number, face)) is not None
        ]
        # Nearest pairs first, each person and each face once: greedy, since people rarely compete for a face.
        taken_people: set[int] = set()
        taken_faces: set[int] = set()
        for _, person, index in sorted(pairs):
            if person not in taken_people and index not in taken_faces:
                people[person][number] = frame_faces[index]
                taken_people.add(person)
                taken_faces.add(index)
        people += [{number: face} for index, face in enumerate(frame_faces) if index not in taken_faces]
    return [_track(person, len(faces)) for person in people]


def choose(tracks: Sequence[Track], face: str, *, min_coverage: float) -> tuple[Track | None, str]:
    """Choose the person asked for among those seen long enough; return None and the reason where there is none.

    Args:
        tracks: of `follow`.
        face: `largest`, `left`, `right`, or a number counted from the left, beginning with 0.
        min_coverage: fraction of the frames a face must be found in to count.
    """
    if not tracks:
        return None, "no face was found"
    seen = sorted((track for track in tracks if track.coverage >= min_coverage), key=lambda track: track.x)
    if not seen:
        best = max(track.coverage for track in tracks)
        return None, f"no face is there in {min_coverage:.0%} of the frames; the longest one in {best:.0%}"
    if face == "largest":
        return max(seen, key=lambda track: track.size), ""
    number = {"left": 0, "right": len(seen) - 1}[face] if face in NAMED_FACES else int(face)
    if number >= len(seen):
        return None, f"face {number} was asked for; there are {len(seen)}, counted from 0 at the left"
    return seen[number], ""


def _cost(track: dict[int, np.ndarray], number: int, face: np.ndarray) -> float | None:
    """Measure the distance from where a person was last seen, in sizes; None where it cannot be the same one."""
    last = next(reversed(track))
    size, new_size = face_size(track[last]), face_size(face)
    distance = float(abs(face.mean() - track[last].mean())) / max(size, new_size)
    missed = number - last - 1
    if distance > _REACH + _REACH_PER_MISSED_FRAME * missed:
        return None
    return distance if max(size, new_size) <= _GREATEST_GROWTH * min(size, new_size) else None


def _track(person: dict[int, np.ndarray], num_frames: int) -> Track:
    points = np.full((num_frames, len(next(iter(person.values())))), np.nan, dtype=complex)
    for number, face in person.items():
        points[number] = face
    return Track(points)
