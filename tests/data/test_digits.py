"""The digits: a fixed split, and questions with correct answers."""

import collections

import numpy as np
from PIL import Image

from lattejax.data import digits
from lattejax.data.pipeline import Batches, every
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.pixels import PixelConfig
from lattejax.sampling.images import decode_images
from tests.helpers import encoder_for, tiny_config


def test_the_split_is_disjoint_complete_and_balanced():
    train, test = digits.load("train"), digits.load("test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    counts = collections.Counter(test.labels.tolist())
    assert min(counts.values()) >= 34 and max(counts.values()) <= 37
    assert test.images.max() == 255 and test.images.dtype == np.uint8


def test_answers_are_correct():
    for label, word in enumerate(digits.WORDS):
        for index in range(20):
            assert digits.question_and_answer(label, 0, index)[1] == word
            assert digits.question_and_answer(label, 1, index)[1] == word
            assert digits.question_and_answer(label, 2, index)[1] == ("odd" if label % 2 else "even")
            question, answer = digits.question_and_answer(label, 3, index)
            assert (word in question) == (answer == "yes")


def test_latents_decode_to_the_pictures():
    source = digits.Drawings("test", encoder_for(tiny_config()), "captions")
    pixels = np.asarray(decode_images(Autoencoder(PixelConfig()), {}, source.latents))
    np.testing.assert_array_equal(pixels, digits.load("test").images)
    (drawing,) = source.__getitems__([5])
    (prompt,) = drawing.prompts
    assert prompt.caption == f"a handwritten {digits.WORDS[source.labels[5]]}"


def test_picture_prompts_show_another_picture_of_the_same_digit():
    """Every picture of the split is shown once, never as its own prompt."""
    encoder = encoder_for(tiny_config())
    source = digits.Drawings("test", encoder, "pictures")
    others = source._others()
    assert sorted(others) == list(range(len(source))) and np.all(others != np.arange(len(source)))
    np.testing.assert_array_equal(source.labels[others], source.labels)
    shown = encoder.read_image(Image.fromarray(digits.load("test").images[others[7]]))
    (drawing,) = source.__getitems__([7])
    (prompt,) = drawing.prompts
    np.testing.assert_array_equal(prompt.images[0].patches, shown.patches)
    assert prompt.caption == digits.REQUEST
    asked = [source.__getitems__([int(np.flatnonzero(source.labels == label)[0])])[0] for label in range(10)]
    for request, drawing in zip(digits.requests(encoder, "pictures"), asked, strict=True):
        np.testing.assert_array_equal(request.images[0].patches, drawing.prompts[0].images[0].patches)
        assert digits.REQUEST in encoder.tokenizer.decode(request.input_ids)


class Indices:
    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return list(map(int, indices))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def batches(seed=0):
    return Batches(Indices(), lambda records, positions: list(records), batch_size=4, seed=seed, threads=2)


def test_batches_depend_only_on_the_seed_and_cover_every_epoch():
    first = take(batches(), 10)
    assert first == take(batches(), 10) != take(batches(seed=1), 10)
    flat = [number for batch in first for number in batch]
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs), "batches span epochs"
    assert epochs[0] != epochs[1], "each epoch has another shuffle"


def test_a_reader_resumes_where_its_state_was_taken():
    """Although it has prefetched more batches than it has returned."""
    iterator = batches()
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 5)
    resumed = batches()
    resumed.set_state(state)
    assert take(resumed, 5) == expected


def test_every_question_fits_the_configs_length():
    config = tiny_config()
    for split in ("train", "test"):
        questions = digits.Questions(split, encoder_for(config))
        assert max(len(question.input_ids) for question in every(questions)) <= config.data.answer_length
