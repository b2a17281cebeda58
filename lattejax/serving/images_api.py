"""POST /v1/images/generations, with the fields of OpenAI's API and those that other servers have added."""

import dataclasses
import functools
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lattejax.data.prompts import EncodedPrompt
from lattejax.flow.schedule import Sampling, Shift
from lattejax.flow.solvers import SOLVERS
from lattejax.ranges import Range, Seed
from lattejax.serving import pictures
from lattejax.serving.errors import ApiError
from lattejax.serving.events import event, stream
from lattejax.serving.fields import Fields, read_fields
from lattejax.serving.jobs import Drawing, Picture, Progress
from lattejax.serving.limits import CHARACTERS_PER_TOKEN, Limits
from lattejax.serving.service import Listener, Service, now

ENDPOINT = "images"
WITHOUT_EFFECT = ("quality", "style", "moderation", "user")  # of OpenAI's models


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request for pictures."""

    prompt: str
    negative: str
    sampling: Sampling
    count: int
    seed: int
    form: str
    quality: int
    is_streamed: bool
    previews: int
    wants_progress: bool


def parse(fields: Fields, limits: Limits, image_size: int, usual: Sampling) -> Wanted:
    """Takes all fields of a request; raises `ApiError` for a bad one. `usual` has what it does not say of sampling."""
    size = f"{image_size}x{image_size}"
    prompt, negative = fields.need("prompt", str), fields.take("negative_prompt", str, "")
    for name, text in (("prompt", prompt), ("negative_prompt", negative)):
        if len(text) > (most := CHARACTERS_PER_TOKEN * limits.prompt_tokens):
            raise fields.error(name, f"has {len(text):,} characters, more than {most:,}", "string_above_max_length")
    fields.choice("size", ("auto", size))
    fields.choice("response_format", ("b64_json",))
    fields.choice("background", ("auto", "opaque"))
    form = fields.choice("output_format", pictures.FORMATS, "png")
    quality = fields.number("output_compression", Annotated[int, Range(0, 100)], 100)
    is_streamed = fields.take("stream", bool, False)
    wanted = Wanted(
        prompt=prompt,
        negative=negative,
        sampling=parse_sampling(fields, limits, usual, bool(negative)),
        count=fields.number("n", Annotated[int, Range(1, 64)], 1, limits.images_per_request),
        seed=fields.number("seed", Seed, secrets.randbelow(2**32)),
        form=form,
        quality=quality,
        is_streamed=is_streamed,
        previews=fields.number("partial_images", Annotated[int, Range(0, 3)], 0),
        wants_progress=fields.take("progress", bool, False),
    )
    for name, given in (("partial_images", wanted.previews), ("progress", wanted.wants_progress)):
        if given and not is_streamed:
            raise fields.error(name, "needs stream: true")
    fields.ignore(*WITHOUT_EFFECT)
    fields.end()
    return wanted


def parse_sampling(fields: Fields, limits: Limits, usual: Sampling, has_negative: bool) -> Sampling:
    """The steps. Others' `flow_shift` counts from the image to the noise, so it is 1 / our `shift`."""
    usual_steps = min(usual.num_steps, limits.steps)
    steps = fields.number("num_inference_steps", Annotated[int, Range(1, 10_000)], usual_steps, limits.steps)
    guidance = fields.number("guidance_scale", Annotated[float, Range(0, 20)], usual.guidance)
    if has_negative and guidance == 1:
        raise fields.error("negative_prompt", "needs guidance: a guidance_scale other than 1")
    shift, theirs = fields.number("shift", Shift), fields.number("flow_shift", Shift)
    if shift is not None and theirs is not None:
        raise fields.error("shift", "and flow_shift are the same setting; give one")
    shift = usual.shift if shift is None and theirs is None else 1 / theirs if shift is None else shift
    interval = fields.take("guidance_interval", list, list(usual.guidance_interval))
    solver = fields.choice("solver", list(SOLVERS), usual.solver)
    if len(interval) != 2 or any(type(one) not in (int, float) for one in interval):
        raise fields.error("guidance_interval", "must be two numbers", "invalid_type")
    try:
        return Sampling(steps, float(guidance), (float(interval[0]), float(interval[1])), solver, float(shift))
    except (ValueError, OverflowError) as error:
        raise fields.error("guidance_interval", f"is refused: {error}", "out_of_range") from None


async def generate(service: Service, request: Request) -> Response:
    """Draws pictures of one prompt."""
    fields = await read_fields(request, service.limits)
    service.check_model(fields.take("model", str))
    wanted = parse(fields, service.limits, service.model.image_size, service.model.sampling)
    prompt, negative = await service.prepare(request, encode, service, wanted)
    request.state.details = f"n={wanted.count} steps={wanted.sampling.num_steps} seed={wanted.seed}"
    job = functools.partial(make_job, wanted, prompt, negative)
    listener = service.submit(request, job)
    tokens = Counted(len(prompt.input_ids), wanted.count * service.model.image_tokens)
    common = {
        "size": f"{service.model.image_size}x{service.model.image_size}",
        "quality": "auto",
        "background": "opaque",
        "output_format": wanted.form,
    }
    if wanted.is_streamed:
        return stream(streamed(service, request, listener, wanted, common, tokens))
    found: dict[int, str] = {}
    async for told in listener.events():
        if isinstance(told, Picture):
            found[told.index] = await service.develop(as_file, told, wanted)
            first(service, request)
    data = [{"b64_json": found[index]} for index in range(wanted.count)]
    return JSONResponse({"created": now(), "data": data, **common, "seed": wanted.seed, "usage": tokens.usage})


def encode(service: Service, wanted: Wanted) -> tuple[EncodedPrompt, EncodedPrompt | None]:
    encoder = service.model.encoder
    prompt, negative = encoder.drawing(wanted.prompt), encoder.drawing(wanted.negative) if wanted.negative else None
    for name, each in (("prompt", prompt), ("negative_prompt", negative)):
        if each is not None and (length := len(each.input_ids)) > (most := service.limits.prompt_tokens):
            text = f"{name} has {length} tokens, with those of the chat template; at most {most} can be drawn"
            raise ApiError(400, text, name, "context_length_exceeded")
    return prompt, negative


def make_job(wanted: Wanted, prompt: EncodedPrompt, negative: EncodedPrompt | None, tell: Any) -> Drawing:
    settings = dict(previews=wanted.previews, wants_progress=wanted.wants_progress)
    return Drawing(prompt, tell, negative, wanted.sampling, wanted.count, wanted.seed, **settings)


@dataclasses.dataclass(frozen=True)
class Counted:
    """How many tokens a request has."""

    prompt: int
    images: int

    @property
    def usage(self) -> dict[str, Any]:
        details = {"text_tokens": self.prompt, "image_tokens": 0}
        total = self.prompt + self.images
        return {
            "input_tokens": self.prompt,
            "output_tokens": self.images,
            "total_tokens": total,
            "input_tokens_details": details,
        }


def as_file(picture: Picture, wanted: Wanted) -> str:
    return pictures.encode(np.asarray(picture.pixels)[picture.place], wanted.form, wanted.quality)


def first(service: Service, request: Request) -> None:
    """Notes when the first picture is there."""
    if not hasattr(request.state, "has_first"):
        request.state.has_first = True
        service.metrics.first(ENDPOINT, request.state.seconds())


async def streamed(
    service: Service,
    request: Request,
    listener: Listener,
    wanted: Wanted,
    common: dict[str, Any],
    tokens: Counted,
) -> AsyncIterator[bytes]:
    """Events: previews, complete pictures, and if they are wanted, each step. `index` tells several pictures apart."""
    async for told in listener.events():
        if isinstance(told, Progress):
            kind = "image_generation.progress"
            yield event({"type": kind, **dataclasses.asdict(told)}, kind)
        elif isinstance(told, Picture):
            values = {"b64_json": await service.develop(as_file, told, wanted), "created_at": now(), **common}
            first(service, request)
            kind = "image_generation.completed" if told.preview is None else "image_generation.partial_image"
            if told.preview is None:
                values |= {"usage": tokens.usage, "seed": wanted.seed}
            else:
                values["partial_image_index"] = told.preview
            yield event({"type": kind, "index": told.index, **values}, kind)
