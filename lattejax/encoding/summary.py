"""What an encoding holds: counts, lengths, duplicates, what was left out and why, and a sheet of its pictures."""

import collections
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from lattejax.configuration import Config
from lattejax.data import conversations
from lattejax.data import tokenizer as tokenizers
from lattejax.data.latents import LatentSource
from lattejax.data.pipeline import every
from lattejax.data.prompts import PromptEncoder, prompt_encoder
from lattejax.data.stored import CAPTIONS, LATENTS, QUESTIONS, SPLITS, SUMMARY, StoredRecords
from lattejax.encoding.written import File, Written
from lattejax.files import read_json, write_atomically, write_with
from lattejax.sampling.grid import contact_sheet
from lattejax.sampling.images import decode_images
from lattejax.weights.autoencoders import StoredAutoencoder

SHEET = "contact_sheet.png"
ON_THE_SHEET = 48  # pictures


def limits(config: Config) -> dict[str, int]:
    """The most tokens of what training reads, by the config's keys."""
    return {key: getattr(config.data, key) for key in ("prompt_length", "answer_length")}


def is_summarized(out: epath.Path, config: Config) -> bool:
    """Whether there is a summary, with the config's limits."""
    return (out / SUMMARY).exists() and read_json(out / SUMMARY).get("limits") == limits(config)


def write_summary(
    out: epath.Path,
    config: Config,
    written: dict[File, Written],
    stored: StoredAutoencoder,
    encoder: PromptEncoder | None,
) -> None:
    """Writes a contact sheet, whose pictures are decoded from the latents, and writes and prints a summary.

    The summary comes last: if it is there, both are complete. Lengths are in tokens. Without an encoder, a tokenizer is
    trained on the texts, the same that training will make.
    """
    source = LatentSource.at(out)
    if encoder is None:
        encoder = prompt_encoder(config, tokenizers.train(source.texts(), config.tokenizer.vocab_size))
    summary = {split: summarize(source, split, encoder, config) for split in SPLITS}
    summary["limits"] = limits(config)
    summary["left_out"] = [line for one in written.values() for line in one.shard.left_out]
    if source.has_drawings:
        sheet = draw_sheet(source, stored)
        write_with(out / SHEET, lambda file: sheet.save(file, "PNG"))
    write_atomically(out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    print("\n".join(as_text(summary)))
    if source.has_drawings:
        print(f"{out / SHEET} shows pictures of it, decoded from their latents")


def summarize(source: LatentSource, split: str, encoder: PromptEncoder, config: Config) -> dict[str, Any]:
    """Counts, lengths and duplicates of one split, and what training will refuse as too long."""
    prompts, questions, answers, digests = Lengths(encoder), Lengths(encoder), Lengths(encoder), []
    for record in records_of(source, split, CAPTIONS):
        digests.append(int(record["digest"], 16))
        for text, _ in record["prompts"]:
            prompts.see(text)
    for record in records_of(source, split, QUESTIONS):
        for message in conversations.from_json(record):
            of_role = {"user": questions, "assistant": answers}.get(message.role)
            if of_role is not None:
                of_role.see(conversations.text_of(message.content))
    counts = np.unique(np.array(digests, np.uint64), return_counts=True)[1]
    return {
        "pictures": len(digests),
        "latents": sum(shard.files[LATENTS].records for shard in source.shards[split]),
        "duplicate_pictures": int(len(digests) - len(counts)),
        "conversations": sum(shard.files[QUESTIONS].records for shard in source.shards[split]),
        "prompts": prompts.figures(),
        "questions": questions.figures(),
        "answers": answers.figures(),
        "with_template": measure(source, split, encoder, config),
    }


def measure(source: LatentSource, split: str, encoder: PromptEncoder, config: Config) -> dict[str, dict[str, int]]:
    """The longest of what training reads, in tokens with the chat template's, and how many exceed the limit."""
    drawings = source.drawings(split, encoder) if source.has_drawings else None
    read = {"prompt_length": drawings, "answer_length": source.questions(split, encoder)}
    figures = {}
    for key, limit in limits(config).items():
        prompts = read[key].without_pixels() if read[key] else ()
        counts = collections.Counter(len(prompt.input_ids) for prompt in prompts)
        too_long = sum(count for length, count in counts.items() if length > limit)
        figures[key] = {"longest": max(counts, default=0), "too_long": too_long}
    return figures


def records_of(source: LatentSource, split: str, kind: str) -> Iterator[Any]:
    files = [shard.files[kind] for shard in source.shards[split]]
    return map(json.loads, every(StoredRecords(source.directory, files)))


class Lengths:
    """The distribution of texts' lengths."""

    def __init__(self, encoder: PromptEncoder):
        self._encoder, self._counts = encoder, collections.Counter()

    def see(self, text: str) -> None:
        self._counts[len(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"])] += 1

    def figures(self) -> dict[str, int]:
        """How many there are, the median, the 99th percentile and the maximum; only the number if there are none."""
        total, lengths = self._counts.total(), sorted(self._counts)
        if not total:
            return {"count": 0}
        ends = np.cumsum([self._counts[length] for length in lengths])
        median, most = (lengths[int(np.searchsorted(ends, share * total))] for share in (0.5, 0.99))
        return {"count": total, "median": median, "p99": most, "longest": lengths[-1]}


def as_text(summary: dict[str, Any]) -> Iterable[str]:
    for split in SPLITS:
        one = summary[split]
        yield f"{split}: {one['pictures']:,} pictures, {one['duplicate_pictures']:,} of which repeat another"
        for name in ("prompts", "questions", "answers"):
            figures = one[name]
            if figures["count"]:
                yield (
                    f"  {figures['count']:,} {name} of {figures['median']} tokens (median), "
                    f"{figures['p99']} (99 %), {figures['longest']} (longest)"
                )
        for key, figures in one["with_template"].items():
            if figures["longest"]:
                yield f"  data.{key}={summary['limits'][key]}; {figures['longest']} tokens are used, with the template"
            if figures["too_long"]:
                yield f"  training will refuse {figures['too_long']:,} that are longer than data.{key}: set it higher"
    reasons = summary["left_out"]
    yield f"left out: {len(reasons):,}" + (f", for instance: {reasons[0]}" if reasons else "")


def draw_sheet(source: LatentSource, stored: StoredAutoencoder) -> Any:
    """A sheet of some training pictures, the same for the same data."""
    drawings = source.drawings("train")
    count = len(drawings) // source.views
    chosen = np.random.default_rng(0).permutation(count)[:ON_THE_SHEET]
    latents, captions = [], []
    for index in sorted(chosen.tolist()):
        latent, texts = drawings.latents_and_texts(index * source.views)
        latents.append(latent)
        captions.append(texts[0])
    images = decode_images(stored.autoencoder, stored.weights("decoder"), np.stack(latents))
    return contact_sheet(np.asarray(images), captions)
