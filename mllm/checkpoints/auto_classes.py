"""Makes transformers' Auto classes and its pipeline know the elastic model.

Knows names of transformers and of this package. Does not know what they compute.
"""

from mllm.utils.broken_packages import hide_broken_packages


def register() -> None:
    """Register the elastic model with transformers; doing so again changes nothing.

    Afterwards `AutoConfig`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline("image-text-to-text")` read a
    folder that `mllm export` wrote. `mllm.load`, `mllm.train` and the command line call this themselves.
    """
    hide_broken_packages()
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from mllm.encoders import register_av_hubert
    from mllm.model.configuration import ElasticConfig
    from mllm.model.modeling import ElasticForConditionalGeneration, ElasticModel
    from mllm.processing.processor import ElasticProcessor
    from mllm.utils.registry import load_plugins

    load_plugins()  # what they add may be named in the config of a folder
    register_av_hubert()
    AutoConfig.register("elastic", ElasticConfig, exist_ok=True)
    AutoModel.register(ElasticConfig, ElasticModel, exist_ok=True)
    AutoModelForImageTextToText.register(ElasticConfig, ElasticForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(ElasticConfig, ElasticForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ElasticConfig, ElasticProcessor, exist_ok=True)
    # The pipeline knows the models it serves by the names in this table alone.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("elastic", ElasticForConditionalGeneration.__name__)
