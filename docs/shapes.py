"""Makes the folder `shapes` of docs/data.md, from the package easy-vqa (pip install easy-vqa==1.0).

4,000 pictures of one coloured shape each, with questions. Captions follow from what their answers say is true.
"""

import json
from pathlib import Path

import easy_vqa

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def named(pairs: list[tuple[str, str]], words: tuple[str, ...]) -> set[str]:
    """Which of the words the true statements about a picture name: at most one."""
    texts = [f"{question} {answer}" for question, answer in pairs if not {"not", "no"} & {*question.split(), answer}]
    return {word for word in words if any(word in text for text in texts)}


folder, pairs = Path("shapes"), {}
folder.mkdir(exist_ok=True)
for question, answer, number in zip(*easy_vqa.get_train_questions(), strict=True):
    pairs.setdefault(number, []).append((question, answer))
with (folder / "metadata.jsonl").open("w") as lines:
    for number, path in easy_vqa.get_train_image_paths().items():
        (folder / f"{number}.png").write_bytes(Path(path).read_bytes())
        record = {"file_name": f"{number}.png"}
        record["questions"] = [{"question": question, "answer": answer} for question, answer in pairs[number]]
        colours, shapes = named(pairs[number], COLOURS), named(pairs[number], SHAPES)
        if len(colours) == len(shapes) == 1:
            record["text"] = f"a {colours.pop()} {shapes.pop()}"
        lines.write(json.dumps(record) + "\n")
