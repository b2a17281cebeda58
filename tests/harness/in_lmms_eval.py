"""lattejax in lmms-eval 0.7.3 itself, beside a small model over transformers with the same checkpoint: the answers and
the likelihoods are the same. `run_in_lmms_eval.sh` makes the environment, and runs this there.

lattejax runs as users run it, by the command line; the reference is given to lmms-eval as an object.
"""

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.weights import pretrained

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # of a log-probability, in float32
MAX_PIXELS = 1024
TASKS = ("one_image", "several_images", "text_only", "until", "rounds", "choices", "choices_in_text")


def of_tests(name: str):
    """A module of our tests, by its path: a package of lmms-eval's requirements is also called `tests`."""
    spec = importlib.util.spec_from_file_location(name, HERE.parent / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints, helpers = of_tests("checkpoints"), of_tests("helpers")

# ---- Tasks

FUNCTIONS = """
def images(doc):
    return [image.convert("RGB") for image in doc["images"]]

def one(doc):
    return images(doc)[:1]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def tagged(doc, lmms_eval_specific_kwargs=None):
    return "<image> <image>" + doc["question"]

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    asked = f"You said: {previous_output[-1]} Are you sure?"
    seen = (previous_round_info or 0) + 1
    return images(doc)[:seen], asked, round_idx == 2 + doc["number"] % 2, previous_output, seen

def messages(doc, lmms_eval_specific_kwargs=None):
    first, *others = images(doc)
    shown = [{"type": "image", "url": image} for image in others]
    said = [{"role": "assistant", "content": [{"type": "text", "text": "a digit"}]}]
    before = [{"type": "text", "text": "Look: "}, {"type": "image", "url": first}, {"type": "text", "text": "?"}]
    last = [{"type": "text", "text": doc["question"]}, *shown]
    return [{"role": "user", "content": before}, *said, {"role": "user", "content": last}]

def number(doc):
    return doc["number"] % 3

def said(doc, results):
    return {"length": len(str(results[0]))}

def loglikelihood(doc, results):
    return {"length": results[0][0]}
"""
DATA = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASK = (
    DATA
    + """output_type: generate_until
doc_to_visual: !function functions.{visual}
doc_to_text: !function functions.{text}
doc_to_target: answer
process_results: !function functions.said
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false, num_beams: 1, until: {until}}}
metric_list: [{{metric: length, aggregation: mean, higher_is_better: true}}]
"""
)
CHOICES = (
    DATA
    + """output_type: multiple_choice
doc_to_text: !function functions.question
doc_to_choice: ["yes", "no", "a handwritten seven"]
doc_to_target: !function functions.number
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A directory of tasks on eight documents, with one to three images of different sizes."""
    path, rng, rows = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0), []
    questions = ["Which digit is this?", "Is this a seven?", "What is shown here, and what is not?", "What?"]
    for i in range(8):
        sizes = rng.integers(10, 60, (1 + i % 3, 2))
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
        rows.append({"number": i, "question": questions[i % 4] + " " * i, "answer": "seven", "images": images})
    kinds = datasets.Features(
        number=datasets.Value("int64"),
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        images=datasets.Sequence(datasets.Image()),
    )
    data = path / "data.parquet"
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(data)
    (path / "functions.py").write_text(FUNCTIONS)

    def write(name: str, form: str, added: str = "", **settings: str) -> None:
        settings = dict(visual="one", text="question", until="[]") | settings
        (path / f"{name}.yaml").write_text(form.format(name=name, data=data, **settings) + added)

    write("one_image", TASK)
    write("several_images", TASK, visual="images", text="tagged")
    write("text_only", TASK.replace("doc_to_visual: !function functions.{visual}\n", ""))
    write("until", TASK, until='["e", "t"]')
    write("rounds", TASK.replace("generate_until\n", "generate_until_multi_round\n"), text="rounds")
    write("choices", CHOICES, "doc_to_visual: !function functions.images\n")
    write("choices_in_text", CHOICES)
    write("drawings", TASK)
    write("messages", TASK, "doc_to_messages: !function functions.messages\n")
    likelihood = CHOICES.replace("multiple_choice", "loglikelihood").replace("metric: acc,", "metric: length,")
    write(
        "likelihood",
        likelihood.replace("functions.number", "functions.question"),
        "process_results: !function functions.loglikelihood\n",
    )
    return path


# ---- The two models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = checkpoints.random_model(checkpoints.tiny_config(tied=False))
    return checkpoints.save(model, tmp_path_factory.mktemp("weights") / "checkpoint")


@pytest.fixture(scope="module")
def converted(checkpoint) -> Path:
    pretrained.convert(str(checkpoint), checkpoint.with_name("converted"))
    return checkpoint.with_name("converted")


def content_of(part):
    """A part of a message, a text or an image, as the chat template takes it."""
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def part_of(content):
    """A message's content in lmms-eval's form as a text or an image."""
    return content["text"] if content["type"] == "text" else content["url"]


class Reference(lmms):
    """Qwen2-VL of transformers, one request at a time."""

    def __init__(self, path: Path, is_simple: bool):
        super().__init__()
        self.is_simple = is_simple
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = checkpoints.tokenizer()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.processor.size = {"shortest_edge": 64, "longest_edge": MAX_PIXELS}

    def document(self, task, split, doc_id):
        return self.task_dict[task][split][doc_id]

    def inputs(self, messages, answer=""):
        """Messages of (role, parts); the token ids with the answer's, the images, and how many ids are the answer's."""
        chat = [{"role": role, "content": list(map(content_of, parts))} for role, parts in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [part for _, parts in messages for part in parts if not isinstance(part, str)]
        shown = self.processor(images=images, return_tensors="pt") if images else {}
        for grid in shown.get("image_grid_thw", ()):
            text = text.replace("<|image_pad|>", "<pad>" * (int(grid.prod()) // 4), 1)
        text = text.replace("<pad>", "<|image_pad|>")
        ids, more = (self.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, answer))
        ids = torch.tensor([ids + more], dtype=torch.long)
        kinds = (ids == self.model.config.image_token_id).long()
        return dict(input_ids=ids, mm_token_type_ids=kinds, **shown), len(more)

    @torch.no_grad()
    def answer(self, messages, options):
        inputs, _ = self.inputs(messages)
        ids = self.model.generate(**inputs, max_new_tokens=options["max_new_tokens"], do_sample=False)
        text = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in options["until"]:
            text = text.split(stop)[0]
        return text.strip()

    def generate_until(self, requests):
        if not self.is_simple:
            return [self.of_messages(*request.args) for request in requests]
        return [self.of_context(*request.args) for request in requests]

    def of_context(self, context, options, doc_to_visual, doc_id, task, split):
        images = doc_to_visual(self.document(task, split, doc_id)) or []
        return self.answer([("user", [*images, context.replace("<image>", "")])], options)

    def of_messages(self, context, doc_to_messages, options, doc_id, task, split):
        messages = doc_to_messages(self.document(task, split, doc_id))
        return self.answer([(each["role"], list(map(part_of, each["content"]))) for each in messages], options)

    def generate_until_multi_round(self, requests):
        return [self.of_rounds(*request.args) for request in requests]

    def of_rounds(self, context, options, doc_to_visual, doc_to_text, doc_id, task, split):
        document, said, state = self.document(task, split, doc_id), [], None
        visuals, is_last = doc_to_visual(document), False
        while not is_last:
            said.append(self.answer([("user", [*visuals, context])], options))
            visuals, context, is_last, said, state = doc_to_text(
                document, previous_output=said, round_idx=len(said), previous_round_info=state
            )
        return said

    def loglikelihood(self, requests):
        return [self.of_answer(*request.args) for request in requests]

    @torch.no_grad()
    def of_answer(self, context, answer, doc_to_visual, doc_id, task, split):
        document = self.document(task, split, doc_id)
        is_choice = not callable(answer)
        answer = answer if is_choice else answer(document)
        images = doc_to_visual(document) or []
        inputs, count = self.inputs([("user", [*images, context])], answer)
        logits = self.model(**inputs).logits[0, -count - 1 : -1].double()
        own = inputs["input_ids"][0, -count:]
        each = logits.log_softmax(-1).gather(1, own[:, None])
        sign = -1 if is_choice else 1
        return GenerationResult((sign * each.sum().item(), bool((logits.argmax(-1) == own).all())))


def as_logged(responses):
    """Responses as the command writes them: one alone is in no list, and all are texts."""
    if not isinstance(responses, list | tuple):
        return str(responses)
    return as_logged(responses[0]) if len(responses) == 1 else list(map(as_logged, responses))


def command_line(
    out: Path, tasks: Path, names: tuple[str, ...], model_args: str, *flags: str, model="lattejax"
) -> dict:
    """Runs lmms-eval's command; returns its results, and the responses to each task's documents."""
    command = [sys.executable, "-m", "lmms_eval", f"--model={model}", f"--model_args={model_args}"]
    command += [
        f"--tasks={','.join(names)}",
        f"--include_path={tasks}",
        f"--output_path={out}",
        "--log_samples",
        *flags,
    ]
    done = subprocess.run(command, cwd=tasks, capture_output=True, text=True)
    assert done.returncode == 0 and list(out.rglob("*results.json")), done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = out.rglob("*results.json")
    responses = {}
    for name in names:
        (file,) = out.rglob(f"*samples_{name}.jsonl")
        lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["doc_id"])
        responses[name] = [as_logged(line["filtered_resps"]) for line in lines]
    return {"results": json.loads(results.read_text())["results"], "responses": responses}


def reference(path: Path, tasks: Path, names: tuple[str, ...], is_simple: bool = True) -> dict:
    manager = TaskManager("ERROR", include_path=str(tasks))
    done = simple_evaluate(Reference(path, is_simple), tasks=list(names), task_manager=manager, log_samples=True)
    order = {name: sorted(done["samples"][name], key=lambda line: line["doc_id"]) for name in names}
    responses = {name: [as_logged(line["filtered_resps"]) for line in lines] for name, lines in order.items()}
    return {"results": done["results"], "responses": responses}


@pytest.fixture(scope="module")
def ours(converted, tasks, tmp_path_factory) -> dict:
    args = f"workdir={converted},dtype=float32,min_pixels=64,max_pixels={MAX_PIXELS}"
    return command_line(tmp_path_factory.mktemp("ours"), tasks, TASKS, args, "--batch_size=3")


@pytest.fixture(scope="module")
def theirs(checkpoint, tasks) -> dict:
    return reference(checkpoint, tasks, TASKS)


@pytest.mark.parametrize("name", [name for name in TASKS if "choices" not in name])
def test_answers_are_those_of_transformers(name, ours, theirs):
    assert ours["responses"][name] == theirs["responses"][name]
    if name == "until":
        assert max(map(len, ours["responses"][name])) < min(map(len, ours["responses"]["one_image"])), "cut"
    else:
        assert len({str(answer) for answer in ours["responses"][name]}) > 4, "not all alike"


def test_rounds_are_as_many_as_the_task_wants(ours):
    assert [len(rounds) for rounds in ours["responses"]["rounds"]] == [2, 3] * 4


@pytest.mark.parametrize("name", ["choices", "choices_in_text"])
def test_likelihoods_and_the_choice_are_those_of_transformers(name, ours, theirs):
    both = ours["responses"][name], theirs["responses"][name]
    losses = [np.array([[float(pair[0]) for pair in one] for one in each]) for each in both]
    assert losses[0].shape == (8, 3) and np.ptp(losses[0], axis=1).min() > 0.1
    np.testing.assert_allclose(*losses, atol=TOLERANCE)
    assert [[pair[1] for pair in one] for one in both[0]] == [[pair[1] for pair in one] for one in both[1]]
    accuracy = [each["results"][name]["acc,none"] for each in (ours, theirs)]
    expected = np.mean(losses[0].argmin(axis=1) == np.arange(8) % 3)  # the likeliest
    assert accuracy == [pytest.approx(expected)] * 2


def test_messages_of_a_chat_task_are_answered_in_their_order(checkpoint, converted, tasks, tmp_path):
    args = f"workdir={converted},dtype=float32,min_pixels=64,max_pixels={MAX_PIXELS}"
    ours = command_line(tmp_path, tasks, ("messages",), args, "--batch_size=2", model="lattejax_chat")
    assert ours["responses"] == reference(checkpoint, tasks, ("messages",), is_simple=False)["responses"]


def test_likelihoods_with_a_cache_of_responses(converted, tasks, ours, tmp_path):
    """Twice, the second time from the cache, which has no likelihoods."""
    args = f"workdir={converted},dtype=float32,min_pixels=64,max_pixels={MAX_PIXELS}"
    for again in ("first", "second"):
        flags = ["--batch_size=3", f"--use_cache={tmp_path / 'cache'}"]
        done = command_line(tmp_path / again, tasks, ("choices", "one_image"), args, *flags)
        assert done["responses"]["one_image"] == ours["responses"]["one_image"]
        assert done["results"]["choices"] == ours["results"]["choices"]


def test_a_task_of_likelihoods_has_log_probabilities(checkpoint, converted, tasks, tmp_path):
    args = f"workdir={converted},dtype=float32,min_pixels=64,max_pixels={MAX_PIXELS}"
    ours = command_line(tmp_path, tasks, ("likelihood",), args)
    theirs = reference(checkpoint, tasks, ("likelihood",))
    pairs = [np.array([float(pair[0]) for pair in each["responses"]["likelihood"]]) for each in (ours, theirs)]
    assert pairs[0].max() < 0
    np.testing.assert_allclose(*pairs, atol=TOLERANCE)


def test_the_stand_in_has_the_interfaces_names_and_parameters():
    for path in (HERE / "stand_in" / "lmms_eval").glob("*/[!_]*.py"):
        name = ".".join(path.relative_to(HERE / "stand_in").with_suffix("").parts)
        spec = importlib.util.spec_from_file_location(f"stand_in.{name}", path)
        ours = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ours)
        theirs = importlib.import_module(name)
        for what in (each for each in vars(ours).values() if getattr(each, "__module__", "") == spec.name):
            real = getattr(theirs, what.__name__)
            pairs = [(what, real)] if inspect.isfunction(what) else []
            if inspect.isclass(what):
                own = [each for each in vars(what) if inspect.isfunction(getattr(what, each))]
                pairs = [(getattr(what, each), getattr(real, each)) for each in own if each != "__replace__"]
            for function, other in pairs:  # the stand-in may lack the last ones
                parameters = [list(inspect.signature(each).parameters) for each in (function, other)]
                assert parameters[0] == parameters[1][: len(parameters[0])], f"{name}: {function.__qualname__}"


def test_drawings_are_files_that_the_task_finds(tasks, tmp_path):
    config = helpers.tiny_config(pretrain__steps=1, train__steps=2, train__learning_rate=0.05, **helpers.NO_SCORES)
    stages.train(config, tmp_path / "run", InterruptGuard())
    args = f"workdir={tmp_path / 'run'},mode=generation,steps=3,output_image_dir={tmp_path / 'pictures'}"
    done = command_line(tmp_path / "out", tasks, ("drawings",), args, "--batch_size=3")
    drawn = [json.loads(response)["images"][0] for response in done["responses"]["drawings"]]
    settings = tmp_path / "pictures" / "guidance_2_steps_3_seed_0"
    assert drawn == [str(settings / f"drawings_{i}_0.png") for i in range(8)]
    pictures = [np.asarray(Image.open(path)) for path in drawn]
    assert {picture.shape for picture in pictures} == {(8, 8, 3)} and len({p.tobytes() for p in pictures}) == 8
