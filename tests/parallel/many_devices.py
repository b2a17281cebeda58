"""Run by test_meshes.py in a separate process, on simulated devices: ten training steps and a sampling call on one
device, and on each of the given meshes (e.g. 4x2x1x1: expert, data, fsdp, tensor); prints JSON.

The first argument is the model's number of groups, of two layers each."""

import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from lattejax.data.examples import image_batcher
from lattejax.flow.schedule import Sampling
from lattejax.models import functional, latte_flow, qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.pixels import PixelConfig
from lattejax.parallel import rules
from lattejax.parallel.collectives import traffic
from lattejax.parallel.mesh import AXES, make_mesh
from lattejax.pods import programs
from lattejax.runs.checkpoints import Checkpoints
from lattejax.runs.data import open_data
from lattejax.runs.inference import inference_weights
from lattejax.sampling.images import ImageSampler
from lattejax.training.generation_stage import flow_loss, flow_step, frozen_inputs
from lattejax.training.layout import stage_rows
from lattejax.training.step import abstract_state, compile_for, init_state
from tests.helpers import encoder_for, randomize, tiny_config

STEPS = 10
SHARED = dict(train__batch_size=64, train__accumulation=2, train__learning_rate=1e-2, train__prompt_dropout=0.2)
OWN_PROMPTS = dict(train__batch_size=32, train__share_contexts=False)
OWN_ENDS = dict(model__shared_ends=False, train__clip_by="group")


class Trial:
    """A config, its weights and its first batches, equal for all meshes."""

    def __init__(self, config, steps: int):
        self.config, self.encoder, self.source = config, encoder_for(config), open_data(config)
        model = config.model_config
        params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
        self.trained, self.fixed = latte_flow.split_trained(model, randomize(params, scale=0.1))
        self.rows = stage_rows(config)["train"]
        drawings, size = self.source.drawings("train", self.encoder), config.train.batch_size
        batcher = image_batcher(config, self.encoder, self.source.captions)
        self.batches = [batcher(drawings.__getitems__(range(i * size, (i + 1) * size))) for i in range(steps)]

    def run(self, mesh, dtype) -> dict:
        """Trains on a mesh; returns losses, parameters, and the compiled step."""
        stage = self.config.train
        loss = flow_loss(self.config)
        loss = type(loss)(**{**vars(loss), "dtype": jnp.dtype(dtype)})
        trained, fixed = functional.cast_floats((self.trained, self.fixed), dtype)
        frozen = frozen_inputs(self.config, self.encoder, self.source.captions, rules.place(mesh, fixed), mesh)
        abstract = abstract_state(stage, trained, mesh)
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        state = jax.jit(lambda params: init_state(stage, params), out_shardings=placed)(trained)
        step = compile_for(mesh, flow_step(self.config, loss), state, frozen, self.rows)
        key = jax.device_put(jax.random.key(5), rules.replicated(mesh))
        losses = []
        for batch in self.batches:
            images = {"images": self.rows["images"].place(mesh, batch)}
            if not losses:
                step = step.lower(state, frozen, images, key).compile()
            state, metrics = step(state, frozen, images, key)
            losses.append(float(metrics["loss"]))
        return {"losses": losses, "state": state, "step": step, "frozen": frozen}


def draw(trial: Trial, mesh) -> np.ndarray:
    params = rules.place(mesh, functional.merge(trial.trained, trial.fixed))
    weights = inference_weights(trial.config, params, mesh)
    sampler = ImageSampler(trial.config.model_config, Autoencoder(PixelConfig()), trial.encoder, weights, {}, mesh)
    prompts = [trial.encoder.drawing(text) for text in ("a handwritten seven", "a handwritten two")]
    return sampler(prompts, Sampling(6, guidance=3.0), images_per_prompt=5, batch_size=10).astype(int)


def largest_difference(ours, theirs) -> float:
    """The largest difference over all leaves, relative to the largest entry of theirs."""
    pairs = zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def same_bits(ours, theirs) -> bool:
    pairs = zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def drawn(trial: Trial, mesh) -> tuple:
    """The batch, and all random draws for its rows, as placed on the mesh."""
    rows, loss = trial.rows["images"], flow_loss(trial.config)
    batch = rows.place(mesh, trial.batches[0])
    keys = rows.place(mesh, np.arange(trial.config.train.batch_size, dtype=np.uint32))
    fold = jax.vmap(jax.vmap(jax.vmap(lambda row: jax.random.fold_in(jax.random.key(5), row))))
    return batch, jax.jit(lambda rows: loss.draw(fold(rows)))(keys)


def read_over_tensor() -> dict:
    """Reads a picture and a question on four devices over `tensor`, with the two KV heads replicated. Returns the
    difference of the hidden states from one device's, and the numbers of collectives."""
    config = tiny_config(model__vision__num_heads=4, model__vision__embed_dim=32)
    model, encoder = config.model_config.vlm, encoder_for(config)
    picture = encoder.read_image(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB"))
    prompts = encoder.batch([encoder.question("Which digit is this?", [picture])])
    vlm = functional.cast_floats(randomize(qwen2_vl.init(model, jax.random.key(0)), scale=0.1), "float64")
    read = jax.jit(lambda vlm: qwen2_vl.forward(model, vlm, prompts)[0])
    placed = rules.place(make_mesh({"tensor": 4}, jax.devices()[:4]), vlm)
    compiled = read.lower(placed).compile()
    sent = {kind: one.count for kind, one in traffic(compiled.as_text(), 4).items()}
    return {"hidden": largest_difference(compiled(placed), read(vlm)), "sent": sent}


def sent_over_fsdp() -> float:
    """How much each of four devices on `fsdp` sends in a step of Blend, whose rows read prompts and questions with
    pictures; as a multiple of all weights. Compiled only."""
    settings = dict(model__variant="blend", train__answer_batch_size=32, train__unroll=False, mesh__fsdp=4)
    program = programs.train_step(tiny_config(**OWN_PROMPTS | settings), make_mesh({"fsdp": 4}, jax.devices()[:4]), 10)
    weights = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((program.parts["parameters"], program.parts["frozen"]))
    )
    return sum(one.sent_bytes for one in traffic(program.compile().as_text(), 4).values()) / weights


def sent_between_groups() -> float:
    """The bytes that each of two devices sends in a step, if each holds a group that shares nothing. Compiled only."""
    mesh = make_mesh({"expert": 2}, jax.devices()[:2])
    with jax.enable_x64(False):
        compiled = programs.train_step(tiny_config(**OWN_ENDS, mesh__expert=2), mesh, 10).compile()
    return sum(one.sent_bytes for one in traffic(compiled.as_text(), 2).values())


def restored(state, like) -> bool:
    """Whether a state that is saved with its shardings is restored, bit for bit, with the shardings of `like`."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(epath.Path(directory))
        arrays = {name: getattr(state, name) for name in ("params", "ema", "optimizer")}
        checkpoints.save(1, arrays, {})
        checkpoints.wait()
        read = checkpoints.restore(1, **{name: getattr(like, name) for name in arrays})
        places = [jax.tree.map(lambda x: x.sharding, tree) for tree in (read["params"], like.params)]
        checkpoints.close()
        return places[0] == places[1] and all(same_bits(read[name], arrays[name]) for name in arrays)


def collectives(step) -> list[str]:
    """The kinds of collectives, without those that send no more than a group's metrics."""
    return sorted(kind for kind, one in traffic(step.as_text(), jax.device_count()).items() if one.sent_bytes > 1024)


def on_each_device(tree) -> list[int]:
    """The numbers of layers on each device."""
    return sorted({shard.data.shape[0] for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards})


def main(groups: int, meshes: list[str]) -> None:
    alone = make_mesh({}, jax.devices()[:1])
    model = dict(model__num_groups=groups, model__text__num_layers=2 * groups)
    shared, own = (
        Trial(tiny_config(**model, **settings), steps)
        for settings, steps in ((SHARED, STEPS), (OWN_PROMPTS | OWN_ENDS, 2))
    )
    wide, read, images = shared.run(alone, "float64"), own.run(alone, "float32"), draw(shared, alone)
    found = {}
    for name in meshes:
        mesh = make_mesh(dict(zip(AXES, map(int, name.split("x")), strict=True)))
        ours = shared.run(mesh, "float64")
        found[name] = {
            "parameters": largest_difference(ours["state"].params, wide["state"].params),
            "average": largest_difference(ours["state"].ema, wide["state"].ema),
            "losses": largest_difference(ours["losses"], wide["losses"]),
            "restored": restored(ours["state"], wide["state"]) and restored(wide["state"], ours["state"]),
            "same_draws": same_bits(drawn(shared, mesh), drawn(shared, alone)),
            "images": int(np.abs(draw(shared, mesh) - images).max()),
            "collectives": collectives(ours["step"]),
            "layers_of_state": on_each_device((ours["state"].params["experts"], ours["state"].ema["experts"])),
            "layers_of_contexts": on_each_device(ours["frozen"].contexts.layers),
            "moved": largest_difference(ours["state"].params, functional.cast_floats(shared.trained, "float64")),
        }
    # Rows with their own prompts, and float32, only on the first mesh: each needs another compilation.
    mesh = make_mesh(dict(zip(AXES, map(int, meshes[0].split("x")), strict=True)))
    ours = own.run(mesh, "float32")
    found[meshes[0]] |= {
        "own_prompts": largest_difference(ours["losses"], read["losses"]),
        "own_prompts_collectives": collectives(ours["step"]),
    }
    if jax.device_count() == 8:
        narrow, float32 = shared.run(alone, "float32"), shared.run(mesh, "float32")
        found[meshes[0]]["float32_losses"] = largest_difference(float32["losses"], narrow["losses"])
    found[meshes[0]] |= {
        "read_over_tensor": read_over_tensor(),
        "sent_over_fsdp": sent_over_fsdp(),
        "sent_between_groups": sent_between_groups(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
