"""Makes transformers' Auto classes know the elastic model, when they are first asked and not before.

Knows names of transformers and of this package. Does not know what they compute.

`mllm --help` must not wait for torch, and `AutoModelForImageTextToText.from_pretrained` must work after `import mllm`.
So an import hook lets the loading methods of the Auto classes register the classes here when they are first called; at
the time transformers is imported it is too early, since the modules the classes need are still being loaded.
"""

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."
logger = logging.getLogger(__name__)


def register() -> None:
    """Register everything now; doing so again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from mllm.encoders import register_av_hubert
    from mllm.model.backbone import ElasticModel
    from mllm.model.configuration import ElasticConfig
    from mllm.model.modeling import ElasticForConditionalGeneration
    from mllm.processing.processor import ElasticProcessor

    register_av_hubert()
    AutoConfig.register("elastic", ElasticConfig, exist_ok=True)
    AutoModel.register(ElasticConfig, ElasticModel, exist_ok=True)
    AutoModelForImageTextToText.register(ElasticConfig, ElasticForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(ElasticConfig, ElasticForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ElasticConfig, ElasticProcessor, exist_ok=True)
    # The pipeline knows the models it serves by the names in this table alone.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("elastic", ElasticForConditionalGeneration.__name__)


def hide_broken(library: str) -> None:
    """Let transformers do without a torchaudio or torchvision that is installed but cannot be imported.

    transformers imports either whenever it finds it, and every model class fails with it when its binary does not match
    torch's: the registry builds both for torch with CUDA only. Nothing here needs them but what says so.
    """
    try:
        found = importlib.util.find_spec(library) is not None
    except ValueError:
        found = False
    if not found:
        return
    try:
        importlib.import_module(library)
    except Exception as error:
        logger.warning("%s is installed but broken and is left out: %s", library, error)
        for name in [name for name in sys.modules if name.partition(".")[0] == library]:
            del sys.modules[name]
        sys.modules[library] = None  # type: ignore[assignment]  (how Python says: not importable)
        from transformers.utils import import_utils

        getattr(import_utils, f"is_{library}_available").cache_clear()


# Methods that load by model type, by the module and class they are defined in.
_LOADERS = {
    f"{AUTO}configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    f"{AUTO}auto_factory": ("_BaseAutoModelClass", ("from_pretrained", "from_config")),
    f"{AUTO}processing_auto": ("AutoProcessor", ("from_pretrained",)),
}
_BEFORE: dict[str, Callable[[], None]] = {
    "transformers.audio_utils": functools.partial(hide_broken, "torchaudio"),
    "transformers.image_utils": functools.partial(hide_broken, "torchvision"),
}


def _register_at_first_call(module: ModuleType) -> None:
    class_name, methods = _LOADERS[module.__name__]
    owner = getattr(module, class_name)
    for name in methods:
        setattr(owner, name, classmethod(_registering(owner.__dict__[name].__func__)))


def _registering(load: Callable[..., Any]) -> Callable[..., Any]:
    """The loading method, after everything is registered; transformers copies it from class to class."""

    @functools.wraps(load)
    def register_and_load(cls: type, *args: Any, **kwargs: Any) -> Any:
        _register_once()
        return load(cls, *args, **kwargs)

    return register_and_load


@functools.cache
def _register_once() -> None:
    register()


class _Hook(MetaPathFinder):
    """Acts before or after one of the modules above is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _BEFORE and fullname not in _LOADERS:
            return None
        sys.meta_path.remove(self)  # find the module as if this hook were not there
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            if fullname in _BEFORE:
                _BEFORE[fullname]()
            run(module)
            if fullname in _LOADERS:
                _register_at_first_call(module)

        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the hook in place, for what transformers has loaded already too."""
    if any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Hook())
    for name in _LOADERS:
        if name in sys.modules:
            _register_at_first_call(sys.modules[name])
