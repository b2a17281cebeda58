"""A sweep: the errors before it trains, resuming after a kill, and its table."""

import csv
import json
import shutil
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lattejax.errors import UserError
from lattejax.interrupts import Interrupted
from lattejax.runs.run import Run
from lattejax.sweeps import comparison, definition, sweep
from lattejax.sweeps.definition import resolve_sweep
from lattejax.sweeps.sweep import load_samplers, run_sweep
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.weights import trees
from tests.helpers import assert_same_bits, config_file, randomize, tiny_dict

# The base of the sweep is Blend, whose pretrained VLM other runs start from before its layers are trained further.
TWO = (("base", {}), ("no_residual", {"model.residual_attention": "none", "model.variant": "couple"}))


def sweep_config(**overrides) -> ConfigDict:
    settings = dict(train__steps=2, pretrain__steps=1, eval__every=1, eval__batch_size=20, checkpoint__every=1)
    # A sweep that scores while it trains: tests/test_earlier.py.
    settings |= {f"eval__evaluators__{name}__at": "never" for name in ("samples", "digits")}
    base = tiny_dict(model__variant="blend", **settings)
    values = dict(base=base, seeds=(0, 1), variants=TWO, sample_steps=(2,)) | overrides
    return ConfigDict(values)


def test_a_mesh_that_does_not_fit_a_variant_is_refused_before_anything_is_trained(tmp_path):
    data = 2 * jax.device_count()
    variants = (*TWO, ("meshed", {"mesh.data": data}))
    with pytest.raises(UserError, match=rf"variant meshed: config\.mesh: .*data={data} .* does not fit"):
        run_sweep(resolve_sweep(sweep_config(variants=variants)), tmp_path, InterruptGuard())
    assert not (tmp_path / "vlm").exists()


def test_prompts_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path):
    pictures = {"data.prompts": "pictures", "train.share_contexts": False}
    with pytest.raises(UserError, match="more than the config's limit of 24"):
        run_sweep(resolve_sweep(sweep_config(variants=(*TWO, ("pictures", pictures)))), tmp_path, InterruptGuard())
    assert not (tmp_path / "vlm").exists()


def test_a_killed_sweep_resumes_elsewhere_without_retraining_and_ends_with_the_comparison(tmp_path, monkeypatch):
    trained, guard = [], InterruptGuard()

    def recorded(config, path, guard):
        trained.append(path.name)
        if len(trained) == 2:
            guard.signum = 15  # what the signal's handler sets
        return stages.train(config, path, guard)

    monkeypatch.setattr(sweep, "train", recorded)
    plan, tmp_path = resolve_sweep(sweep_config()), tmp_path / "sweep"
    with pytest.raises(Interrupted):
        run_sweep(plan, tmp_path, guard)
    assert trained == ["base_0", "no_residual_0"]
    assert not (tmp_path / "table.csv").exists()
    tmp_path = tmp_path.rename(tmp_path.parent / "moved")
    table = run_sweep(plan, tmp_path, InterruptGuard())
    assert trained == ["base_0", "no_residual_0", "no_residual_0", "base_1", "no_residual_1"]

    runs = {name: Run.open(tmp_path / "runs" / name) for name in ("base_0", "base_1", "no_residual_0", "no_residual_1")}
    assert [run.config.seed for run in runs.values()] == [0, 1, 0, 1]
    assert runs["no_residual_1"].config.model.residual_attention == "none"
    for run in runs.values():
        assert_same_bits(run.pretrained_vlm(), Run.open(tmp_path / "vlm").pretrained_vlm())
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["variant"] for row in rows] == ["base", "no_residual"] and {row["seeds"] for row in rows} == {"2"}
    scores = [json.loads((tmp_path / "runs" / f"base_{seed}" / "results.json").read_text()) for seed in (0, 1)]
    for name in ("frechet_guidance_2", "answer_accuracy"):
        values = [score[name] for score in scores]
        assert name == "answer_accuracy" or values[0] != values[1], "the seed decides"
        assert float(rows[0][name]) == pytest.approx(np.mean(values))
        assert float(rows[0][f"{name}_std"]) == pytest.approx(np.std(values, ddof=1))
    assert (tmp_path / "table.md").read_text() == table and "| base | 2 |" in table
    sampling = json.loads((tmp_path / "sampling.json").read_text())["draws"]
    assert [(r["variant"], r["steps"]) for r in sampling] == [(name, 2) for name, _ in TWO]
    assert all(r["seconds_per_image"] > 0 for r in sampling)
    for plot in ("score_by_training_steps", "score_by_sampling_time", "loss_by_group"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 10_000

    trained.clear()
    assert run_sweep(plan, tmp_path, InterruptGuard()) == table and not trained, "a finished sweep trains nothing"

    vlm = Run.open(tmp_path / "vlm")
    other = randomize(vlm.pretrained_vlm())
    vlm.workdir.vlm.rmtree()
    trees.save_weights(vlm.workdir.vlm, other)
    with pytest.raises(UserError, match=r"base_0 was trained from another VLM than .*vlm; remove it"):
        run_sweep(plan, tmp_path, InterruptGuard())


def test_scores_that_change_are_plotted_in_rows_of_three():
    names = ("drawn_colour", "drawn_shape", "drawn_size")
    own = [
        {"step": step, "held_out_loss": 1 / step, "reader_shape": 0.94} | {name: step / 10 for name in names}
        for step in (1, 2)
    ]
    axes = comparison._by_training_steps(["k4"], {("k4", 0): own}).axes
    assert [panel.get_title() for panel in axes] == ["held out loss", "drawn colour", "drawn shape", "drawn size"]
    assert [panel.get_subplotspec().rowspan.start for panel in axes] == [0, 0, 0, 1]
    np.testing.assert_array_equal(axes[2].lines[0].get_ydata(), [0.1, 0.2])


def test_a_sweep_resumes_without_the_run_that_its_vlm_came_from(tmp_path, monkeypatch):
    config, source = sweep_config(), tmp_path / "source"
    stages.pretrain(resolve_sweep(config).base, source, InterruptGuard())
    config.base.pretrain.update(init_from=str(source), steps=0)

    def interrupted(*arguments):
        raise Interrupted(15)

    monkeypatch.setattr(sweep, "train", interrupted)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run_sweep(resolve_sweep(config, tmp_path / "sweep"), tmp_path / "sweep", InterruptGuard())
        shutil.rmtree(source, ignore_errors=True)


@pytest.mark.parametrize("check", ["check_records", "check_lengths"])
def test_what_any_variants_run_would_refuse_is_refused_before_anything_is_trained(check, tmp_path, monkeypatch):
    def refuse(config, *arguments):
        if not config.train.share_contexts:
            raise UserError("it does not fit")

    monkeypatch.setattr(sweep, check, refuse)
    variants = (("own", {"train.share_contexts": False}), ("shared", {}))
    with pytest.raises(UserError, match="variant own: it does not fit"):
        run_sweep(resolve_sweep(sweep_config(variants=variants)), tmp_path, InterruptGuard())
    assert not (tmp_path / "vlm").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(variants=(("a", {"model.num_group": 2}),)), r"unknown config key model\.num_group; .*model\.num_groups"),
        (dict(variants=(("a", {"model.num_groups": 3}),)), "variant a: .*num_groups=3 does not divide"),
        (dict(variants=(("a", {"model.text.hidden_size": 64}),)), "variant a"),
        (dict(variants=(("a", {}), ("a", {}))), "different names"),
        (dict(variants=(("a/b", {}),)), "letters, digits and underscores"),
        (dict(variants=()), "different names"),
        (dict(variants=(("a", {"seed": 3}),)), "seed is the same for all runs"),
        (dict(variants=(("a", {"pretrain.steps": 3}),)), r"pretrain\.steps is the same for all runs"),
        (dict(variants=(("a", {"train.steps": 0}),)), r"train\.steps=0 trains nothing"),
        (dict(variants=(("a", {"eval.evaluators": {}}),)), "variant a: a sweep compares held-out losses"),
        (
            dict(variants=(("a", {"eval.evaluators.final_digits.at": "demand"}),)),
            "variant a: .* by one score, but has 0",
        ),
        (
            dict(variants=(("a", {"eval.batch_size": 16}),)),
            r"eval\.batch_size=16 must be a multiple of the 10 scored prompts",
        ),
        (
            dict(variants=(("a", {"eval.evaluators.digits.at": "end"}),)),
            "variant a: .* by one score, but has 2",
        ),
        (
            dict(variants=(("a", {"eval.evaluators.held_out_loss.every": 2, "train.steps": 3}),)),
            r"variant a: .*held_out_loss\.every=2 must divide train\.steps=3",
        ),
        (
            dict(variants=(("a", {"model.text.rope_theta": 1e3}),)),
            r"variant a has another VLM .*: model\.text\.rope_theta",
        ),
        (dict(sample_steps=(0,)), r"config\.sample_steps=\(0,\)"),
        (dict(seeds=(0, 0)), r"config\.seeds=\(0, 0\) must be different integers"),
        (dict(sample_steps=(0.5,)), r"config\.sample_steps"),
        (dict(sample_step=(5,)), "this one has .*sample_step"),
    ],
)
def test_an_invalid_sweep_is_refused_before_it_starts(overrides, message):
    with pytest.raises(UserError, match=message):
        resolve_sweep(sweep_config(**overrides))


def test_a_trained_pathway_to_start_from_is_refused_since_a_sweep_has_a_vlm_of_its_own(earlier):
    run = str(earlier / "run")
    config = sweep_config()
    config.base.pretrain.update(init_from=run, steps=0)
    config.base.train.init_from = run
    with pytest.raises(UserError, match=r"train\.init_from=.* does not fit a sweep"):
        resolve_sweep(config)


def test_variants_of_couple_share_the_vlm_in_memory(earlier):
    couple, blend = (Run.open(earlier / "sweep" / "runs" / name) for name in ("couple_0", "blend_0"))
    samplers = load_samplers({"couple": couple, "blend": blend, "another": couple})
    assert samplers["another"].vlm is samplers["couple"].vlm is not samplers["blend"].vlm
    assert samplers["another"].pathway is not samplers["couple"].pathway


@pytest.mark.parametrize("experiment", ["ablations", "ablations:compute", "ablations:depth", "switches"])
def test_the_experiments_resolve(experiment):
    name, *variants = experiment.split(":")
    plan = resolve_sweep(config_file(name, *variants))
    assert len(plan.seeds) == (1 if variants == ["depth"] else 3)
    if experiment == "ablations":
        axes = {(run.model.num_groups, run.model.residual_attention) for run in plan.variants.values()}
        assert axes == {(k, residual) for k in (1, 2, 4) for residual in ("none", "probabilities")}


BAD_FLAGS = {
    "--config.base.train.stepz=5": "train.steps",
    "--config.train.steps=5": "base.",
    "--config.seeds=1,1": "different integers",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_input_is_refused_in_one_line(tmp_path, flag, forked_command):
    done = forked_command("sweep", "--config=configs/ablations.py", f"--workdir={tmp_path}", flag)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and BAD_FLAGS[flag] in done.stderr, done.stderr


def test_an_unknown_list_is_refused_in_one_line(tmp_path, forked_command):
    done = forked_command("sweep", "--config=configs/ablations.py:nothing", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "paper" in done.stderr, done.stderr


def test_a_group_that_takes_no_step_is_named_with_its_variant_and_the_number_of_steps(caplog):
    late = {"model.interval_edges": (0.0, 0.9, 1.0)}
    resolve_sweep(sweep_config(variants=(("base", {}), ("late", late)), sample_steps=(2, 5, 40)))
    (warning,) = caplog.messages
    assert "variant late: some groups take no step when it draws with few (2 steps: 1; 5 steps: 1)" in warning


def test_the_variants_of_coloured_shapes_resolve_and_use_all_their_groups(monkeypatch):
    """Without their data, which docs/coloured-shapes.md makes: so their score is not opened."""
    score = types.SimpleNamespace(num_prompts=100, images=500)
    monkeypatch.setattr(definition, "drawing_score", lambda config, name: score)
    config = config_file("shapes_ablations")
    config.base.pretrain.init_from = ""
    for name, variant in resolve_sweep(config).variants.items():
        steps = variant.model_config.generation.intervals.schedule(variant.eval.sample_steps, variant.eval.shift)
        assert all(steps), f"{name} has a group without a step"
