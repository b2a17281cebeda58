"""Config keys of earlier versions, and their replacements."""

from typing import Any

from absl import logging

from lattejax.errors import UserError

RETIRED = {
    "eval.scored_images": "eval.evaluators.digits.images",
    "eval.final_images": "eval.evaluators.final_digits.images",
}


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a config's values, a dict from a `ConfigDict` or JSON, with retired keys replaced.

    Raises:
      UserError: a retired key is given beside its replacement.
    """
    evaluation = values.get("eval")
    if not isinstance(evaluation, dict):
        return values
    if not (old := [key for key in RETIRED if key.removeprefix("eval.") in evaluation]):
        return values
    extra = evaluation.get("evaluators", {})
    if not isinstance(extra, dict) or not all(isinstance(settings, dict) for settings in extra.values()):
        return values  # invalid, which `resolve` reports
    if "held_out_loss" in extra:
        raise UserError("; ".join(f"config.{key} has been removed: use config.{RETIRED[key]}" for key in old))
    message = "the config is of an earlier version; config.eval.evaluators has replaced config.%s"
    logging.log_first_n(logging.WARNING, message, 1, ", ".join(old))
    evaluators = {"held_out_loss": {"at": "training"}, "samples": {"at": "training"}}
    if isinstance(data := values.get("data"), dict) and data.get("source") == "digits":
        evaluators["answers"] = {"at": "training"}
        evaluators["final_answers"] = {"type": "answers", "at": "end", "examples": 0}
    if images := evaluation.get("scored_images"):
        evaluators["digits"] = {"at": "training", "images": images}
    if images := evaluation.get("final_images"):
        evaluators["final_digits"] = {"type": "digits", "at": "end", "images": images, "guidance": [1, 2]}
    for name, settings in extra.items():
        evaluators[name] = {"at": "training" if settings.get("every") else "end"} | settings
    kept = {key: value for key, value in evaluation.items() if f"eval.{key}" not in RETIRED}
    return values | {"eval": kept | {"evaluators": evaluators}}
