"""FLOPs of training, in closed form."""

from lattejax.configuration import Config
from lattejax.models import flops

TRAINING_PASSES = 3  # in units of a forward pass: a backward pass costs two


def question_flops(config: Config) -> int:
    text, vision = config.model.text, config.model.vision
    return flops.question(text, vision, config.data.answer_length, config.data.max_pixels // vision.patch_size**2)


def generation_flops(config: Config, num_captions: int) -> float:
    """The FLOPs of one image in a training step, without contexts that are computed before training, and without the
    pictures that prompts show."""
    model, stage, tokens = config.model_config, config.train, config.data.prompt_length
    reading = flops.reading(model.vlm.text, tokens)
    passes = TRAINING_PASSES * flops.velocity(model.generation, tokens)
    passes *= 1 if stage.stratified else config.model.num_groups
    reading *= TRAINING_PASSES if config.trains_answers else 1
    if not stage.share_contexts:
        passes += reading
    elif config.trains_answers:
        passes += reading * (num_captions + 1) * stage.accumulation / stage.batch_size
    if config.trains_answers:
        passes += TRAINING_PASSES * question_flops(config) * stage.answer_batch_size / stage.batch_size
    return passes
