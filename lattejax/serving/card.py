"""The model's card, which the page shows."""

from typing import Any

from lattejax.runs.results import final_scores
from lattejax.runs.run import Run
from lattejax.serving.limits import Limits


def make_card(run: Run, name: str, workdir: str, limits: Limits, autoencoder: str = "") -> dict[str, Any]:
    """What the page shows of a run: geometry, groups and their intervals, scores; and what it may ask for. `workdir`
    and `autoencoder` are for the command that draws the same pictures."""
    config = run.config
    model = config.model_config
    generation, text = model.generation, model.vlm.text
    edges = generation.intervals.edges
    groups = [
        {"layers": [own.start + 1, own.stop], "interval": [edges[group], edges[group + 1]]}
        for group, own in enumerate(generation.layers_of)
    ]
    return {
        "name": name,
        "workdir": workdir,
        "autoencoder": autoencoder,
        "variant": model.variant,
        "layers": text.num_layers,
        "width": text.hidden_size,
        "heads": text.num_heads,
        "vocabulary": text.vocab_size,
        "image_size": config.data.image_size,
        "latent_shape": list(generation.latent_shape),
        "image_tokens": generation.grid[0] * generation.grid[1],
        "residual_attention": generation.residual_attention,
        "dtype": config.dtype,
        "step": run.trained_step if not run.is_export else None,
        "groups": groups,
        "scores": final_scores(run.workdir.results),
        "sampling": {
            "steps": min(config.eval.sample_steps, limits.steps),
            "guidance": config.eval.guidance,
            "shift": config.eval.shift,
        },
        "prompts": list(config.eval.prompts[:10]),
        "limits": {
            "n": limits.images_per_request,
            "steps": limits.steps,
            "prompt_tokens": limits.prompt_tokens,
            "context_tokens": limits.context_tokens,
        },
    }
