"""A grid of sample images."""

import dataclasses

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.evaluation.protocol import Report, Subject
from lattejax.sampling.grid import labelled_grid


@dataclasses.dataclass(frozen=True)
class SampleGrid:
    """Images for the config's prompts, or, if prompts are pictures, for those that the data set suggests."""

    judges = "pathway"
    named_by = ("",)

    @classmethod
    def open(cls, config: Config, source: Source) -> "SampleGrid":
        return cls()

    def __call__(self, subject: Subject) -> Report:
        config, sampler = subject.config, subject.sampler
        requests = [(text, sampler.encoder.drawing(text)) for text in config.eval.prompts]
        if config.data.prompts != "captions":
            requests = subject.source.requests(sampler.encoder)
        images = sampler(
            [prompt for _, prompt in requests],
            config.eval.sampling,
            images_per_prompt=config.eval.images_per_prompt,
            batch_size=config.eval.batch_size,
            seed=config.seed,
        )
        return Report(pictures={"samples": labelled_grid(images, [label for label, _ in requests])})
