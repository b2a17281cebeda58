"""The score of drawings by a VLM's answers: asked about a drawing, does it see what the prompt asked for?

With the model's own VLM this is self-consistency, not a benchmark: a VLM that cannot see a mistake does not count it.
A converted VLM is an outside judge. The probability of the answer is the score of VQAScore (Lin et al., arXiv
2404.01291).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.pipeline import every
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.errors import UserError
from lattejax.evaluation.drawn import score_drawings
from lattejax.evaluation.protocol import Report, Subject
from lattejax.flow.schedule import Guidance
from lattejax.ranges import Size, check_ranges
from lattejax.sampling.answers import Answerer
from lattejax.weights.pretrained import Pretrained

PROMPT = "{prompt}"


def held_out_captions(source: Source, count: int) -> tuple[str, ...]:
    """A fixed choice of different held-out captions.

    Raises:
      UserError: there are fewer.
    """
    held_out = source.drawings("test", None)
    different = sorted({drawing.prompts[0].caption for drawing in every(held_out)})
    if len(different) < count:
        raise UserError(f"prompts={count}, but {len(different)} different captions are held out")
    return tuple(np.random.default_rng(0).permutation(different)[:count].tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class AskedScore:
    """The probability of `answer` to `question` about each of `images` drawings, and whether it is the likeliest.

    `{prompt}` stands for the prompt in both texts: "Is this {prompt}?" with "yes", or "What is this?" with "{prompt}".
    Drawings are made as config.eval defines, or at each of several guidance scales.
    """

    config: Config
    captions: tuple[str, ...]
    images: Size
    question: str
    answer: str
    vlm: str = ""  # converted weights of an outside judge; empty: the model's own VLM
    guidance: tuple[Guidance, ...] = ()
    judges = "pathway"

    def __post_init__(self):
        check_ranges(self)
        if self.images % self.num_prompts:
            raise ValueError(f"images={self.images} must be a multiple of prompts={self.num_prompts}")
        if PROMPT not in self.question + self.answer:
            raise ValueError(f"neither question={self.question!r} nor answer={self.answer!r} contains {PROMPT}")
        if not self.question.strip() or not self.answer.strip():
            raise ValueError("question and answer must not be empty")
        if self.vlm:
            Pretrained.open(self.vlm)  # raises if there is none

    @property
    def named_by(self) -> list[tuple[bool, float | None]]:
        return [(bool(self.vlm), scale) for scale in self.guidance or (None,)]

    @classmethod
    def open(
        cls,
        config: Config,
        source: Source,
        *,
        images: int,
        prompts: int = 0,
        question: str = "Is this {prompt}?",
        answer: str = "yes",
        vlm: str = "",
        guidance: Sequence[float] = (),
    ) -> "AskedScore":
        """`prompts` is a number of held-out captions; 0: `config.eval.prompts`."""
        if config.data.prompts != "captions":
            raise UserError(f"config.data.prompts={config.data.prompts!r} are no texts to ask about")
        captions = held_out_captions(source, prompts) if prompts else tuple(config.eval.prompts)
        return cls(config, captions, images, question, answer, vlm, tuple(guidance))

    @property
    def num_prompts(self) -> int:
        return len(self.captions)

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]:
        return encoder.drawings(self.captions)

    def __call__(self, subject: Subject) -> Report:
        judge = Answerer.load(self.vlm, self.config.dtype, subject.mesh) if self.vlm else subject.answerer
        figures = functools.partial(self.figures, judge)
        return Report(score_drawings(self, figures, subject, self.config, self.guidance))

    def figures(self, judge: Answerer, images: np.ndarray) -> dict[str, float]:
        """Figures of images [P · n, H, W, 3]: n of each of the P prompts, in order."""
        name, size = "asked" if self.vlm else "self_consistency", self.config.eval.batch_size
        captions = np.repeat(self.captions, len(images) // self.num_prompts).tolist()
        sums, likeliest = [], []
        for start in range(0, len(images), size):  # a batch at a time, since pictures take memory
            rows = slice(start, start + size)
            asked = [self._ask(judge, *each) for each in zip(captions[rows], images[rows], strict=True)]
            of_batch = judge.log_likelihoods(asked, size)
            sums.append(of_batch[0])
            likeliest.append(of_batch[1])
        probability, accuracy = np.exp(np.concatenate(sums)).mean(), np.concatenate(likeliest).mean()
        return {f"{name}_probability": float(probability), f"{name}_accuracy": float(accuracy)}

    def _ask(self, judge: Answerer, caption: str, pixels: np.ndarray) -> EncodedPrompt:
        question, answer = (text.replace(PROMPT, caption) for text in (self.question, self.answer))
        return judge.encoder.question(question, [judge.encoder.read_image(Image.fromarray(pixels))], answer)
