"""`--mesh auto`: the split of the devices that roofline.plan predicts to be fastest, as a configuration."""

from __future__ import annotations

from dataclasses import asdict, replace

import jax

from jaxrl.cli import load_config
from jaxrl.config import Config, MeshConfig
from models.config import ModelConfig
from roofline.hardware import Hardware
from roofline.job import Job
from roofline.plan import advise, assumed_lengths, choice
from roofline.settings import settings_from
from roofline.splits import Split


def resolved_before(config: Config) -> Config | None:
    """`config` with what was chosen when the run in its folder began; None: there is none."""
    path = config.run.dir / "config.yaml"
    if not path.is_file():
        return None
    chosen = load_config(path)
    return _on(config, chosen.mesh, chosen.rollout.slots, chosen.train.rows_per_microbatch)


def resolve(config: Config, model: ModelConfig, hardware: Hardware) -> tuple[Config, list[str]]:
    """`config` with the mesh, slots and micro-batch of the best split of this process's devices, and
    what was chosen and why.

    Raises:
        ValueError: no split of the devices fits; the message names the fewest that do.
    """
    settings = settings_from(asdict(config))
    job = Job(model=model, settings=settings, lengths=assumed_lengths(settings))
    devices = len(jax.local_devices())
    advice = advise(job, hardware, devices)
    return with_split(config, advice.best), choice(advice, job, devices)


def with_split(config: Config, split: Split) -> Config:
    """`config` on the devices of `split`."""
    mesh = MeshConfig(
        colocated=split.colocated,
        learner_data=split.learner.data, learner_fsdp=split.learner.fsdp,
        learner_tensor=split.learner.tensor,
        rollout_data=split.rollout.data, rollout_tensor=split.rollout.tensor,
    )  # fmt: skip
    return _on(config, mesh, split.slots, split.rows_per_microbatch)


def _on(config: Config, mesh: MeshConfig, slots: int, rows: int) -> Config:
    return replace(
        config,
        mesh=mesh,
        rollout=replace(config.rollout, slots=slots),
        train=replace(config.train, rows_per_microbatch=rows),
    )
