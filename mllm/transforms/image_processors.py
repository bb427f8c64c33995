"""Chooses which of transformers' image processors reads images: the one that is written on Pillow, wherever there is
one.

transformers writes most of them twice, on Pillow and on torchvision, and takes whichever is installed. The two round
differently, so that pixels would depend on what else is there; released models were trained with Pillow's. torchvision
is asked for only where a processor is written on nothing else, such as DINOv3's.
"""

from typing import Any

from mllm.utils.extras import install_line

_BACKEND = "pil"


def image_processor_class(name: str) -> Any:
    """Find a class of transformers by the name that a checkpoint gives it.

    Args:
        name: `image_processor_type`, with or without the `Pil` or `Fast` that says what it was written on.

    Raises:
        ValueError: transformers has no such class, or has it on torchvision alone, which is not installed.
    """
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    general = name.removesuffix("Fast").removesuffix("Pil")
    find_class = get_image_processor_class_from_name
    processor_class = find_class(f"{general}Pil") or find_class(general)
    if processor_class is None:
        raise ValueError(f"transformers has no image processor {name!r} (key image_processor_type)")
    if getattr(processor_class, "is_dummy", False):
        raise ValueError(f"transformers has {name} on torchvision alone: {install_line('torchvision')}")
    return processor_class


def read_image_processor(source: str) -> Any:
    """Read the image processor of a checkpoint.

    Args:
        source: a folder, or a name on a hub.

    Raises:
        ValueError: transformers has it on torchvision alone, which is not installed.
        OSError: there is none.
    """
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    named = get_image_processor_config(source).get("image_processor_type")
    if named is not None:
        image_processor_class(named)
    return AutoImageProcessor.from_pretrained(source, backend=_BACKEND, trust_remote_code=False)
