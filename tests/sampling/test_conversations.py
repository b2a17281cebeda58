"""Kept conversations against answers to complete prompts, and how many tokens are read."""

import jax
import numpy as np
import pytest
from PIL import Image

from lattejax.data import digits
from lattejax.data.prompts import Turn
from lattejax.errors import UserError
from lattejax.models import qwen2_vl
from lattejax.sampling import kept_tokens
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.conversations import Conversations
from lattejax.sampling.padding import padded
from lattejax.sampling.streams import TextStream
from tests.helpers import compilations, encoder_for, randomize, tiny_config

CONFIG = tiny_config()
VLM_CONFIG = CONFIG.model_config.vlm
ENCODER = encoder_for(CONFIG)
VLM = randomize(qwen2_vl.init(VLM_CONFIG, jax.random.key(0)), 1, 0.1)
PICTURES = [ENCODER.read_image(Image.fromarray(image)) for image in digits.load("test").images[:3]]


def answerer(penalty: float = 1.0) -> Answerer:
    return Answerer(VLM_CONFIG, qwen2_vl.unstack(VLM), ENCODER, penalty)


def conversations(penalty: float = 1.0, **settings) -> Conversations:
    return Conversations(answerer(penalty), **dict(rows=4, capacity=100, chunks=(8, 32)) | settings)


def expected(prompt, decoding, penalty=1.0):
    """The answer's tokens without anything kept."""
    tokens = answerer(penalty).tokens(padded(ENCODER, [prompt]), decoding)
    return [int(token[0]) for token in tokens]


def prompts():
    questions = ["Is this a seven?", "Which digit?", "seven " * 20 + "?", "What are these?"]
    pictures = [PICTURES[:1], [], PICTURES[1:2], PICTURES[1:]]
    return [ENCODER.question(question, shown) for question, shown in zip(questions, pictures, strict=True)]


DECODINGS = [Decoding(6), Decoding(9, 1.5, 0.9, seed=3), Decoding(4), Decoding(12, 1.0, seed=7)]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_answers_that_join_and_leave_between_tokens_are_those_of_each_alone(penalty):
    """Prompts of several chunks, with and without images, greedy and sampled, which begin at different tokens."""
    ours = conversations(penalty)
    waiting, running, complete = list(zip(prompts(), DECODINGS, strict=True)), [], []
    while waiting or running:
        if waiting:
            running.append(ours.begin(*waiting.pop(0)))
        for answer in running:
            if not answer.is_read:
                ours.read(answer)
        ours.step([answer for answer in running if answer.is_read and not answer.is_complete])
        for answer in [answer for answer in running if answer.is_complete]:
            ours.end(answer)
            complete.append(answer)
            running.remove(answer)
    assert len(complete) == 4
    for answer in complete:
        assert answer.tokens == expected(answer.prompt, answer.decoding, penalty)


def test_a_turn_reads_only_what_is_new():
    """However long the conversation is; and answers what it would answer if it read everything."""
    ours, turns, read = conversations(capacity=300), [], []
    for number in range(5):
        turns.append(Turn("user", (PICTURES[number % 3], "And which digit is this?")))
        prompt = ENCODER.chat(turns)
        before = ours.tokens_read
        tokens = list(ours.tokens(prompt, Decoding(5)))
        read.append(ours.tokens_read - before)
        assert tokens == expected(prompt, Decoding(5))
        text = TextStream(ENCODER.tokenizer)
        turns.append(Turn("assistant", "".join(map(text.add, tokens)) + text.end()))
    assert len(ENCODER.chat([*turns, Turn("user", "?")]).input_ids) > 5 * 20
    assert max(read[1:]) <= 45, read


def test_long_images_are_read():
    """They have more patches than the largest square one, because no side is shorter than a patch."""
    ours, most = conversations(), conversations(capacity=10_000).patches[-1]
    for size in [(8, 8), (700, 4), (1, 200), (2000, 10), (8000, 41), (3, 590), (399, 2)]:
        assert np.prod(ENCODER.image_of_size(*size).grid) <= most
    prompt = ENCODER.question("What is it?", [ENCODER.read_image(Image.new("RGB", (240, 24), "red"))])
    assert len(prompt.images[0].patches) > len(PICTURES[0].patches)
    assert list(ours.tokens(prompt, Decoding(3))) == expected(prompt, Decoding(3))


def test_another_image_in_the_same_place_is_read():
    ours = conversations()
    for picture in PICTURES:
        prompt = ENCODER.question("Which digit is this?", [picture])
        assert list(ours.tokens(prompt, Decoding(5))) == expected(prompt, Decoding(5))


def test_images_are_each_prompts_own_if_prompts_are_read_alternately():
    """Also if one is left in the middle of its image, and is read on after another image was."""
    ours = conversations(chunks=(2,))
    first, second = (ENCODER.question("Which digit is this?", [picture]) for picture in PICTURES[:2])
    answers = [ours.begin(prompt, Decoding(5)) for prompt in (first, second)]
    while not all(answer.is_read for answer in answers):
        for answer in answers:
            ours.read(answer)
    while not all(answer.is_complete for answer in answers):
        ours.step([answer for answer in answers if not answer.is_complete])
    assert [answer.tokens for answer in answers] == [expected(prompt, Decoding(5)) for prompt in (first, second)]
    left = ENCODER.question("What?", PICTURES[2:])
    pads = np.flatnonzero(left.input_ids == ENCODER.image_token)
    answer = left_at(ours, left, int(pads[len(pads) // 2]))
    assert pads[0] < answer.read <= pads[-1]
    assert list(ours.tokens(first, Decoding(5))) == expected(first, Decoding(5))
    assert list(ours.tokens(left, Decoding(5))) == expected(left, Decoding(5))


def left_at(ours, prompt, token):
    """An answer whose client left when its prompt had been read to a token."""
    answer = ours.begin(prompt, Decoding(5))
    while answer.read < token:
        ours.read(answer)
    ours.end(answer)
    return answer


def test_the_least_recently_used_conversation_is_forgotten():
    ours = conversations(rows=2)
    first, second, third = (ENCODER.question(f"{word} " * 20) for word in ("one", "two", "three"))
    read = {}
    for name, prompt in [
        ("1", first),
        ("2", second),
        ("1 again", first),
        ("3", third),
        ("1 still", first),
        ("2 again", second),
    ]:
        before = ours.tokens_read
        list(ours.tokens(prompt, Decoding(2)))
        read[name] = ours.tokens_read - before
    assert read["1 again"] == read["1 still"] == 2, "the last token of the prompt, and one of the answer"
    assert read["2 again"] > 20, read


def test_a_short_new_conversation_takes_an_empty_row_not_that_of_a_long_one():
    """Both begin with the same system prompt, which is most of the short one."""
    ours = conversations(rows=2)
    long, short = ENCODER.question("one two three " * 10), ENCODER.question("one?")
    for prompt in (long, short):
        list(ours.tokens(prompt, Decoding(2)))
    before = ours.tokens_read
    list(ours.tokens(long, Decoding(2)))
    assert ours.tokens_read == before + 2, "the last token of the prompt, and one of the answer"


def test_no_row_is_taken_twice_and_a_prompt_that_is_too_long_is_refused(monkeypatch):
    ours = conversations(rows=1)
    prompt = ENCODER.question("Which digit?")
    answer = ours.begin(prompt, Decoding())
    with monkeypatch.context() as patched:
        patched.setattr("lattejax.sampling.conversations.token_keys", lambda *_: 1 / 0)
        assert ours.begin(prompt, Decoding()) is None, "nothing is hashed while no row is free"
    ours.end(answer)
    assert ours.begin(prompt, Decoding()) is not None
    with pytest.raises(UserError, match="at most 19 can be answered"):
        conversations(capacity=20).begin(prompt, Decoding())


def test_an_answer_ends_where_its_row_does():
    prompt = ENCODER.question("Which digit?")
    length = len(prompt.input_ids)
    ours = conversations(capacity=length + 3)
    ours.answerer.encoder = encoder_for(CONFIG)
    ours.answerer.encoder.stop_tokens = (-1,)
    assert len(list(ours.tokens(prompt, Decoding(50)))) == 3


@pytest.mark.parametrize("call", ["see", "mark", "read_tokens"])
def test_an_interrupted_call_forgets_and_the_next_answer_is_right(call, monkeypatch):
    ours, (prompt, without_image, *_) = conversations(1.3), prompts()
    list(ours.tokens(without_image, Decoding(3)))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kept_tokens, call, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        list(ours.tokens(prompt, Decoding(3)))
    for each in (without_image, prompt):
        assert list(ours.tokens(each, Decoding(3))) == expected(each, Decoding(3), 1.3)


def test_an_interrupt_while_the_table_grows_leaves_the_table_and_the_images_alike(monkeypatch):
    ours = conversations()
    list(ours.tokens(prompts()[1], Decoding(1)))
    slots, place = kept_tokens.slots_of(ours._table), ours._place

    def interrupted(tree):
        if isinstance(tree, jax.Array):  # the images
            raise KeyboardInterrupt
        return place(tree)

    monkeypatch.setattr(ours, "_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours._grow(slots + 8)
    assert kept_tokens.slots_of(ours._table) == slots


def test_nothing_is_compiled_after_everything_was():
    ours, done = conversations(1.3), []
    ours.compile(done.append)
    assert len(done) == len(set(done)) > 4
    with compilations() as count:
        for prompt, decoding in zip(prompts(), DECODINGS, strict=True):
            list(ours.tokens(prompt, decoding))
        together = [ours.begin(prompt, decoding, 3) for prompt, decoding in zip(prompts(), DECODINGS, strict=True)]
        for answer in together:
            while not answer.is_read:
                ours.read(answer)
        ours.step(together[:3])
    assert count() == 0


def test_log_probabilities_are_those_of_the_model():
    ours, prompt = conversations(), prompts()[0]
    answer = ours.begin(prompt, Decoding(3, temperature=2.0, seed=1), 4)
    ours.read(answer)
    ours.read(answer) if not answer.is_read else None
    ours.step([answer])
    ids = np.append(prompt.input_ids, answer.tokens[0])
    hidden, _ = qwen2_vl.forward(
        VLM_CONFIG, VLM, jax.tree.map(jax.numpy.asarray, ENCODER.batch([type(prompt)(ids, prompt.images)]))
    )
    both = jax.nn.log_softmax(qwen2_vl.logits(VLM_CONFIG, VLM, hidden)[0, -2:])
    for own, (logprob, others), token in zip(both, answer.logprobs, answer.tokens, strict=True):
        assert logprob == pytest.approx(float(own[token]), abs=1e-4)
        assert [token for token, _ in others] == np.argsort(-own)[:4].tolist()
        np.testing.assert_allclose([value for _, value in others], np.sort(own)[::-1][:4], atol=1e-4)


# ---- Text


def stream(text: str, stop=(), tokenizer=ENCODER.tokenizer) -> tuple[str, bool, list[str]]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.add(token) for token in tokenizer(text)["input_ids"]]
    pieces.append(stream.end())
    return "".join(pieces), stream.stopped, pieces


def test_text_comes_in_complete_characters():
    text = "Füße, 数字 and 🙂 together"
    found, stopped, pieces = stream(text)
    assert found == text and not stopped
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) and len(pieces) > 5


def test_text_before_a_stop_string_is_kept_where_an_answer_ends_inside_a_character():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return b"".join((b"abc", b"x, \xf0\x9f")[token] for token in tokens).decode(errors="replace")

    stream = TextStream(Bytes(), [", "])
    assert stream.add(0) + stream.add(1) + stream.end() == "abcx" and stream.stopped


@pytest.mark.parametrize(
    "stop, left", [(["seven"], "a hand "), (["and s", "zzz"], "a h"), (["n!"], "a hand seven"), (["!", "hand"], "a ")]
)
def test_text_ends_before_a_stop_string(stop, left):
    found, stopped, _ = stream("a hand seven", stop)
    assert found == left and stopped == (left != "a hand seven")
