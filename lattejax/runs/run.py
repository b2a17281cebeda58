"""Reading a run, for `sample`, `chat`, and runs that start from it."""

import dataclasses
import functools
import json

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import tokenizer as tokenizers
from lattejax.data.identity import Identity
from lattejax.data.prompts import PromptEncoder, prompt_encoder
from lattejax.errors import UserError
from lattejax.files import read_json, resolve_path, write_atomically
from lattejax.models import functional, latte_flow
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.parallel import hosts, rules
from lattejax.parallel.mesh import make_mesh, one_device
from lattejax.runs import exports
from lattejax.runs.checkpoints import Checkpoints
from lattejax.runs.records import best_step, read_records
from lattejax.runs.shapes import abstract_params, abstract_trained
from lattejax.runs.workdir import Workdir
from lattejax.weights import hugging_face, shards, trees
from lattejax.weights.autoencoders import StoredAutoencoder
from lattejax.weights.pretrained import GENERATION, Generation, Pretrained, is_converted


@dataclasses.dataclass(frozen=True)
class Run:
    """A run opened for reading; its weights are read directly to their devices on the mesh, see `parallel.rules`."""

    workdir: Workdir
    config: Config
    mesh: Mesh
    checkpoint: str = ""  # the second stage's, by its step; "best": see config.checkpoint.best; empty: the latest

    @classmethod
    def open(cls, path: epath.PathLike, mesh: Mesh | None = None, checkpoint: str = "") -> "Run":
        """Opens a run or an export, also hf://owner/name of the hub, for one device if no mesh is given. Raises
        `UserError` if there is none, or it lacks the checkpoint that is asked for."""
        workdir = Workdir.at(hugging_face.on_disk(path))
        if not workdir.config.exists():
            raise UserError(f"{path} is not the workdir of a run: it has no config.json")
        run = cls(workdir, configuration.load(workdir.config), one_device() if mesh is None else mesh, checkpoint)
        if checkpoint:
            _ = run.trained_step  # raises if there is none
        return run

    def pinned(self) -> "Run":
        """This run at the checkpoint that is its latest now, or that was asked for; all processes must call it.

        What is read twice is the same, also while the run trains on. If the checkpoint is damaged, reading it raises.
        """
        step = None if self.is_export else self.trained_step
        step = int(hosts.from_first(np.asarray(-1 if step is None else step)))
        return self if step < 0 else dataclasses.replace(self, checkpoint=str(step))

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        return prompt_encoder(self.config, tokenizers.load(self.workdir.tokenizer), self.generation.stop_tokens)

    @property
    def vlm_config(self) -> VLMConfig:
        return self.config.model_config.vlm

    @property
    def is_export(self) -> bool:
        """Whether this is an export, see `runs.publishing`: it has weights, but cannot resume training."""
        return shards.are_stored(self.workdir.path)

    @property
    def has_vlm(self) -> bool:
        """Whether the first stage has finished."""
        return trees.is_complete(self.workdir.vlm) or self.workdir.vlm_reference.exists()

    @property
    def has_all_weights(self) -> bool:
        """Whether both stages have stored weights, so that it resumes without those that it started from."""
        return self.has_vlm and self.trained_step is not None

    def check_vlm(self) -> None:
        """Raises `UserError` unless it has a VLM to read."""
        if not self.is_export and not self.has_vlm:
            raise UserError(f"{self.workdir.path} has no finished VLM yet; complete its first stage of training")

    def check_pathway(self) -> None:
        """Raises `UserError` unless it has weights of the second stage to read."""
        if not self.is_export and self.trained_step is None:
            raise UserError(f"{self.workdir.path} has no checkpoint of the generation pathway yet; train it first")

    def pretrained_vlm(self, dtype: str = "float32") -> Params:
        """Reads the final weights of the first stage, stacked.

        Raises:
          UserError: it has not finished, or the converted weights that it refers to are missing or have changed.
        """
        if (converted := self.converted_vlm()) is not None:
            return converted.params(dtype, self.mesh)
        self.check_vlm()
        vlm = trees.load_weights(self.workdir.vlm, rules.abstract(self.mesh, abstract_params(self.config)["vlm"]))
        return functional.cast_floats(vlm, dtype)

    def converted_vlm(self) -> Pretrained | None:
        """The converted weights that the run uses unchanged, if it does."""
        if not self.workdir.vlm_reference.exists():
            return None
        reference = read_json(self.workdir.vlm_reference)
        path = reference.get("path")
        if not isinstance(path, str) or not isinstance(reference.get("sha256"), dict):
            raise UserError(f"{self.workdir.vlm_reference} does not name converted weights: {reference!r:.200}")
        source = Pretrained.open(path)
        if source.record["sha256"] != reference["sha256"]:
            raise UserError(f"{path} holds other weights than {self.workdir.path} was trained with")
        return source

    @functools.cached_property
    def generation(self) -> Generation:
        """The decoding settings of the checkpoint that the run or the exported run started from, if there is one."""
        return Generation.read(self.generation_file.parent)

    @property
    def generation_file(self) -> epath.Path:
        converted = None if self.is_export else self.converted_vlm()
        return self.workdir.path / GENERATION if converted is None else converted.generation_file

    def refer_to(self, source: Pretrained) -> None:
        """Uses converted weights as those of the first stage, without copying them."""
        reference = {"path": str(source.directory), "sha256": source.record["sha256"]}
        write_atomically(self.workdir.vlm_reference, (json.dumps(reference, indent=2) + "\n").encode())

    def open_autoencoder(self, path: str = "") -> StoredAutoencoder:
        """Opens the autoencoder of the run's latents, at the config's path, or at `path` if it has moved.

        Raises:
          UserError: there is none, or its weights, scale or shift differ.
        """
        path = path or self.config.data.autoencoder
        stored = StoredAutoencoder.open(path, self.config.data.latent_shape[2])
        Identity.load(self.workdir.autoencoder).check(stored.identity, f"the run {self.workdir.path}", path)
        return stored

    def trained(self, target: Config | None = None) -> Params:
        """Reads the average of the second stage's trained weights, float32, from its latest undamaged checkpoint."""
        if self.is_export:
            params = exports.read(self.workdir.path, abstract_params(target or self.config))
            return rules.place(self.mesh, latte_flow.split_trained(self.config.model_config, params)[0])
        self.check_pathway()
        average = rules.abstract(self.mesh, abstract_trained(target or self.config))
        item = "ema" if self.config.train.ema_decay else "params"  # without averaging, the weights themselves
        checkpoints = Checkpoints(self.workdir.checkpoints("train"))
        if self.checkpoint:
            return checkpoints.restore(self.trained_step, **{item: average})[item]
        return checkpoints.restore_latest(move_damaged=False, **{item: average})[1][item]

    @property
    def trained_step(self) -> int | None:
        """The step of the second stage's latest checkpoint, if it has one, or of the one that was asked for.

        Raises:
          UserError: there is none of that step, or none is known to be the best.
        """
        directory = self.workdir.checkpoints("train")
        steps = Checkpoints(directory).steps if directory.exists() else []
        if not self.checkpoint:
            return steps[-1] if steps else None
        if self.checkpoint == "best":
            if not (best := self.config.checkpoint.best):
                raise UserError(f"{self.workdir.path} has no best checkpoint: its config.checkpoint.best is empty")
            step = best_step(read_records(self.workdir.metrics), best, steps)
        else:
            step = next((step for step in steps if str(step) == self.checkpoint), None)
        if step is None:
            raise UserError(
                f"{self.workdir.path} has no checkpoint {self.checkpoint!r}; it has those of the steps "
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        return step

    def params(self, dtype: str = "float32") -> Params:
        """Reads the complete model's weights: the VLM's, overridden by the average of the trained weights."""
        if self.is_export:
            in_dtype = functools.partial(functional.cast_floats, dtype=dtype)
            target = jax.eval_shape(in_dtype, abstract_params(self.config))
            return rules.place(self.mesh, exports.read(self.workdir.path, target))
        trained = functional.cast_floats(self.trained(), dtype)
        return functional.merge({"vlm": self.pretrained_vlm(dtype)}, trained)

    def vlm(self) -> Params:
        """Reads the VLM's weights: the first stage's, or in Blend those that the second stage has trained so far."""
        if self.is_export:
            params = exports.read(self.workdir.path, abstract_params(self.config), only="vlm.")
            return rules.place(self.mesh, params["vlm"])
        if self.config.model_config.shares_layers and self.trained_step is not None:
            return self.params()["vlm"]
        return self.pretrained_vlm()


def open_vlm(path: epath.PathLike, mesh: Mesh | None = None) -> Run | Pretrained:
    """Opens a VLM to start from: converted weights, or a run or an export (see `Run.open`)."""
    path = hugging_face.on_disk(path)
    return Pretrained.open(path) if is_converted(resolve_path(path)) else Run.open(path, mesh)


def open_mesh(config: Config) -> Mesh:
    """Makes the config's mesh of all devices of all processes; raises `UserError` if they do not fit."""
    try:
        return make_mesh(dataclasses.asdict(config.mesh))
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
