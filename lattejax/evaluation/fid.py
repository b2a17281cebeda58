"""A monitor in training: the FID of a few thousand drawings. It compares checkpoints of a run, and nothing else.

A published FID is of 50,000 drawings, see `python -m lattejax.evaluate --reference`: fewer give a higher distance.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.errors import UserError
from lattejax.evaluation.adm import ReferenceFile
from lattejax.evaluation.features import FeatureExtractor
from lattejax.evaluation.pictures import FEWEST, Reference, score_pictures
from lattejax.evaluation.protocol import Report, Subject
from lattejax.evaluation.sample_sets import Asked, SetDrawer
from lattejax.models.inception import Features
from lattejax.ranges import Size, check_ranges
from lattejax.weights import inception
from lattejax.weights.inception import InceptionWeights

AT_A_TIME = 512  # drawings in memory


@dataclasses.dataclass(frozen=True, eq=False)
class FIDMonitor:
    """FID, sFID and Inception Score of `images` drawings of the data's prompts, drawn as config.eval defines.

    The figures have the number of drawings in their names, such as fid_1000, since they depend on it.
    """

    images: Size
    reference: ReferenceFile
    weights_path: str = ""
    judges = "pathway"

    def __post_init__(self):
        check_ranges(self)
        if self.images < FEWEST:
            raise ValueError(f"images={self.images} must be at least {FEWEST}")
        if self.reference.pool is None:
            raise ValueError(f"reference={self.reference.path} has no mu and sigma")

    @property
    def named_by(self) -> list[int]:
        return [self.images]

    @classmethod
    def open(
        cls, config: Config, source: Source, *, images: int, reference: str, inception_weights: str = ""
    ) -> "FIDMonitor":
        """`reference` is a file as ADM's evaluator has; `inception_weights` a file, empty for the usual place."""
        if not source.has_drawings:
            raise UserError(f"config.data.source={config.data.source!r} has no drawings to judge")
        inception.find(inception_weights)
        return cls(images, ReferenceFile.open(reference), inception_weights)

    @functools.cached_property
    def weights(self) -> InceptionWeights:
        return inception.load(self.weights_path)

    def __call__(self, subject: Subject) -> Report:
        config, extract = subject.config, FeatureExtractor(self.weights, subject.mesh)
        asked = Asked.of_data(config, subject.source, subject.encoder)
        settings = dict(batch_size=config.eval.batch_size, seed=config.seed)
        draw = SetDrawer(subject.sampler, asked, config.eval.sampling, **settings)

        def features() -> Iterator[Features]:
            for start in range(0, self.images, AT_A_TIME):
                yield extract(draw(np.arange(start, min(start + AT_A_TIME, self.images))))

        reference = Reference(self.reference.pool, self.reference.spatial)
        figures = score_pictures(features(), self.images, None, reference)
        return Report({f"{name}_{self.images}": value for name, value in figures.items()})
