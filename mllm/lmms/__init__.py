"""Runs lmms-eval's benchmarks on our models: a chat model for its registry, and one run over several budgets.

Only `model.py` and `sweep.py` import lmms-eval, which the extra `lmms` installs. The rest knows what lmms-eval passes
to a chat model (conversations with decoded media, generation arguments), and does not know its tasks or scores.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_NAME = "mllm"


def manifest() -> "ModelManifest":
    """Makes what an entry point in the group `lmms_eval.models` names, so that `lmms-eval --model mllm` finds it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    from mllm.utils.broken_packages import hide_broken_packages

    hide_broken_packages()
    return ModelManifest(model_id=MODEL_NAME, chat_class_path="mllm.lmms.model.ElasticChat")
