"""Answers questions about images, streaming the answer as it is decoded:

python -m lattejax.chat --weights=weights/qwen2_vl_2b --image=photo.jpg --question="What is in the picture?"
python -m lattejax.chat --workdir=runs/digits --image=digit.png --question="Which digit is this?"

--weights is a directory that lattejax.convert wrote, --workdir a run's directory. Without --question, a terminal starts
a chat of several turns; otherwise the question is read from standard input.
"""

import dataclasses
import signal
import sys
from collections.abc import Iterator

from absl import flags

from lattejax import cli
from lattejax.configuration import DTYPES
from lattejax.data.images import open_image
from lattejax.data.prompts import ReadableImage, Turn
from lattejax.errors import UserError, one_line
from lattejax.ranges import Seed
from lattejax.runs.run import Run
from lattejax.sampling.answers import Answerer, Decoding, MaxTokens, Temperature, TopP
from lattejax.sampling.conversations import Conversations
from lattejax.sampling.streams import TextStream

WEIGHTS = cli.define_path("weights", None, "Converted weights: a directory written by lattejax.convert.")
WORKDIR = cli.define_path("workdir", None, "A run's directory, an export, or hf://owner/name.")
IMAGE = cli.define_paths("image", "An image file to ask about; repeatable and optional.")
QUESTION = flags.DEFINE_string("question", None, "The question; without it, a chat, or standard input.")
SYSTEM = flags.DEFINE_string("system", None, "The system prompt; default: the chat template's.")
MAX_TOKENS = cli.define_number("max_tokens", 256, "Maximum length of an answer, in tokens.", MaxTokens)
TEMPERATURE = cli.define_number("temperature", 0.0, "Sampling temperature; 0 is greedy decoding.", Temperature)
TOP_P = cli.define_number("top_p", 1.0, "Nucleus sampling: the total probability of the tokens to sample from.", TopP)
SEED = cli.define_number("seed", 0, "Seed of token sampling.", Seed)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", DTYPES, "Dtype of --weights and the computation; a run uses its config's."
)
MESH = flags.DEFINE_list("mesh", None, "Shards --weights over all devices, e.g. fsdp=2,tensor=-1; default: one device.")

HELP = "Type a question. /image FILE adds an image to the next question, /new starts a new chat, Ctrl-C stops an \
answer, Ctrl-D quits."


def main() -> None:
    try:
        decoding = Decoding(MAX_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    on_terminal = QUESTION.value is None and sys.stdin.isatty()
    question = "" if on_terminal else read_question()
    pictures = [open_image(path) for path in IMAGE.value]
    answerer = load_answerer()
    images = [answerer.encoder.read_image(picture) for picture in pictures]
    if on_terminal:
        converse(answerer, decoding, images)
        return
    prompt = answerer.encoder.chat([*opening(), Turn("user", (*images, question))])
    for piece in answerer.stream(prompt, decoding):
        print(piece, end="", flush=True)
    print()


def read_question() -> str:
    try:
        piped = QUESTION.value is None
        question = sys.stdin.buffer.read().decode().removesuffix("\n") if piped else QUESTION.value
    except UnicodeDecodeError as error:
        raise UserError(f"the question on standard input is not UTF-8: {error}") from error
    if not question.strip():
        raise UserError("the question is empty; give --question, or write it to standard input")
    return question


def load_answerer() -> Answerer:
    if (WEIGHTS.value is None) == (WORKDIR.value is None):
        raise UserError("give either --weights or --workdir")
    if WEIGHTS.value is not None:
        return Answerer.load(WEIGHTS.value, DTYPE.value, cli.read_mesh(MESH.value) if MESH.value else None)
    if MESH.value:
        raise UserError("--mesh is for --weights; a run is read on one device")
    return Answerer.of(Run.open(WORKDIR.value))


def opening() -> list[Turn]:
    return [] if SYSTEM.value is None else [Turn("system", SYSTEM.value)]


def converse(answerer: Answerer, decoding: Decoding, images: list[ReadableImage]) -> None:
    """Runs a chat: each answer is conditioned on all earlier turns, which are not read again. Bad input does not end
    the chat."""
    print(HELP)
    conversations = Conversations(answerer)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C stops an answer, not the chat
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that cannot be decoded is refused with its text
    turns, asked = opening(), 0
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/new":
                turns, images = opening(), []
            elif command == "/image":
                images = [*images, answerer.encoder.read_image(open_image(rest.strip()))]
            elif command.startswith("/"):
                print(HELP)
            elif command:
                question = [*turns, Turn("user", (*images, line))]
                seed = (decoding.seed + asked) % 2**32  # a different one for each answer
                drawn = dataclasses.replace(decoding, seed=seed)
                answer = print_stream(stream(conversations, question, drawn))
                turns, images, asked = [*question, Turn("assistant", answer)], [], asked + 1
        except (UserError, ImportError) as error:  # a package for remote images is missing
            print(one_line(f"error: {error}"))
        except KeyboardInterrupt:
            print()


def stream(conversations: Conversations, turns: list[Turn], decoding: Decoding) -> Iterator[str]:
    """Yields the answer in pieces of text."""
    encoder = conversations.answerer.encoder
    text = TextStream(encoder.tokenizer)
    yield from map(text.add, conversations.tokens(encoder.chat(turns), decoding))
    yield text.end()


def print_stream(pieces: Iterator[str]) -> str:
    """Prints an answer as it is decoded, until it ends or Ctrl-C; returns the text printed."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        pass
    print()
    return text


if __name__ == "__main__":
    cli.run(main)
