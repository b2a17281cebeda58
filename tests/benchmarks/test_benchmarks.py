"""The benchmarks at a small size: the PyTorch versions agree with ours, which each benchmark checks before timing, and
the figures are consistent."""

import dataclasses

import jax
import numpy as np
import pytest

from lattejax.benchmarks import drawing, measuring, reading, speed, training
from lattejax.benchmarks.measuring import Work
from lattejax.errors import UserError
from tests.helpers import tiny_config

WORK = Work(batch_size=3, prompt_tokens=5, steps=4, guidance=3.0, new_tokens=6, repeats=1)
FIGURES = {"seconds", "limit", "share_of_limit"}


def config(**overrides):
    return tiny_config(model__patch_size=1, **overrides)


def check(result, baseline: str) -> None:
    assert set(result) >= FIGURES
    assert result["share_of_limit"] == pytest.approx(result["limit"] / result["seconds"])
    if baseline:
        assert result["ratio"] == pytest.approx(result["against_seconds"] / result["seconds"])
    if baseline == "torch" and "matmul_rate" in result:
        assert result["against_matmul_rate"] > 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_of_a_group_equal_pytorchs(guidance):
    work = Work(**(vars(WORK) | {"guidance": guidance}))
    check(drawing.sample(config(), work, "torch"), "torch")


@pytest.mark.parametrize("overrides", [{"train__unroll": True}, {"model__prediction": "x"}], ids=repr)
def test_a_training_step_equals_pytorchs(overrides):
    """Loss, norm of the gradient, and AdamW's update of the head; on enough rows that some flow times are close to 1,
    where predicting x has another target."""
    check(training.train(config(**overrides), dataclasses.replace(WORK, batch_size=24), "torch"), "torch")


def test_contexts_and_answers_equal_transformers():
    check(reading.context(config(), WORK, "torch"), "torch")
    found = reading.decode(config(), WORK, "torch")
    check(found, "torch")
    assert found["tokens_per_second"] == pytest.approx(3 / found["seconds"])


def test_vanilla_does_the_work_of_all_groups():
    """With the same weights; by FLOPs, because seconds mean little at this size."""
    check(drawing.sample(config(), WORK, "vanilla"), "vanilla")
    step = drawing.sample(config(), WORK, "torch")["model_flops"]
    vanilla = drawing.sample(config(model__num_groups=1), WORK, "torch")["model_flops"]
    assert vanilla == pytest.approx(2 * step, rel=0.1)  # of two groups


def test_outputs_that_differ_are_not_timed(monkeypatch):
    from lattejax.benchmarks.baselines import pathway

    plain = pathway.layer
    monkeypatch.setattr(pathway, "layer", lambda *inputs: (1.01 * plain(*inputs)[0], plain(*inputs)[1]))
    with pytest.raises(UserError, match="nothing was timed"):
        drawing.sample(config(), WORK, "torch")


def test_calls_alternate_and_the_first_round_does_not_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds.pop(0)
            return np.zeros(1)

        return run

    found = speed.alternate({"a": call("a", [100, 1, 5, 2]), "b": call("b", [100, 7, 7, 9])}, 3)
    assert order == ["a", "b"] * 4 and found == {"a": 2, "b": 7}


def test_random_weights_are_not_zero():
    for leaf in jax.tree.leaves(measuring.random_params(config())):
        assert np.count_nonzero(leaf) > 0.99 * leaf.size
