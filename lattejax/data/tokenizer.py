"""The tokenizer: Qwen2's byte-level BPE with Qwen2-VL's special tokens and chat template.

It is loaded from a directory, or, for a small model that is trained from scratch, trained on the data set's texts.
"""

import copy
import functools
import itertools
import re
import tempfile
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath, epy

from lattejax.data.chat_template import check_limits
from lattejax.errors import UserError, parsing
from lattejax.files import check_files, local_files, read_json, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

with epy.lazy_imports():  # slow to import, and error paths do not need it
    import transformers

LAST_FILE = "tokenizer_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"
COPYING = threading.Lock()  # so that threads share one copy, see `_without_special_tokens`

IMAGE_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = [
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
]

# Qwen2-VL's conversation format: turns between <|im_start|> and <|im_end|>, a default system turn, images as one pad.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer of at most `vocab_size` entries, including special tokens."""
    texts = [*texts, "system\nYou are a helpful assistant.\n", "user\n", "assistant\n"]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = TURN_END, TEXT_END
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(tokenizer: Tokenizer, directory: epath.Path) -> None:
    """Writes the tokenizer's files, also to a remote directory, which transformers does not support."""
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        _copy_files(epath.Path(local), directory)


def is_saved(directory: epath.Path) -> bool:
    """Whether a directory holds a completely saved tokenizer."""
    return (directory / LAST_FILE).exists()


def load(directory: epath.Path) -> Tokenizer:
    """Reads a saved tokenizer; raises `UserError` if there is none, or it is not a Qwen2-VL tokenizer."""
    if not is_saved(directory):
        raise UserError(f"no tokenizer in {directory}: {LAST_FILE} is missing")
    check_files(directory)
    with parsing(f"the tokenizer in {directory}"), local_files(directory) as local:
        tokenizer = transformers.AutoTokenizer.from_pretrained(local)
        tokenizer("a text")  # reads settings that loading does not
    if (directory / PROCESSOR_TEMPLATE).exists():  # where older checkpoints have the template with images
        tokenizer.chat_template = read_json(directory / PROCESSOR_TEMPLATE).get("chat_template")
    known = tokenizer.get_vocab()
    missing = [token for token in (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD) if token not in known]
    if len(known) <= len(tokenizer.get_added_vocab()):
        missing.append("a vocabulary (tokenizer.json, or vocab.json and merges.txt)")
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.chat_template.strip():
        missing.append("a chat template")
    elif not missing:
        _check_template(tokenizer)
    if missing:
        raise UserError(f"the tokenizer in {directory} lacks {', '.join(missing)}; expected Qwen2-VL's")
    return tokenizer


def _check_template(tokenizer: Tokenizer) -> None:
    """Raises `UserError` unless the chat template shows an image and a text, each of them once."""
    check_unicode([tokenizer.chat_template])
    name, image, text = tokenizer.name_or_path, VISION_START + IMAGE_PAD + VISION_END, "text of a question"
    if tokenizer.chat_template != CHAT_TEMPLATE:
        check_limits(tokenizer.chat_template, name)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    with parsing(f"the chat template of {name}"):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    for what, shown in (("an image", image), ("a text", text)):
        if (count := rendered.count(shown)) != 1:
            raise UserError(f"the chat template of {name} shows {what} {count} times, not once; expected Qwen2-VL's")


# ---- Special tokens in texts. Only the chat template's are special; those that a user's text spells out are text.


def check_unicode(texts: Iterable[str]) -> None:
    """Raises `UserError` for a text with lone surrogates, which stand for no character and have no UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text.encode(errors="backslashreplace")[:100].decode()
            raise UserError(f"the text {shown!r} is no Unicode: {error.reason}") from error


def has_special_tokens(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text spells out a special token."""
    return bool(_special_tokens(tokenizer).search(text))


def mark_special_tokens(tokenizer: Tokenizer, parts: Sequence[str | None], mark: str) -> tuple[str | None, ...]:
    """Inserts a mark into each special token that a turn's texts spell out, so that it is none; None: an image.

    Several texts may spell out one together. They are marked after their first visible character and before their last,
    because templates may strip white space.
    """
    special = _special_tokens(tokenizer)
    marked = [part and special.sub(lambda token: token[0][0] + mark + token[0][1:], part) for part in parts]
    if sum(part is not None for part in parts) > 1:
        marked = [part and re.sub(r"\A\s*\S", rf"\g<0>{mark}", part) for part in marked]
        marked = [part and re.sub(r"\S\s*\Z", rf"{mark}\g<0>", part) for part in marked]
    return tuple(marked)


def tokenize_marked(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """Tokenises a text in which special tokens are special, unless they are marked."""
    if mark not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = []
    for i, part in enumerate(_special_tokens(tokenizer, "({})").split(text)):
        if i % 2:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids.extend(tokenize_plain(tokenizer, part.replace(mark, "")))
    return ids


def tokenize_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenises a text in which no special token is special."""
    with COPYING:
        plain = _without_special_tokens(tokenizer)
    return plain(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=16)
def _without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy: whether texts have special tokens is a state of the tokenizer, which other threads may be using."""
    copied = copy.deepcopy(tokenizer)
    copied.split_special_tokens = True
    return copied


def unused_character(texts: Sequence[str]) -> str:
    """A character for private use that none of the texts has; raises `UserError` if they have all."""
    used = set().union(*texts)
    for code in itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)):
        if chr(code) not in used:
            return chr(code)
    raise UserError("the texts have all characters for private use")


@functools.lru_cache(maxsize=16)
def _special_tokens(tokenizer: Tokenizer, form: str = "{}") -> re.Pattern[str]:
    """Matches any special token, the longest first."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile(form.format("|".join(map(re.escape, tokens))))


def _copy_files(source: epath.Path, target: epath.Path) -> None:
    """Copies a tokenizer's files; the file that `is_saved` checks for comes last."""
    files = [file for file in source.iterdir() if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == LAST_FILE):
        write_atomically(target / file.name, file.read_bytes())
