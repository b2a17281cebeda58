"""lattejax as a model of lmms-eval, against a stand-in of its interface. `run_in_lmms_eval.sh` has the real one."""

import importlib
import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lattejax.data.prompts import Turn
from lattejax.errors import UserError
from lattejax.flow.schedule import Sampling
from lattejax.harness.options import read_options
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.images import ImageSampler
from tests import checkpoints
from tests.helpers import ROOT

STAND_IN = Path(__file__).parent / "stand_in"
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "top_p": 1.0, "num_beams": 1}
RNG = np.random.default_rng(0)
# Two, no, one and three images.
DOCUMENTS = [
    {"images": [Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)) for size in sizes], "question": question}
    for sizes, question in (
        ([(20, 30), (9, 40)], "Which digits are these?"),
        ([], "Is a seven a digit?"),
        ([(50, 12)], "Is this a seven or not?"),
        ([(16, 16), (30, 30), (8, 9)], "What?"),
    )
]


@pytest.fixture(scope="module")
def harness():
    """The module with the models, with the stand-in in place of lmms-eval."""
    before = dict(sys.modules)
    sys.path.insert(0, str(STAND_IN))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        del sys.modules[name]
    yield importlib.import_module("lattejax.harness.model")
    sys.path.remove(str(STAND_IN))
    for name in sys.modules.keys() - before:
        if name.startswith(("lmms_eval", "lattejax.harness")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def weights():
    return checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(tied=False)))


def opened(cls, arguments: str, batch_size: int | None = 3):
    model = cls.create_from_arg_string(arguments, {"batch_size": batch_size, "max_batch_size": None, "device": None})
    model.task_dict = {"task": {"test": DOCUMENTS}}
    return model


@pytest.fixture(scope="module")
def model(harness, weights):
    return opened(harness.LatteJax, f"workdir={weights},dtype=float32")


@pytest.fixture(scope="module")
def answerer(weights):
    return Answerer.load(weights, "float32")


def images(document):
    return document["images"]


def ask(*arguments, of="generate_until"):
    instances = importlib.import_module("lmms_eval.api.instance")
    return instances.Instance(of, arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})


def questions(options=GREEDY, places=range(4), before=""):
    return [ask(before + DOCUMENTS[i]["question"], dict(options), images, i, "task", "test") for i in places]


def alone(answerer, i, question=None, tokens=6, shown=None, **decoding):
    """The library's answer to a document's question."""
    read = [answerer.encoder.read_image(image) for image in (DOCUMENTS[i]["images"] if shown is None else shown)]
    prompt = answerer.encoder.question(question or DOCUMENTS[i]["question"], read)
    return answerer.generate([prompt], Decoding(tokens, **decoding))[0]


def test_the_entry_point_names_models_of_both_protocols(harness):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, name = points["lattejax"].split(":")
    manifests = getattr(importlib.import_module(module), name)()
    assert [manifest.model_id for manifest in manifests] == ["lattejax", "lattejax_chat"]
    for manifest in manifests:
        path = manifest.simple_class_path or manifest.chat_class_path
        cls = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
        assert cls.is_simple == bool(manifest.simple_class_path) and issubclass(cls, harness.lmms)


def test_lmms_eval_starts_without_the_models_imports():
    code = f"import sys; sys.path.insert(0, {str(STAND_IN)!r})\nfrom lattejax.harness import models\nmodels()\n"
    code += "assert not {'jax', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- Answers


def test_answers_in_batches_are_each_alone_in_the_requests_order(model, answerer):
    assert (model.rank, model.world_size, model.batch_size) == (0, 1, 3)
    expected = [alone(answerer, i) for i in range(4)]
    assert len(set(expected)) == 4
    assert model.generate_until(questions()) == expected
    assert model.generate_until(questions(before="<image>\n"))[1] == alone(answerer, 1, "\nIs a seven a digit?")
    backwards = [3, 2, 1, 0, 3]
    assert model.generate_until(questions(places=backwards)) == [expected[i] for i in backwards]
    assert model.generate_until([]) == []


def test_the_options_of_each_request_are_its_own(model, answerer):
    complete = alone(answerer, 0, tokens=8)
    stop = complete[3:5]
    mixed = [
        questions(GREEDY | {"max_new_tokens": 8, "until": ["", stop]}, [0])[0],
        questions(GREEDY | {"until": None}, [1])[0],
        questions(GREEDY | {"max_new_tokens": 8, "until": complete[2:]}, [0])[0],
        questions({"max_new_tokens": 8, "do_sample": True, "temperature": 5.0, "seed": 3}, [0])[0],
    ]
    cut, short, shorter, sampled = model.generate_until(mixed)
    assert (cut, short, shorter) == (complete[: complete.find(stop)].strip(), alone(answerer, 1), complete[:2].strip())
    assert sampled not in (complete, cut)


@pytest.mark.parametrize("size", [2, 3])
def test_a_sampled_answer_depends_on_its_number_not_on_its_batch(size, model, answerer, monkeypatch):
    monkeypatch.setattr(model, "_batch_size", size)
    sampled = model.generate_until(questions(GREEDY | {"do_sample": True, "temperature": 5.0, "seed": 3}))
    read = [[answerer.encoder.read_image(image) for image in document["images"]] for document in DOCUMENTS]
    prompts = [answerer.encoder.question(own["question"], shown) for own, shown in zip(DOCUMENTS, read, strict=True)]
    tokens = GREEDY["max_new_tokens"]
    expected = [text.strip() for text in answerer.generate(prompts, Decoding(tokens, 5.0, seed=3), 4)]
    other = [text.strip() for text in answerer.generate(prompts, Decoding(tokens, 5.0, seed=2), 4)]
    assert sampled == expected != other


def test_options_in_transformers_sense():
    default = Decoding(7, seed=2)
    assert read_options({}, default, 1.0).decoding == default
    assert read_options({"temperature": 0.0, "top_p": 0, "top_k": 1, "do_sample": True}, default, 1.0) == read_options(
        {"image_aspect_ratio": "pad", "repetition_penalty": None, "num_beams": 1}, default, 1.0
    )
    assert read_options({"do_sample": False, "temperature": 0.7}, default, 1.0).decoding.temperature == 0
    assert read_options({"do_sample": True}, default, 1.0).decoding.temperature == 1
    assert read_options({"temperature": 0.2, "top_p": 0.9}, default, 1.0).decoding == Decoding(7, 0.2, 0.9, 2)
    assert read_options({"until": "a", "stop_sequences": ["b"]}, default, 1.0).stop == ("a", "b")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_beams": 4}, "num_beams=4 is not supported; only 1 is"),
        ({"temperature": 1.0, "top_k": 5}, "top_k=5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported; only 1.05 is"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"max_new_tokens": 0}, "max_tokens=0 must be from 1"),
        ({"temperature": 1.0, "top_p": 2}, "top_p=2"),
        ({"until": [3]}, "until=(3,) must be texts"),
    ],
)
def test_options_that_are_not_supported_are_refused(options, named):
    with pytest.raises(UserError) as raised:
        read_options(options, Decoding(), 1.05)
    assert named in str(raised.value)


def test_bad_options_of_one_request_are_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(model._answerer, "tokens", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(UserError, match="num_beams=2"):
        model.generate_until(questions() + questions({"num_beams": 2}))


def test_rounds_are_prompts_that_the_task_makes_of_the_answers(model, answerer):
    def doc_to_text(document, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx and (previous_round_info or 0) == round_idx - 1
        is_last = round_idx == len(document["images"]) + 1
        said = ["first:" + previous_output[0], *previous_output[1:]] if is_last else previous_output
        return document["images"][:1], f"Not {previous_output[-1]}?", is_last, said, round_idx

    requests = [ask(DOCUMENTS[i]["question"], dict(GREEDY), images, doc_to_text, i, "task", "test") for i in range(3)]
    requests.append(ask("Why?", dict(GREEDY), images, lambda document, **_: "a task of one round", 1, "task", "test"))
    *rounds, single = model.generate_until_multi_round(requests)
    assert single == [alone(answerer, 1, "Why?")]
    for i, made in enumerate(rounds):
        expected = [alone(answerer, i)]
        for _ in DOCUMENTS[i]["images"]:
            expected.append(alone(answerer, i, f"Not {expected[-1]}?", shown=DOCUMENTS[i]["images"][:1]))
        assert made == ["first:" + expected[0], *expected[1:]]


def test_messages_are_turns_in_their_order(harness, weights, answerer):
    chat = opened(harness.LatteJaxChat, f"workdir={weights},dtype=float32,system_prompt=Be brief.")
    shown = DOCUMENTS[0]["images"]

    def messages(document, round_idx=None, previous_output=None, previous_round_info=None):
        parts = [{"type": "image", "url": shown[1]}, {"type": "text", "text": "?"}]
        made = [
            {"role": "user", "content": [{"type": "text", "text": "First"}, {"type": "image", "url": shown[0]}]},
            {"role": "assistant", "content": [{"type": "text", "text": (previous_output or ["It is."])[-1]}]},
            {"role": "user", "content": parts},
        ]
        return made if round_idx is None else (made, round_idx == 2, previous_output, None)

    def expected(answer):
        first, second = map(answerer.encoder.read_image, shown)
        turns = [Turn("system", "Be brief."), Turn("user", ("First", first)), Turn("assistant", answer)]
        return answerer.generate([answerer.encoder.chat([*turns, Turn("user", (second, "?"))])], Decoding(6))[0]

    request = ask("unused", messages, dict(GREEDY), 0, "task", "test")
    assert chat.generate_until([request]) == [expected("It is.")]
    assert chat.generate_until_multi_round([request]) == [[expected("It is."), expected(expected("It is."))]]


def test_pixel_limits_bound_what_is_read(harness, weights):
    large = Image.new("RGB", (200, 100))
    for limits, tokens in (("max_pixels=512", 8), ("min_pixels=4096,max_pixels=8192", 128), ("", 32)):
        model = opened(harness.LatteJax, f"workdir={weights},dtype=float32,{limits}".rstrip(","))
        count = len(model._encoder.read_image(large).patches) // 4
        assert 0.6 * tokens < count <= tokens, limits


@pytest.mark.parametrize("visual", ["film.mp4", {"array": [0.0], "sampling_rate": 1}])
def test_what_is_no_image_is_refused(model, visual):
    with pytest.raises(UserError, match="only images are supported"):
        model.generate_until([ask("What?", dict(GREEDY), lambda document: [visual], 0, "task", "test")])


def test_an_image_may_be_a_file_or_in_two_lists(model, answerer, tmp_path):
    image = DOCUMENTS[2]["images"][0]
    image.save(tmp_path / "image.png")
    forms = (image, [[image]], str(tmp_path / "image.png"), [str(tmp_path / "image.png")])
    requests = [ask("What?", dict(GREEDY), lambda _, form=form: form, 2, "task", "test") for form in forms]
    assert model.generate_until(requests) == [alone(answerer, 2, "What?")] * 4


# ---- Likelihoods


def test_likelihoods_are_the_librarys_and_scored_as_lmms_eval_does(model, answerer):
    answers = [" yes", "no", "a seven <|im_end|>", ""]
    requests = [
        ask(DOCUMENTS[i]["question"], answer, images, i, "task", "test", of="loglikelihood")
        for i in range(4)
        for answer in answers
    ]
    pairs = model.loglikelihood(requests)
    complete = [
        answerer.encoder.question(document["question"], map(answerer.encoder.read_image, document["images"]), answer)
        for document in DOCUMENTS
        for answer in answers
    ]
    sums, likeliest = answerer.log_likelihoods(complete, 4)
    np.testing.assert_allclose([pair[0] for pair in pairs], sums, atol=1e-5)
    assert [pair[1] for pair in pairs] == likeliest.tolist()
    assert pairs[3] == (0.0, True) and max(pair[0] for pair in pairs if pair[0]) < -1
    unwrap = importlib.import_module("lmms_eval.api.instance").unwrap_generation_output
    scored = [unwrap(pair)[0] for pair in pairs]  # its multiple choice takes the least
    losses, _ = zip(*scored, strict=True)
    np.testing.assert_allclose(losses, -sums, atol=1e-5)
    json.dumps(scored)  # as it is logged


def test_an_answer_of_a_function_or_without_a_document(model):
    given = ask("Is it?", "no", lambda _: None, 1, "task", "test", of="loglikelihood")
    made = ask("Is it?", lambda document: "no", lambda _: None, 1, "task", "test", of="loglikelihood")
    bare = ask("Is it?", "no", of="loglikelihood")
    pairs = model.loglikelihood([given, made, bare])
    assert pairs[0][0] == pytest.approx(pairs[1][0]) == pytest.approx(pairs[2][0])
    assert pairs[0].text[0] == -pairs[0][0] and pairs[1].text[0] == pairs[1][0], "a loss only among choices"


def test_an_answer_that_could_join_the_template_is_tokenised_by_itself(model, answerer):
    """A line break at its beginning would be one token with the template's."""
    (pair,) = model.loglikelihood([ask("Is it?", "\nno", of="loglikelihood")])
    prompt = model._complete([Turn("user", "Is it?")], "\nno")
    assert answerer.encoder.tokenizer.decode(prompt.input_ids[prompt.is_answer]) == "\nno"
    assert pair[0] == pytest.approx(float(answerer.log_likelihoods([prompt])[0][0]))


# ---- Drawing


def test_drawings_are_files_named_by_document_with_noise_of_their_own(harness, earlier, tmp_path):
    arguments = (
        f"workdir={earlier / 'run'},mode=generation,output_image_dir={tmp_path / 'new'},steps=3,guidance=3,seed=5"
    )
    drawing = opened(harness.LatteJax, arguments, 2)
    drawing.task_dict = {"a/task": {"test": [{}] * 9}}
    captions = ["a handwritten seven", "a handwritten two", "a handwritten three"]
    places = [(0, 4), (1, 7), (2, 1), (0, 4)]  # the last one again
    requests = [ask(captions[i], {"max_new_tokens": 64}, lambda _: [], doc, "a/task", "test") for i, doc in places]
    made = [json.loads(response) for response in drawing.generate_until(requests)]
    assert [each["text"] for each in made] == [""] * 4
    names = [f"guidance_3_steps_3_seed_5/a_task_{name}.png" for name in ("4_0", "7_0", "1_0", "4_1")]
    assert [each["images"] for each in made] == [[str(tmp_path / "new" / name)] for name in names]
    pictures = [np.asarray(Image.open(each["images"][0])).astype(int) for each in made]

    sampler = ImageSampler.load(earlier / "run")
    contexts = sampler.read([sampler.encoder.drawing(caption) for caption in captions])
    rows, samples = np.array([0, 1, 2]), np.array([4, 7, 1])
    empty = np.full(3, contexts.mask.shape[0] - 1)
    expected = np.asarray(sampler.draw(contexts, rows, empty, samples, Sampling(3, 3.0), 5)).astype(int)
    assert np.abs(np.stack(pictures[:3]) - expected).max() <= 1
    assert np.abs(pictures[3] - pictures[0]).max() > 1
    assert drawing.loglikelihood([ask("Is it?", "no", of="loglikelihood")])[0][0] < 0, "it answers too"

    def another(document, previous_output, round_idx, previous_round_info):
        return [], captions[0], round_idx == 2, previous_output, None

    request = ask(captions[0], {"max_new_tokens": 64}, lambda _: [], another, 4, "a/task", "test")
    (rounds,) = (list(map(json.loads, each)) for each in drawing.generate_until_multi_round([request]))
    assert [each["images"] for each in rounds] == [made[0]["images"], made[3]["images"]], "each round is drawn anew"
    again = [np.asarray(Image.open(each["images"][0])).astype(int) for each in rounds]
    assert np.abs(np.stack(again) - np.stack([pictures[0], pictures[3]])).max() <= 1


def test_a_run_and_its_export_answer_as_chat_does(harness, earlier):
    digit = Image.open(earlier / "digit.png").convert("RGB")
    expected = (earlier / "answer.txt").read_text().strip()
    model = opened(harness.LatteJax, f"workdir={earlier / 'run'},checkpoint=4,max_new_tokens=8", None)
    assert model.batch_size == 1
    request = ask("Which digit is this?", {}, lambda _: [digit], 0, "task", "test")
    assert model.generate_until([request]) == [expected]
    export = opened(harness.LatteJax, f"workdir={earlier / 'export'},max_new_tokens=8")
    assert export.generate_until([request]) == [expected]


# ---- Arguments


@pytest.mark.parametrize(
    "arguments, flags, named",
    [
        ("workdir=nowhere", {}, "nowhere is not the workdir of a run"),
        ("workdir={checkpoint}", {}, "python -m lattejax.convert --source="),
        ("workdir={weights},mode=draw", {}, "mode='draw' must be one of understanding, generation"),
        ("workdir={weights},mode=generation", {}, "mode=generation needs output_image_dir"),
        ("workdir={weights},mode=generation,output_image_dir={tmp}", {}, "give a run to draw"),
        ("workdir={weights},checkpoint=3", {}, "has no checkpoint"),
        ("workdir={run},checkpoint=3", {}, "has no checkpoint '3'; it has those of the steps 4"),
        ("workdir={run},dtype=bfloat16", {}, "dtype=bfloat16 is for converted weights"),
        ("workdir={weights},min_pixels=9000,max_pixels=100", {}, "min_pixels=9000 and max_pixels=100"),
        ("workdir={weights},max_pixels=28*28", {}, "max_pixels='28*28'"),
        ("workdir={weights},max_new_tokens=0", {}, "max_tokens=0"),
        ("workdir={weights},steps=0", {}, "num_steps=0"),
        ("workdir={weights}", {"batch_size": "auto"}, "--batch_size=auto must be a number"),
        ("workdir={weights}", {"device": "cuda"}, "--device=cuda is PyTorch's"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(harness, weights, earlier, arguments, flags, named, tmp_path):
    (checkpoint := tmp_path / "checkpoint").mkdir()
    (checkpoint / "preprocessor_config.json").write_text("{}")
    places = types.SimpleNamespace(weights=weights, run=earlier / "run", checkpoint=checkpoint, tmp=tmp_path)
    with pytest.raises(UserError) as raised:
        harness.LatteJax.create_from_arg_string(arguments.format(**vars(places)), flags)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_several_processes_are_refused(harness, weights, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="in 2 processes"):
        opened(harness.LatteJax, f"workdir={weights}")


@pytest.mark.slow
def test_in_lmms_eval_itself(tmp_path):
    script = Path(__file__).with_name("run_in_lmms_eval.sh")
    done = subprocess.run([script, tmp_path / "environment"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
