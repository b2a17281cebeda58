import dataclasses
from typing import Any


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: Any = None


@dataclasses.dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = dataclasses.field(default_factory=dict)

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


def unwrap_generation_output(output):
    """What the evaluator makes of a response: of one that it does not know, a text."""
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    if isinstance(output, str) or (isinstance(output, list) and all(isinstance(one, str) for one in output)):
        return output, None
    return str(output), None
