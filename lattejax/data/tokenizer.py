"""The tokenizer: Qwen2's byte-level BPE with Qwen2-VL's special tokens and chat template.

It is loaded from a directory, or, for a small model that is trained from scratch, trained on the data set's texts.
"""

import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from etils import epath, epy
from jinja2 import TemplateError

from lattejax.errors import UserError
from lattejax.files import local_files, read_json, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

with epy.lazy_imports():  # slow to import, and error paths do not need it
    import transformers

LAST_FILE = "tokenizer_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"

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
    try:
        with local_files(directory) as local:
            tokenizer = transformers.AutoTokenizer.from_pretrained(local)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from error
    if (directory / PROCESSOR_TEMPLATE).exists():  # where older checkpoints have the template with images
        tokenizer.chat_template = read_json(directory / PROCESSOR_TEMPLATE).get("chat_template")
    known = tokenizer.get_vocab()
    missing = [token for token in (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD) if token not in known]
    if len(known) <= len(tokenizer.get_added_vocab()):
        missing.append("a vocabulary (tokenizer.json, or vocab.json and merges.txt)")
    if not tokenizer.chat_template:
        missing.append("a chat template")
    elif not missing and not _shows_images(tokenizer):
        missing.append("a chat template with a place for images")
    if missing:
        raise UserError(f"the tokenizer in {directory} lacks {', '.join(missing)}; expected Qwen2-VL's")
    return tokenizer


def _shows_images(tokenizer: Tokenizer) -> bool:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    try:
        return VISION_START + IMAGE_PAD + VISION_END in tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} cannot be used: {error}") from error


def _copy_files(source: epath.Path, target: epath.Path) -> None:
    """Copies a tokenizer's files; the file that `is_saved` checks for comes last."""
    files = [file for file in source.iterdir() if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == LAST_FILE):
        write_atomically(target / file.name, file.read_bytes())
