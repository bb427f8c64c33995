"""Sets vLLM's engine to what an elastic model needs, where whoever starts it has not said otherwise.

Knows vLLM's configs. Does not know media or weights.
"""

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from mllm.vllm_plugin import TOKENIZER_MODE


class ElasticEngineConfig(VerifyAndUpdateConfig):
    """Takes the renderer that reads what people wrote as plain text; vLLM's own would let it spell special tokens."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Choose the renderer.

        Raises:
            ValueError: the export has an adapter that the engine cannot run.
        """
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = TOKENIZER_MODE
        adapter = model_config.hf_config.adapter
        if adapter is not None:
            raise ValueError(
                f"{model_config.model} has an adapter of kind {adapter.kind} that is not merged, and vLLM's LLM has no "
                "place for it; serve it without --engine"
            )
