"""The tokenizer: Qwen2's byte-level BPE with Qwen2-VL's special tokens and chat template.

Either loaded from a directory, or trained on a data set's own texts when a small model is to be trained from nothing.
"""

import os
import tempfile
from collections.abc import Iterable

# transformers serves tokenizers and image processors here, and announces that PyTorch is missing unless asked not to.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from etils import epath
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from lattejax.errors import UserError

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


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a tokenizer of at most `vocab_size` entries, special tokens included."""
    texts = [*texts, "system\nYou are a helpful assistant.\n", "user\n", "assistant\n"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = TURN_END, TEXT_END
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(tokenizer: PreTrainedTokenizerBase, directory: epath.Path) -> None:
    """Writes the tokenizer's files, also to a remote directory, which transformers cannot."""
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        copy_files(epath.Path(local), directory)


def load(directory: epath.Path) -> PreTrainedTokenizerBase:
    """Reads a saved tokenizer; raises `UserError` where there is none or it is not Qwen2-VL's kind."""
    if not (directory / "tokenizer_config.json").exists():
        raise UserError(f"no tokenizer in {directory}: tokenizer_config.json is missing")
    with tempfile.TemporaryDirectory() as local:
        copy_files(directory, epath.Path(local))
        tokenizer = AutoTokenizer.from_pretrained(local)
    missing = [token for token in (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD) if not is_known(tokenizer, token)]
    if missing or not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {directory} lacks {', '.join(missing) or 'a chat template'}; expected Qwen2-VL's")
    return tokenizer


def is_known(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return token in tokenizer.get_vocab()


def copy_files(source: epath.Path, target: epath.Path) -> None:
    """Copies the files, not the folders, of one directory to another."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
