"""The engine against `ImageSampler` and `Answerer`: whoever shares a batch, results are those of each request alone."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.flow.schedule import Sampling
from lattejax.models import latte_flow, qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.pixels import PixelConfig
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.conversations import Conversations
from lattejax.sampling.images import ImageSampler
from lattejax.sampling.padding import padded
from lattejax.serving.chats import Chats
from lattejax.serving.drawing import Drawer, State, begin_rows
from lattejax.serving.drawings import Drawings
from lattejax.serving.engine import Engine, Full, Stopping
from lattejax.serving.jobs import Chat, Done, Drawing, Failed, Picture, Progress, Token
from lattejax.serving.metrics import Metrics
from lattejax.serving.steps import edges, evaluations
from tests.helpers import compilations, encoder_for, randomize, tiny_config

CONFIGS = {variant: tiny_config(model__variant=variant) for variant in latte_flow.VARIANTS}
CONFIGS["uneven"] = tiny_config(model__group_sizes=(1, 3), model__interval_edges=(0.0, 0.3, 1.0))
CONFIGS["own ends"] = tiny_config(model__shared_ends=False)
ENCODER = encoder_for(CONFIGS["couple"])


@functools.cache
def sampler(variant: str = "couple") -> ImageSampler:
    model = CONFIGS[variant].model_config
    params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
    return ImageSampler(model, Autoencoder(PixelConfig()), ENCODER, latte_flow.unstack(randomize(params, 2, 0.1)), {})


def make_engine(variant: str = "couple", most_waiting: int = 8, wait_seconds: float = 60, compiled: bool = False):
    drawer = Drawer(sampler(variant), slots=6, context_slots=5, most_rows=8, most_tokens=64)
    answerer = Answerer(CONFIGS[variant].model_config.vlm, sampler(variant).vlm, ENCODER)
    conversations = Conversations(answerer, rows=2, capacity=100, chunks=(32,))
    if compiled:
        conversations.compile()
        drawer.compile()
    else:
        drawer.read(ENCODER.unconditional(), 0)
    metrics = Metrics()
    return Engine(Drawings(drawer, 5, metrics), Chats(conversations, metrics), most_waiting, wait_seconds)


class Told(list):
    """What a job was told."""

    @property
    def is_over(self) -> bool:
        return bool(self) and isinstance(self[-1], Done | Failed)

    def pictures(self, preview: int | None = None) -> np.ndarray:
        found = {one.index: one for one in self if isinstance(one, Picture) and one.preview == preview}
        return np.stack([np.asarray(found[index].pixels)[found[index].place] for index in sorted(found)])

    @property
    def tokens(self) -> list[int]:
        return [one.token for one in self if isinstance(one, Token)]


def drawing(text="a handwritten seven", sampling=Sampling(5), count=1, seed=0, negative=None, **settings) -> Drawing:  # noqa: B008
    negative = negative and ENCODER.drawing(negative)
    return Drawing(ENCODER.drawing(text), Told().append, negative, sampling, count, seed, **settings)


def told(job) -> Told:
    return job.tell.__self__


def chat(text="Is this a seven?", decoding=Decoding(6)) -> Chat:  # noqa: B008
    return Chat(ENCODER.question(text), Told().append, decoding)


def expected(job: Drawing, variant: str = "couple") -> np.ndarray:
    negative = [] if job.negative is None else [job.negative]
    one = dict(images_per_prompt=job.count, batch_size=job.count, seed=job.seed)
    return sampler(variant)([job.prompt], job.sampling, negative=negative, **one)


def run(engine: Engine, jobs: list, every: int = 1, most: int = 500) -> None:
    """Runs turns until all jobs are over; a job joins every so many turns."""
    waiting = list(jobs)
    for turn in range(most):
        if waiting and turn % every == 0:
            engine.submit(waiting.pop(0))
        engine.turn() if engine._drawings or engine._chats or engine._waiting else None
        if not waiting and all(told(job).is_over for job in jobs):
            return
    raise AssertionError("some jobs are not over")


MIXED = [
    dict(sampling=Sampling(5), count=2),
    dict(text="a two", sampling=Sampling(4, guidance=1.0), seed=3),
    dict(sampling=Sampling(7, guidance=3.0, guidance_interval=(0.2, 0.6)), seed=2**32 - 1),
    dict(text="three", sampling=Sampling(4, solver="heun"), count=3),
    dict(sampling=Sampling(3, solver="heun", shift=2.0, guidance=1.5), negative="a two"),
    dict(text="a four", sampling=Sampling(5, shift=0.4), seed=9, count=2),
    dict(sampling=Sampling(1, guidance=4.0)),
]


@pytest.mark.parametrize("variant, every", [("couple", 1), ("own ends", 3), ("blend", 2), ("uneven", 2)])
def test_pictures_are_those_of_sample_whoever_shares_the_batch(variant, every):
    engine, jobs = make_engine(variant), [drawing(**settings) for settings in MIXED]
    chats = [chat(), chat("Which digit?", Decoding(5, 1.0, seed=4))]
    run(engine, [jobs[0], chats[0], *jobs[1:4], chats[1], *jobs[4:]], every)
    for job in jobs:
        assert np.abs(told(job).pictures().astype(int) - expected(job, variant)).max() <= 1
    answerer = Answerer(CONFIGS[variant].model_config.vlm, sampler(variant).vlm, ENCODER)
    for job in chats:
        tokens = [int(token[0]) for token in answerer.tokens(padded(ENCODER, [job.prompt]), job.decoding)]
        assert told(job).tokens == tokens


def test_requests_share_steps():
    """Four requests, each a turn later than the one before, take 20 steps by themselves; rows at other steps of their
    group join in."""
    steps = []
    for count in (1, 4):
        engine = make_engine()
        run(engine, [drawing(seed=seed) for seed in range(count)])
        steps.append(engine._drawings._clock)
    assert steps[0] == 5 and steps[1] <= 12


def test_a_preview_is_what_the_flow_heads_for():
    """At a group's edge: what the velocity of the last step there leads to; the picture follows it. Progress names the
    group of each step."""
    job = drawing(sampling=Sampling(6), count=2, previews=3, wants_progress=True)
    run(make_engine(), [job])
    progress = [(one.group, one.step, one.steps) for one in told(job) if isinstance(one, Progress)]
    assert progress == [(int(step > 3), step, 6) for step in range(1, 7)]
    previews = told(job).pictures(0)
    assert previews.shape == (2, 8, 8, 3) and np.any(previews != told(job).pictures())
    kinds = [type(one).__name__ for one in told(job)]
    assert kinds == ["Progress"] * 3 + ["Picture"] * 2 + ["Progress"] * 3 + ["Picture"] * 2 + ["Done"]

    # Two steps of 0.5: the only one of the first group leads straight to its preview, which one step would draw.
    job, one_step = drawing(sampling=Sampling(2), previews=1), drawing(sampling=Sampling(1))
    run(make_engine(), [job])
    assert np.abs(told(job).pictures(0).astype(int) - expected(one_step)).max() <= 1


def test_previews_are_at_the_edges_and_evenly_spread():
    intervals = tiny_config(model__num_groups=4).model_config.generation.intervals
    steps = evaluations(intervals, Sampling(8))
    assert [edges(steps, most) for most in range(4)] == [(), (3,), (1, 5), (1, 3, 5)]
    assert edges(evaluations(intervals, Sampling(1)), 3) == ()


def test_a_prompt_is_read_once_for_many_drawings(monkeypatch):
    engine, read = make_engine(), []
    drawer = engine._drawings._drawer
    original = drawer.read
    monkeypatch.setattr(drawer, "read", lambda prompt, slot: (read.append(slot), original(prompt, slot)))
    jobs = [drawing(seed=seed) for seed in range(3)] + [drawing(text) for text in ("a", "b", "c", "d", "e")]
    run(engine, [*jobs, last := drawing(seed=7)])
    assert len(read) == 7, "the first prompt's context gave way to those of five others"
    assert np.abs(told(last).pictures().astype(int) - expected(last)).max() <= 1


def test_a_client_that_is_gone_leaves_at_the_next_step_and_others_go_on():
    engine = make_engine()
    stays, goes, talks = drawing(sampling=Sampling(20)), drawing(sampling=Sampling(200), count=3), chat()
    for job in (stays, goes, talks):
        engine.submit(job)
        engine.turn()
    goes.cancel(), talks.cancel()
    engine.turn()
    assert engine._drawings.jobs == [stays] and not engine._chats
    assert len(engine._drawings._free) == 5
    for _ in range(200):
        engine.turn() if engine._drawings else None
    assert np.abs(told(stays).pictures().astype(int) - expected(stays)).max() <= 1


def test_the_queue_is_bounded_in_length_and_time():
    engine = make_engine(most_waiting=3, wait_seconds=0.05)
    jobs = [drawing(count=6, sampling=Sampling(300)) for _ in range(4)]
    engine.submit(jobs[0])
    engine.turn()
    for job in jobs[1:]:
        engine.submit(job)
    with pytest.raises(Full, match="the queue is full") as full:
        engine.submit(drawing())
    assert 1 <= full.value.seconds <= 60
    time.sleep(0.06)
    engine.turn()
    assert all(told(job)[-1] == Failed("late") for job in jobs[1:]) and not told(jobs[0])


def test_stopping_completes_what_runs_and_then_fails_the_rest():
    engine = make_engine(compiled=False)
    engine.start()
    quick, endless = drawing(sampling=Sampling(3)), drawing(sampling=Sampling(10_000))
    engine.submit(quick), engine.submit(endless)
    while not told(quick):
        time.sleep(0.01)
    engine.stop(0.5)
    assert isinstance(told(quick)[-1], Done) and told(endless)[-1] == Failed("stopping")
    assert not engine.is_running
    with pytest.raises(Stopping):
        engine.submit(drawing())


def test_an_error_on_the_device_fails_every_job(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine._drawings._drawer, "step", lambda *_: 1 / 0)
    jobs = [drawing(), drawing()]
    for job in jobs:
        engine.submit(job)
    engine.start()
    engine._thread.join(20)
    assert all(told(job)[-1].reason.startswith("ZeroDivisionError") for job in jobs)
    assert isinstance(engine.error, ZeroDivisionError) and not engine.is_running


def test_a_job_that_is_refused_fails_alone():
    engine = make_engine()
    free = engine._drawings._contexts.available()
    jobs = [drawing("seven " * 100, negative="a two"), drawing("a", negative="two " * 100), chat("seven " * 200)]
    for job in jobs:
        engine.submit(job)
        engine.turn()
    assert [(told(job)[-1].reason.split(" has ")[0], told(job)[-1].is_refusal) for job in jobs] == [
        ("the prompt", True),
        ("the prompt", True),
        ("the conversation", True),
    ]
    assert engine.counts().waiting == 0 and engine._drawings._contexts.available() == free


def test_nothing_is_compiled_while_serving():
    engine = make_engine("uneven", compiled=True)
    jobs = [drawing(**settings) for settings in MIXED] + [chat(), chat("Which digit?", Decoding(5, 1.0, seed=4))]
    jobs += [drawing(previews=2, count=5), chat("three " * 15)]
    with compilations() as count:
        run(engine, jobs, 2)
    assert count() == 0
    assert all(isinstance(told(job)[-1], Done) for job in jobs)


def test_a_row_begins_without_what_was_there():
    """A NaN would stay, even times 0."""
    state = State(*np.full((2, 3, 4, 4, 4), np.nan, np.float32))
    begun = begin_rows(state, np.array([0, 2]), np.uint32(0), np.arange(2))
    for array in begun:
        assert np.isfinite(array[jnp.array([0, 2])]).all() and np.isnan(array[1]).all()


def test_memory_of_the_weights_is_shared():
    """Serving adds tables, but no second copy of a weight."""
    drawer = Drawer(sampler(), slots=2, context_slots=2, most_rows=2, most_tokens=64)
    own = {id(leaf) for group in drawer._groups for leaf in jax.tree.leaves(group)}
    assert own <= {id(leaf) for leaf in jax.tree.leaves(sampler().pathway)}
