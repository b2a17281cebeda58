"""lattejax as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`; see docs/evaluation.md.

Nothing heavy is imported here: lmms-eval calls `models` whenever it starts, with any model.
"""

from typing import Any


def models() -> list[Any]:
    """The models, as `ModelManifest`s of lmms-eval 0.7.3."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("lattejax", simple_class_path="lattejax.harness.model.LatteJax"),
        ModelManifest("lattejax_chat", chat_class_path="lattejax.harness.model.LatteJaxChat"),
    ]
