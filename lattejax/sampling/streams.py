"""Text from tokens as they come, up to where a stop string begins."""

from collections.abc import Sequence

from lattejax.data.tokenizer import Tokenizer


class TextStream:
    """Turns an answer's tokens into pieces of text: complete characters, none of which a later token can change.

    Args:
      tokenizer: a byte-level tokenizer; special tokens are left out of the text.
      stop: the text ends before the first of these strings.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []  # whose text may still be a part of a character
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._tokens = []
        return self._certain(text)

    def end(self) -> str:
        """Returns the rest, at the end of the answer."""
        text = self._certain(self._tokenizer.decode(self._tokens, skip_special_tokens=True)) + self._held
        self._tokens, self._held = [], ""
        return text

    def _certain(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        sizes = [size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        cut = len(text) - max(sizes, default=0)
        self._held = text[cut:]
        return text[:cut]
