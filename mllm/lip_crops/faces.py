"""Finds faces in images, by MediaPipe's face mesh, as the points that the crop needs.

Knows MediaPipe and the numbers of its mesh. Does not know clips or crops. Its models come with its package (up to
0.10.21), so that nothing is downloaded.

Shapes: H rows and W columns of an image, P = 8 stable points and those of the mouth.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import numpy as np

from mllm.lip_crops.geometry import MEAN_FACE_MILLIMETRES
from mllm.utils.extras import install_line

MAX_FACES = 4
STABLE_POINTS = {
    "right eye, outer corner": 33,
    "right eye, inner corner": 133,
    "left eye, inner corner": 362,
    "left eye, outer corner": 263,
    "nose bridge": 168,
    "nose base": 2,
    "nostril, right": 98,
    "nostril, left": 327,
}
MOUTH_POINTS = (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91)
"""Around the outer edge of the lips, both corners among them, symmetric."""
_POINTS = [*(STABLE_POINTS[name] for name in MEAN_FACE_MILLIMETRES), *MOUTH_POINTS]
_FIRST_LOOK = 0.35
"""Confidence above which a face counts when it is looked for anew; blurred ones of old films are around 0.4."""


class FaceFinder:
    """Finds the faces of a film's frames, in their order; each face is searched where it was before.

        with FaceFinder() as find:
            faces = find(frame)      a list of (P,) complex points, x + iy in pixels

    The mesh's own detector sees faces from about a twelfth of the frame's width on. Where it sees none, one for far
    faces looks, and the mesh gets what is around each of those.

    Raises:
        ImportError: MediaPipe is not installed or broken.
    """

    def __init__(self) -> None:
        face_mesh, face_detection = import_mediapipe()
        try:
            self._mesh: Any = face_mesh.FaceMesh(
                max_num_faces=MAX_FACES, refine_landmarks=True, min_detection_confidence=_FIRST_LOOK
            )
            self._far: Any = face_detection.FaceDetection(model_selection=1, min_detection_confidence=_FIRST_LOOK)
            self._close_up: Any = face_mesh.FaceMesh(
                static_image_mode=True, refine_landmarks=True, min_detection_confidence=_FIRST_LOOK
            )
        except (AttributeError, TypeError) as error:  # how newer protobufs show that they do not fit
            installed = f"mediapipe {_version('mediapipe')} does not work with protobuf {_version('protobuf')}"
            raise ImportError(f"{installed}: {install_line('lips')}") from error

    def __enter__(self) -> "FaceFinder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for solution in (self._mesh, self._far, self._close_up):
            solution.close()

    def __call__(self, frame: np.ndarray) -> list[np.ndarray]:
        """Find the points of every face of an RGB frame, uint8 (H, W, 3)."""
        frame = np.ascontiguousarray(frame)
        if faces := _points(self._mesh, frame):
            return faces
        for detection in (self._far.process(frame).detections or [])[:MAX_FACES]:
            left, top, side = _surroundings(detection.location_data.relative_bounding_box, *frame.shape[:2])
            piece = np.ascontiguousarray(frame[top : top + side, left : left + side])
            faces += [face + left + 1j * top for face in _points(self._close_up, piece)]
        return faces


def _points(mesh: Any, image: np.ndarray) -> list[np.ndarray]:
    height, width = image.shape[:2]
    # MediaPipe counts from the outer edge of the first pixel, crops from its middle.
    return [
        np.array([face.landmark[i].x * width - 0.5 + 1j * (face.landmark[i].y * height - 0.5) for i in _POINTS])
        for face in mesh.process(image).multi_face_landmarks or []
    ]


def _surroundings(box: Any, height: int, width: int) -> tuple[int, int, int]:
    """Compute (left, top, side) in pixels of a square about a detected box, three times as large, inside the frame."""
    side = max(2, round(3 * max(box.width * width, box.height * height)))
    left, top = (box.xmin + box.width / 2) * width - side / 2, (box.ymin + box.height / 2) * height - side / 2
    return min(max(0, round(left)), width - 2), min(max(0, round(top)), height - 2), side


def check_installed() -> None:
    """Refuse at once when MediaPipe is missing, without the second that importing it takes.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("mediapipe") is None:
        raise ImportError(f"faces are found by mediapipe, which is not installed: {install_line('lips')}")


def import_mediapipe() -> tuple[Any, Any]:
    """Import MediaPipe's modules for the face mesh and for the detection of far faces.

    Raises:
        ImportError: not installed, or a version without it; the message has the pip line.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        from mediapipe.python.solutions import face_detection, face_mesh  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise ImportError(f"faces are found by mediapipe, which cannot be imported: {install_line('lips')}") from error
    return face_mesh, face_detection


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
