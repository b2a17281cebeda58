"""Likelihoods in the form that lmms-eval 0.7.3 can score."""

from lmms_eval.api.instance import GenerationResult


class Likelihood(tuple, GenerationResult):
    """A log-probability, and whether greedy decoding would say just this: the pair that `lmms.loglikelihood` returns.

    lmms-eval 0.7.3 makes a text of a plain pair, which none of its scores can read; of a GenerationResult it takes
    `text` as it is. Its multiple choice takes the choice with the least number: there, `text` has the loss, the
    negative log-probability, as its own models return it.
    """

    def __new__(cls, log_probability: float, is_greedy: bool, is_choice: bool) -> "Likelihood":
        return super().__new__(cls, (log_probability, is_greedy))

    def __init__(self, log_probability: float, is_greedy: bool, is_choice: bool):
        GenerationResult.__init__(self, _Scored((-log_probability if is_choice else log_probability, is_greedy)))


class _Scored(tuple):
    """The pair as it is scored."""

    def strip(self) -> str:
        """What --use_cache asks for: an empty text is not cached. A cached pair would come back as a text."""
        return ""
