"""Makes transformers' Auto classes know the elastic model, at the moment transformers is imported and not before.

Knows module names of transformers and of this package. Does not know what they compute.

`mllm --help` must not wait for torch, and `AutoModelForImageTextToText.from_pretrained` must work after `import mllm`:
so the classes are registered by an import hook as soon as transformers has loaded its own Auto modules.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto."
logger = logging.getLogger(__name__)


def register() -> None:
    """Register everything now; doing so again changes nothing."""
    for action in _AFTER.values():
        action()


def _register_config() -> None:
    from transformers import AutoConfig

    from mllm.configuration import ElasticConfig
    from mllm.encoders.av_hubert import AVHubertConfig

    AutoConfig.register("elastic", ElasticConfig, exist_ok=True)
    AutoConfig.register(AVHubertConfig.model_type, AVHubertConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

    from mllm.configuration import ElasticConfig
    from mllm.encoders.av_hubert import AVHubertConfig, AVHubertEncoder
    from mllm.modeling import ElasticForConditionalGeneration, ElasticModel

    _register_config()
    AutoModel.register(AVHubertConfig, AVHubertEncoder, exist_ok=True)
    AutoModel.register(ElasticConfig, ElasticModel, exist_ok=True)
    AutoModelForImageTextToText.register(ElasticConfig, ElasticForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(ElasticConfig, ElasticForConditionalGeneration, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from mllm.configuration import ElasticConfig
    from mllm.processing import ElasticProcessor

    _register_config()
    AutoProcessor.register(ElasticConfig, ElasticProcessor, exist_ok=True)


def hide_broken_torchaudio() -> None:
    """Let transformers do without a torchaudio that is installed but cannot be imported.

    transformers imports torchaudio whenever it finds it, and every model class fails with it when its binary does not
    match torch's. Nothing here needs it.
    """
    try:
        found = importlib.util.find_spec("torchaudio") is not None
    except ValueError:
        found = False
    if not found:
        return
    try:
        importlib.import_module("torchaudio")
    except Exception as error:
        logger.warning("torchaudio is installed but broken and is left out: %s", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  (how Python says: not importable)
        from transformers.utils import import_utils

        import_utils.is_torchaudio_available.cache_clear()


_BEFORE: dict[str, Callable[[], None]] = {"transformers.audio_utils": hide_broken_torchaudio}
_AFTER: dict[str, Callable[[], None]] = {
    f"{AUTO}configuration_auto": _register_config,
    f"{AUTO}modeling_auto": _register_models,
    f"{AUTO}processing_auto": _register_processor,
}


class _Hook(MetaPathFinder):
    """Runs an action before or after one of the modules above is executed, each once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _BEFORE and fullname not in _AFTER:
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
            _BEFORE.get(fullname, _nothing)()
            run(module)
            _AFTER.get(fullname, _nothing)()

        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def _nothing() -> None:
    pass


def install() -> None:
    """Put the hook in place; what transformers has already loaded is registered at once."""
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
    for name, action in _AFTER.items():
        if name in sys.modules:
            action()
