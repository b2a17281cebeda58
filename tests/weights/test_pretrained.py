"""From a Hugging Face checkpoint to ours and back: bit for bit, with errors for broken files, and onto a mesh."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from orbax.checkpoint.experimental import v1 as ocp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig

from lattejax.errors import UserError
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.weights import hugging_face, layouts, pretrained
from lattejax.weights.naming import Leaf
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints
from tests.helpers import ENVIRONMENT, ROOT, assert_same_bits, run_command, start_command


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of several shards under the hub's names."""
    model = checkpoints.random_model(checkpoints.tiny_config())
    return checkpoints.save(model, tmp_path_factory.mktemp("source") / "checkpoint", max_shard_size="60KB")


@pytest.fixture(scope="module")
def converted(source):
    pretrained.convert(str(source), source.parent / "converted")
    return source.parent / "converted"


def tensors(directory) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", [True, False], ids=["hub's names", "transformers 5's names"])
def test_there_and_back_every_bit_is_the_same(original, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.shards, "SHARD_BYTES", 30_000)
    model = checkpoints.random_model(checkpoints.tiny_config(tied=original)).to(dtype)
    source = checkpoints.save(model, tmp_path / "source", save_original_format=original, max_shard_size="50KB")
    pretrained.convert(str(source), tmp_path / "ours")
    Pretrained.open(tmp_path / "ours").write_hugging_face(tmp_path / "back")

    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again, report = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype=dtype
    )
    assert not any(report.values()), report
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(same_bits(states[0][name], states[1][name]) for name in states[0])
    if original:
        assert tensors(source).keys() == tensors(tmp_path / "back").keys()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_the_record_names_the_weights_source(source, converted):
    record = json.loads((converted / "conversion.json").read_text())
    assert record["source"] == str(source)
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in source.glob("*.safetensors")}
    assert record["sha256"] == expected and len(expected) > 1


def test_weights_are_read_in_either_dtype(converted):
    wide, narrow = (Pretrained.open(converted).params(dtype) for dtype in ("float32", "bfloat16"))
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        assert a.dtype == jnp.float32 and b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)


def edit(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite(directory, change) -> None:
    """Changes the tensors of a checkpoint and stores them in one file."""
    state = tensors(directory)
    change(state)
    for file in directory.glob("model*"):
        file.unlink()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def text_config(**values):
    return lambda config: config["text_config"].update(values)


NORM, KEYS = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"

# The damage to a checkpoint, and a part of the error message.
BROKEN = {
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "model-00002-of-"),
    "truncated shard": (lambda d: os.truncate(sorted(d.glob("*.safetensors"))[1], 5000), "model-00002-of-"),
    "empty shard": (lambda d: os.truncate(sorted(d.glob("*.safetensors"))[0], 0), "model-00001-of-"),
    "index that is no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "index that is none": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
        "not an index of weights",
    ),
    "both layouts of names": (
        lambda d: rewrite(d, lambda s: s.update({"model.language_model.norm.weight": s[NORM] + 7})),
        "are the same weight",
    ),
    "no weights": (lambda d: [file.unlink() for file in d.glob("model*")], "neither"),
    "missing tensor": (lambda d: rewrite(d, lambda state: state.pop(KEYS)), f"missing: {KEYS}"),
    "unexpected tensor": (lambda d: rewrite(d, lambda s: s.update(extra=torch.ones(2))), "unexpected: extra"),
    "wrong shape": (lambda d: rewrite(d, lambda s: s.update({NORM: torch.ones(2)})), rf"wrong shape: {NORM} \(2,\)"),
    "integers": (lambda d: rewrite(d, lambda s: s.update({NORM: torch.ones(48).int()})), f"{NORM} has dtype I32"),
    "layers of two dtypes": (lambda d: rewrite(d, lambda s: s.update({KEYS: s[KEYS].half()})), "is float16"),
    "other head, though tied": (
        lambda d: rewrite(d, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1})),
        "ties the embeddings",
    ),
    "Qwen2.5-VL": (lambda d: Qwen2_5_VLConfig().save_pretrained(d), "'qwen2_5_vl'"),
    "Qwen3-VL": (lambda d: Qwen3VLConfig().save_pretrained(d), "'qwen3_vl'"),
    "quantized": (lambda d: edit(d / "config.json", lambda c: c.update(quantization_config={"bits": 4})), "quantized"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "width that is no number": (lambda d: edit(d / "config.json", text_config(hidden_size="big")), "config.json"),
    "no heads": (lambda d: edit(d / "config.json", text_config(num_attention_heads=0)), "config.json"),
    "another image token": (lambda d: edit(d / "config.json", lambda c: c.update(image_token_id=5)), "image token"),
    "another geometry": (lambda d: edit(d / "config.json", text_config(intermediate_size=41)), "of the wrong shape"),
    "more layers": (
        lambda d: edit(d / "config.json", text_config(num_hidden_layers=4, layer_types=["full_attention"] * 4)),
        "missing: model.layers.3",
    ),
    "sliding window": (
        lambda d: edit(d / "config.json", text_config(layer_types=["full_attention"] * 2 + ["sliding_attention"])),
        "sliding_attention",
    ),
    "heads that do not divide": (lambda d: edit(d / "config.json", text_config(num_attention_heads=5)), "num_heads=5"),
    "scaled rotary embedding": (
        lambda d: edit(
            d / "config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_type="linear", factor=2.0)
        ),
        "rope_type='linear'",
    ),
    "no sections": (
        lambda d: edit(d / "config.json", lambda c: c["text_config"]["rope_parameters"].pop("mrope_section")),
        "mrope_section",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer_config.json").unlink(), "no tokenizer"),
    "no vocabulary": (lambda d: (d / "tokenizer.json").unlink(), "a vocabulary"),
    "empty tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer in .* cannot be read"),
    "template that is none": (lambda d: (d / "chat_template.jinja").write_text("{% if %}"), "cannot be used"),
    "template file that is none": (lambda d: (d / "chat_template.json").write_text("{"), "not valid JSON"),
    "generation config that is none": (lambda d: (d / "generation_config.json").write_text("{"), "not valid JSON"),
    "image processor that is none": (lambda d: (d / "preprocessor_config.json").write_text("[]"), "image processor"),
    "tokenizer that is none": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer in .* cannot be read"),
    "template without images": (
        lambda d: (d / "chat_template.jinja").write_text("{{ messages[0].role }}"),
        "shows an image 0 times",
    ),
    "no image processor": (
        lambda d: (d / "preprocessor_config.json").unlink(),
        "the image processor in .* cannot be read",
    ),
    "patches of another size": (
        lambda d: edit(d / "preprocessor_config.json", lambda c: c.update(patch_size=14)),
        "patch_size is 14",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_named_and_leaves_nothing_behind(case, source, tmp_path):
    shutil.copytree(source, tmp_path / "checkpoint")
    damage, named = BROKEN[case]
    damage(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=named) as error:
        pretrained.convert(str(tmp_path / "checkpoint"), tmp_path / "out")
    assert len(str(error.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_head_that_copies_the_tied_embedding_is_ignored(source, tmp_path):
    shutil.copytree(source, tmp_path / "checkpoint")
    rewrite(tmp_path / "checkpoint", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    pretrained.convert(str(tmp_path / "checkpoint"), tmp_path / "out")
    assert "lm_head" not in Pretrained.open(tmp_path / "out").params()["text"]["vocabulary"]


def test_the_hubs_older_config_and_template_files_are_read(source, converted, tmp_path):
    """Text geometry at the top level, rotary settings as rope_scaling, the template with images in a separate file,
    pixel bounds under their old names."""
    old = tmp_path / "old"
    shutil.copytree(source, old)

    def flatten(config):
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config.update({**text, "model_type": "qwen2_vl", "rope_theta": rope["rope_theta"], "rope_scaling": scaling})
        config["vision_config"].update(model_type="qwen2_vl", in_chans=3, spatial_patch_size=4)

    edit(old / "config.json", flatten)
    edit(old / "preprocessor_config.json", lambda c: c.update(min_pixels=128, max_pixels=512) or c.pop("size"))
    template = (old / "chat_template.jinja").read_text()
    (old / "chat_template.jinja").unlink()
    (old / "chat_template.json").write_text(json.dumps({"chat_template": template}))

    pretrained.convert(str(old), tmp_path / "out")
    ours, expected = Pretrained.open(tmp_path / "out"), Pretrained.open(converted)
    assert ours.vlm_config == expected.vlm_config
    assert ours.encoder.processor.size == {"shortest_edge": 128, "longest_edge": 512}
    asked = [opened.encoder.question("Which digit is this?").input_ids for opened in (ours, expected)]
    np.testing.assert_array_equal(*asked)


def test_a_template_may_mark_what_the_assistant_says(source, tmp_path):
    """As transformers' templates may, for a mask of the answers."""
    marked = tmp_path / "marked"
    shutil.copytree(source, marked)
    file = marked / "chat_template.jinja"
    file.write_text("{% generation %}" + file.read_text() + "{% endgeneration %}")
    pretrained.convert(str(marked), tmp_path / "out")
    assert Pretrained.open(tmp_path / "out").encoder.question("Which digit is this?").input_ids.size


# ---- Directories


def test_nothing_is_overwritten(source, converted, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file", converted):
        with pytest.raises(UserError, match="exists already"):
            pretrained.convert(str(source), out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_killed_conversion_is_never_taken_for_a_complete_one(source, tmp_path):
    """It is killed while weights are written; the next conversion starts over and finishes."""
    with start_command("convert", f"--source={source}", f"--out={tmp_path / 'out'}") as running:
        while not list(tmp_path.glob("out.partial-*/params*/**/d/*")):
            time.sleep(0.001)
            assert running.poll() is None
        running.send_signal(signal.SIGKILL)
    (left,) = tmp_path.glob("out.partial-*")
    for directory in (tmp_path / "out", left):
        with pytest.raises(UserError, match="no converted weights"):
            Pretrained.open(directory)
    pretrained.convert(str(source), tmp_path / "out")
    Pretrained.open(tmp_path / "out").params()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed one left is removed"


@pytest.mark.parametrize("least", [0, 5000], ids=["everything", "arrays alone"])
def test_damaged_weights_are_one_clear_line(least, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "weights")
    truncated = [file for file in (tmp_path / "weights/params").glob("**/d/*") if file.stat().st_size > least]
    assert truncated
    for file in truncated:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"\w+ in .* cannot be read") as error:
        Pretrained.open(tmp_path / "weights").params()
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_remote_checkpoint_is_refused_before_any_work(converted, tmp_path):
    with pytest.raises(UserError, match="remote"):
        pretrained.convert("gs://bucket/checkpoint", tmp_path / "out")
    with pytest.raises(UserError, match="remote"):
        Pretrained.open(converted).write_hugging_face("gs://bucket/out")


def test_a_hub_id_is_looked_up_in_the_hubs_cache(source, tmp_path):
    """The files are laid out like huggingface_hub's downloads; nothing is fetched from the network."""
    repository = tmp_path / "models--some--vlm"
    shutil.copytree(source, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    environment = ENVIRONMENT | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_command("convert", "--source=some/vlm", f"--out={tmp_path / 'out'}", env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"] == "some/vlm" and record["directory"].endswith("0123abc")

    done = run_command("convert", "--source=some/other", f"--out={tmp_path / 'other'}", env=environment)
    assert done.returncode == 2 and "--source=some/other is no directory" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_hub_model_of_another_kind_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')

    def download(name, revision, allow_patterns):
        assert "*.safetensors" not in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hugging_face.huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="only 'qwen2_vl' can be read"):
        pretrained.convert("some/vlm", tmp_path / "out")


# ---- Meshes


@pytest.fixture
def converted_before(source, tmp_path, monkeypatch):
    """The same weights as an earlier version converted them: without an axis for heads, and with a record of dtypes,
    which is not read. Here the record is damaged."""
    pack = Leaf.pack

    def merged(leaf: Leaf, tensors: Iterator) -> np.ndarray:
        return pack(leaf, tensors).reshape(layouts.merge_axes(leaf.path, leaf.shape))

    monkeypatch.setattr(Leaf, "pack", merged)
    pretrained.convert(str(source), tmp_path / "before")
    stored = ocp.metadata(tmp_path / "before" / "params").metadata
    assert stored["vision"]["blocks"]["attention"]["qkv"]["weight"].shape == (2, 96, 32)
    edit(tmp_path / "before" / "conversion.json", lambda record: record.update(dtypes={"text/norm/scale": "int8"}))
    return tmp_path / "before"


def test_weights_converted_by_an_earlier_version_are_read_and_written_back(
    source, converted, converted_before, tmp_path
):
    before = Pretrained.open(converted_before)
    assert_same_bits(before.params("float32"), Pretrained.open(converted).params("float32"))
    before.write_hugging_face(tmp_path / "back")
    ours, theirs = tensors(tmp_path / "back"), tensors(source)
    assert ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_weights_sharded_over_a_mesh_give_the_same_answers(converted, converted_before):
    """In a separate process with four devices: every array is placed by the rules, and the tokens are the same."""
    answerer = Answerer.load(converted, "float32")
    batch = answerer.encoder.batch([answerer.encoder.question("Which digit is this?")])
    expected = [int(token[0]) for token in answerer.tokens(batch, Decoding(max_tokens=12))]
    program = f"""
        import jax
        from lattejax.errors import UserError
        from lattejax.parallel.mesh import make_mesh
        from lattejax.sampling.answers import Answerer, Decoding
        from lattejax.weights.pretrained import Pretrained
        mesh = make_mesh({{"fsdp": 2, "tensor": -1}})
        weights = Pretrained.open({str(converted)!r}).params("float32", mesh)
        local = lambda array: array.addressable_shards[0].data.shape
        assert local(weights["text"]["vocabulary"]["embedding"]) == (200, 24)
        layers = weights["text"]["layers"]
        assert local(layers["attention"]["q_proj"]["weight"]) == (3, 2, 12, 24)
        assert local(layers["attention"]["q_proj"]["bias"]) == (3, 2, 12)
        blocks = weights["vision"]["blocks"]
        assert local(blocks["attention"]["qkv"]["weight"]) == (2, 3, 1, 16, 16), "a half of the heads of all three"
        assert local(layers["mlp"]["down_proj"]["weight"]) == (3, 24, 20)
        assert local(layers["input_norm"]["scale"]) == (3, 48)
        before = Pretrained.open({str(converted_before)!r}).params("float32", mesh)
        assert jax.tree.map(lambda x: x.sharding, before) == jax.tree.map(lambda x: x.sharding, weights)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, weights))
        answerer = Answerer.load({str(converted)!r}, "float32", mesh)
        assert local(answerer.params["text"]["layers"][0]["mlp"]["down_proj"]["weight"]) == (24, 20)
        batch = answerer.encoder.batch([answerer.encoder.question("Which digit is this?")])
        assert [int(token[0]) for token in answerer.tokens(batch, Decoding(max_tokens=12))] == {expected}
        try:
            Pretrained.open({str(converted)!r}).params(mesh=make_mesh({{"tensor": 3}}, jax.devices()[:3]))
        except UserError as error:
            assert "tensor=3 does not divide" in str(error)
        else:
            raise AssertionError
    """
    environment = ENVIRONMENT | {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_safetensors_carry_transformers_mark(converted, tmp_path):
    Pretrained.open(converted).write_hugging_face(tmp_path / "back")
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
