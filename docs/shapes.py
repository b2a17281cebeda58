"""Makes the folder `shapes` of docs/coloured-shapes.md, from the package easy-vqa (pip install easy-vqa==1.0).

4,000 pictures of one coloured shape each, 64×64, with questions. Captions say what the answers tell of shape and
colour, and what the pixels tell of size and place: "a small red circle at the top left". A picture whose answers do not
tell has questions only. The others are also asked for their caption. Questions about shapes are in the folder twice:
shapes are harder to see than colours, about which there are twice as many questions.
"""

import json
from pathlib import Path

import easy_vqa
import numpy as np
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the middle", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
DESCRIBE = "What is in the image?"
SMALL = 20  # pixels, of the longer side: about as many shapes are smaller as are larger


def named(pairs: list[tuple[str, str]], words: tuple[str, ...]) -> set[str]:
    """Those of the words that questions and answers say are in a picture."""
    said = set()
    for question, answer in pairs:
        denied = bool({"not", "no"} & set(question.split()))
        if answer in ("yes", "no") and (answer == "yes") == denied:
            continue  # this says what is not there
        said |= {word for word in words if word in f"{question} {answer}"}
    return said


def size_and_place(picture: Path) -> tuple[str, str]:
    """Where the shape is, and whether it is small, from the pixels that differ from the ground."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    y, x = np.nonzero(np.abs(pixels - np.median(edge, axis=0)).sum(axis=-1) > 60)
    longest = max(np.ptp(y), np.ptp(x)) + 1
    row, column = ((low + high) * 3 // (2 * len(pixels)) for low, high in ((y.min(), y.max()), (x.min(), x.max())))
    return "small" if longest < SMALL else "large", PLACES[row][column]


def times(question: str, answer: str) -> int:
    """How often the folder has a question."""
    about_shape = answer in SHAPES or (answer in ("yes", "no") and any(shape in question for shape in SHAPES))
    return 2 if about_shape else 1


folder, pairs, captions = Path("shapes"), {}, 0
folder.mkdir(exist_ok=True)
for question, answer, number in zip(*easy_vqa.get_train_questions(), strict=True):
    pairs.setdefault(number, []).append((question, answer))
with (folder / "metadata.jsonl").open("w") as lines:
    for number, path in easy_vqa.get_train_image_paths().items():
        (folder / f"{number}.png").write_bytes(Path(path).read_bytes())
        record = {"file_name": f"{number}.png"}
        shapes, colours = named(pairs[number], SHAPES), named(pairs[number], COLOURS)
        if len(shapes) == len(colours) == 1:
            size, place = size_and_place(path)
            record["text"] = f"a {size} {colours.pop()} {shapes.pop()} {place}"
            pairs[number].append((DESCRIBE, record["text"]))
            captions += 1
        record["questions"] = [
            {"question": question, "answer": answer}
            for question, answer in pairs[number]
            for _ in range(times(question, answer))
        ]
        lines.write(json.dumps(record) + "\n")
asked = sum(map(len, pairs.values())) - captions
print(f"{len(pairs):,} pictures, {captions:,} of them with a caption, {asked:,} questions")
