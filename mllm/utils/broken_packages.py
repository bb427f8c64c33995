"""Hides optional packages that are installed but broken from transformers and accelerate, which would fail with them.

Knows the packages that these import whenever they find them. Does not know models.
"""

import importlib
import importlib.util
import logging
import sys
from functools import cache

HIDEABLE = ("torchaudio", "torchvision")
logger = logging.getLogger(__name__)


@cache
def hide_broken_packages() -> None:
    """Let transformers do without a torchaudio or torchvision that is installed but cannot be imported.

    transformers imports either whenever it finds it, and every model class fails with it when its binary does not match
    torch's: the registry builds both for torch with CUDA only. Nothing here needs them but what says so. Call this
    before transformers is imported; a second call does nothing.
    """
    for package in HIDEABLE:
        if _is_installed(package):
            _hide_if_broken(package)


def hide_broken_deepspeed() -> None:
    """Let accelerate do without a DeepSpeed that is installed but cannot be imported.

    accelerate imports it at the end of every training. It fails for want of CUDA's compiler, for one. Call this where a
    training begins, which alone pays for the import, behind the check of a run that asks for it; a second call does
    nothing.
    """
    if _is_installed("deepspeed"):
        _hide_if_broken("deepspeed")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it stands in sys.modules without a spec, such as one that is hidden already
        return False


def _hide_if_broken(package: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:
        logger.warning("%s is installed but broken and is left out: %s", package, error)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]  (how Python says: not importable)
        from transformers.utils import import_utils

        if package in HIDEABLE:  # of which transformers remembers that it has found them
            getattr(import_utils, f"is_{package}_available").cache_clear()
