"""The models of lmms-eval 0.7.3: a run of lattejax, or a converted VLM, that answers, scores answers, or draws."""

import dataclasses
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from lattejax import cli
from lattejax.data.prompts import EncodedPrompt, Turn
from lattejax.data.tokenizer import tokenize_plain
from lattejax.errors import UserError
from lattejax.files import check_writable, is_remote, resolve_path, write_with
from lattejax.flow.schedule import Sampling
from lattejax.harness.documents import drawing, user_turn
from lattejax.harness.likelihood import Likelihood
from lattejax.harness.opening import limit_pixels, open_model
from lattejax.harness.options import Options, read_options
from lattejax.harness.requests import Asked, ChatRequests, SimpleRequests
from lattejax.parallel import hosts
from lattejax.sampling.answers import Decoding
from lattejax.sampling.padding import padded
from lattejax.sampling.streams import TextStream

MODES = ("understanding", "generation")
WINDOW = 4  # batches whose prompts, with their images, are held in memory; those of similar size share a batch
MOST_DOCUMENTS = 1 << 20  # of a task: a document's n-th drawing has the noise of sample n · 2²⁰ + document


class LatteJax(lmms):
    """`lmms_eval --model lattejax --model_args workdir=…`: a context, and images before it.

    Args:
      workdir: a run, an export, or converted weights.
      checkpoint: a run's, by its step, or "best"; empty: the latest.
      mode: "understanding": `generate_until` answers. "generation": it draws, and returns JSON with the picture's path.
      max_new_tokens: the longest answer, in tokens, if the task does not say.
      min_pixels: images with fewer pixels are enlarged; None: as the model's processor does.
      max_pixels: images with more pixels are reduced.
      system_prompt: the system turn; None: the chat template's.
      dtype: of converted weights and their computation; empty: bfloat16.
      output_image_dir: pictures are written to a directory in it, which is named by guidance scale, steps and seed.
      guidance: the guidance scale of drawings; None: the run's own.
      steps: their sampling steps; None: the run's own.
      seed: of their noise, and of tokens that are sampled.
      autoencoder: the run's, if it has moved.
      batch_size: requests that are answered, scored or drawn together; lmms-eval passes --batch_size.
      max_batch_size: lmms-eval's flag, which is refused.
      device: lmms-eval's flag, which is refused.

    Raises:
      UserError: an argument does not fit, or `workdir` cannot be read.
    """

    is_simple = True
    requests_as = SimpleRequests

    def __init__(
        self,
        workdir: str,
        checkpoint: str | int = "",
        mode: str = "understanding",
        max_new_tokens: int = 256,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        dtype: str = "",
        output_image_dir: str = "",
        guidance: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        autoencoder: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        check_flags(str(batch_size), max_batch_size, device)
        if mode not in MODES:
            raise UserError(f"mode={mode!r} must be one of {', '.join(MODES)}")
        draws = mode == "generation"
        try:
            given = {} if steps is None else {"num_steps": steps}
            given |= {} if guidance is None else {"guidance": float(guidance)}
            Sampling(**given)  # raises for a bad one before anything is read
            self._decoding = Decoding(max_new_tokens, seed=seed)
        except ValueError as error:
            raise UserError(f"model_args: {error}") from error
        self._pictures = picture_directory(output_image_dir) if draws else None
        self._batch_size = int(batch_size)
        cli.enable_compilation_cache()
        opened = open_model(str(workdir), str(checkpoint), dtype, autoencoder, draws)
        self._answerer, self._sampler, usual = opened
        self._sampling = dataclasses.replace(usual, **given)
        if self._pictures is not None:  # other settings do not overwrite pictures that a task's log names
            self._pictures /= f"guidance_{self._sampling.guidance:g}_steps_{self._sampling.num_steps}_seed_{seed}"
        self._encoder = self._answerer.encoder
        limit_pixels(self._encoder, min_pixels, max_pixels)
        opening = () if system_prompt is None else (Turn("system", str(system_prompt)),)
        self._requests = self.requests_as(self._encoder, opening, self._document)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]  # which lmms-eval fills

    # ---- The interface

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, or in mode "generation" JSON: `{"text": "", "images": [path]}`."""
        asked = [self._requests.only(*request.args) for request in requests]
        return self._answer(asked) if self._sampler is None else self._draw(asked)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds, as of `generate_until`, a list for each request. A round is a prompt of its own,
        which the task makes of earlier answers."""
        said: list[list[str]] = [[] for _ in requests]
        states: list[Any] = [None] * len(requests)
        asked, number = {i: self._requests.first(*request.args) for i, request in enumerate(requests)}, 0
        answer_all = self._answer if self._sampler is None else functools.partial(self._draw, times=Counter())
        while asked:
            number += 1
            for i, answer in zip(asked, answer_all(list(asked.values())), strict=True):
                said[i].append(answer)
            rounds = {i: self._requests.following(requests[i].args, number, said[i], states[i]) for i in asked}
            for i, made in rounds.items():
                states[i] = made.state
                said[i] = said[i] if made.answers is None else list(made.answers)
            asked = {i: made.asked for i, made in rounds.items() if made.asked is not None}
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each answer: the natural logarithm of its probability given the context, without the stop token, and
        whether greedy decoding gives exactly this answer. See `Likelihood` for what lmms-eval scores."""
        question = functools.lru_cache(maxsize=1)(self._requests.question)  # choices share their images

        def encode(place: int) -> EncodedPrompt:
            context, answer, *of_document = requests[place].args
            if not of_document:
                return self._complete([*self._requests.opening, user_turn(self._encoder, context, None)], answer)
            if callable(answer):
                _, doc_id, task, split = of_document
                answer = answer(self._document(task, split, doc_id))
            return self._complete(question(context, *of_document), str(answer))

        scored: list[Any] = [None] * len(requests)
        for own, _, prompts in self._batches(range(len(requests)), encode, "scoring"):
            sums, likeliest = self._answerer.log_likelihoods(prompts, len(prompts))
            for i, log_probability, is_greedy in zip(own, sums, likeliest, strict=False):  # padding follows
                is_choice = not callable(requests[i].args[1])
                scored[i] = Likelihood(float(log_probability), bool(is_greedy), is_choice)
        return scored

    def _complete(self, turns: list[Turn], answer: str) -> EncodedPrompt:
        """A prompt with its answer, which is tokenised by itself, as it would be decoded."""
        asked = self._encoder.chat(turns)
        answer_ids = tokenize_plain(self._encoder.tokenizer, answer)
        ids = np.concatenate([asked.input_ids, np.array(answer_ids, asked.input_ids.dtype)])
        return EncodedPrompt(ids, asked.images, np.arange(len(ids)) >= len(asked.input_ids))

    # ---- Batches

    def _batches(
        self, places: Sequence[int], encode: Callable[[int], EncodedPrompt], what: str
    ) -> Iterator[tuple[list[int], list[int], list[EncodedPrompt]]]:
        """Yields the places in a batch; the same, with the last repeated so that all batches have the same number of
        rows; and the rows' prompts. Prompts of similar size are in one batch."""
        size = min(self._batch_size, len(places))
        with tqdm(total=len(places), desc=what, disable=None) as progress:
            for start in range(0, len(places), WINDOW * max(1, size)):
                prompts = {place: encode(place) for place in places[start : start + WINDOW * size]}
                ordered = sorted(prompts, key=lambda i: (len(prompts[i].images), len(prompts[i].input_ids)))
                for first in range(0, len(ordered), size):
                    own = ordered[first : first + size]
                    rows = own + own[-1:] * (size - len(own))
                    yield own, rows, [prompts[row] for row in rows]
                    progress.update(len(own))

    def _answer(self, asked: list[Asked]) -> list[str]:
        penalty = self._answerer.repetition_penalty
        options = [read_options(one.options, self._decoding, penalty) for one in asked]  # raises before any work
        answers = [""] * len(asked)

        def encode(place: int) -> EncodedPrompt:
            return self._encoder.chat(asked[place].turns())

        for alike in dict.fromkeys(options):
            places = [i for i, own in enumerate(options) if own == alike]
            for own, rows, prompts in self._batches(places, encode, "answering"):
                for i, text in zip(own, self._decode(prompts, alike, rows), strict=False):  # padding follows
                    answers[i] = text
        return answers

    def _decode(self, prompts: list[EncodedPrompt], options: Options, rows: list[int]) -> list[str]:
        """Returns one batch of answers, each until the first stop text."""
        streams = [TextStream(self._encoder.tokenizer, options.stop) for _ in prompts]
        texts, done = [""] * len(prompts), np.zeros(len(prompts), bool)
        for tokens in self._answerer.tokens(padded(self._encoder, prompts), options.decoding, rows):
            for row in np.flatnonzero(~done):
                texts[row] += streams[row].add(int(tokens[row]))
                done[row] = streams[row].stopped or tokens[row] in self._encoder.stop_tokens
            if done.all():
                break
        return [(text + stream.end()).strip() for text, stream in zip(texts, streams, strict=True)]

    def _draw(self, asked: list[Asked], times: Counter | None = None) -> list[str]:
        """Draws, with `times` each document was drawn before."""
        times = Counter() if times is None else times
        drawn, numbers = [""] * len(asked), []
        for one in asked:  # a document that is asked for again is drawn from other noise
            numbers.append(times[one.task, one.doc_id])
            times[one.task, one.doc_id] += 1

        def encode(place: int) -> EncodedPrompt:
            return self._encoder.drawing(*drawing(asked[place].turns()))

        for own, rows, prompts in self._batches(range(len(asked)), encode, "drawing"):
            contexts = self._sampler.read(prompts)
            empty = np.full(len(rows), contexts.mask.shape[0] - 1)
            samples = np.array([numbers[row] * MOST_DOCUMENTS + int(asked[row].doc_id) for row in rows])
            settings = np.arange(len(rows)), empty, samples, self._sampling, self._decoding.seed
            images = hosts.fetch(self._sampler.draw(contexts, *settings))
            for i, image in zip(own, images, strict=False):  # padding follows
                name = re.sub(r"[^\w.-]+", "_", f"{asked[i].task}_{asked[i].doc_id}_{numbers[i]}.png")
                picture = Image.fromarray(np.asarray(image))
                write_with(self._pictures / name, functools.partial(picture.save, format="PNG"))
                drawn[i] = json.dumps({"text": "", "images": [os.fspath(self._pictures / name)]})
        return drawn


class LatteJaxChat(LatteJax):
    """`--model lattejax_chat`: the messages that a task makes, with images between texts and earlier turns. lmms-eval
    has no likelihoods for chat models."""

    is_simple = False
    requests_as = ChatRequests


def check_flags(batch_size: str, max_batch_size: int | None, device: str | None) -> None:
    """Raises `UserError` for flags of lmms-eval that are not supported."""
    if not batch_size.isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
        raise UserError(f"--batch_size={batch_size} must be a number of requests, without --max_batch_size")
    if device is not None:
        raise UserError(f"--device={device} is PyTorch's; leave it out, and choose by the environment's JAX_PLATFORMS")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"lmms-eval runs in {processes} processes; lattejax is supported in one")


def picture_directory(path: str) -> Any:
    """Resolves a directory to write to; raises `UserError` unless that is possible."""
    if not path or is_remote(resolve_path(path)):
        raise UserError("mode=generation needs output_image_dir=…, a local directory to write pictures to")
    check_writable(resolve_path(path) / "picture.png", f"output_image_dir={path}")
    return resolve_path(path)
