"""Which conversation is kept in which row of the table, and which row a prompt takes."""

from collections.abc import Sequence

import numpy as np

from lattejax.data.prompts import EncodedPrompt


class Rows:
    """The rows of a table of caches; `keys` are those of the tokens that each row holds, see `token_keys`."""

    def __init__(self, count: int):
        self.keys: list[list[int]] = [[] for _ in range(count)]
        self._in_use = [False] * count
        self._used = [0] * count  # when; the least is the least recently used
        self._clock = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def are_in_use(self) -> bool:
        """Whether no row is free."""
        return all(self._in_use)

    def take(self, keys: list[int]) -> int:
        """Takes a free row for a prompt with these keys; keeps only the common prefix, without the prompt's last token,
        which must always be read.

        It is the row of the conversation that the prompt continues, at least in its first half; else the least recently
        used, so that a new conversation, which begins with the same system prompt, costs nobody theirs.
        """
        free = [row for row, in_use in enumerate(self._in_use) if not in_use]
        common = {row: common_prefix(self.keys[row], keys) for row in free}
        row = max(free, key=common.__getitem__)
        if 2 * common[row] < max(1, len(self.keys[row])):
            row = min(free, key=self._used.__getitem__)
        self.keys[row] = self.keys[row][: min(common[row], len(keys) - 1)]
        self._in_use[row] = True
        self._touch(row)
        return row

    def release(self, row: int) -> None:
        """The row may be taken again; it keeps what it holds until then."""
        self._in_use[row] = False
        self._touch(row)

    def forget(self) -> None:
        """Nothing is kept any more."""
        self.keys = [[] for _ in self.keys]

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock


def token_keys(prompt: EncodedPrompt, image_token: int, merge: int) -> list[int]:
    """An integer for each token of a prompt, equal where prompts are: its id, and for an image's tokens a hash of the
    image. `merge` is the vision tower's spatial merge size."""
    keys = prompt.input_ids.astype(np.int64)
    places = np.flatnonzero(keys == image_token)
    for image in prompt.images:
        count = len(image.patches) // merge**2
        keys[places[:count]] = -1 - abs(hash((image.grid, image.patches.tobytes())))
        places = places[count:]
    return keys.tolist()


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many items two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
