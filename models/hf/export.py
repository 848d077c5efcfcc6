"""A training run's weights as a Hugging Face folder that transformers and vLLM load.

A run folder keeps in `model/` what its weights mean: config.json, generation_config.json and the
tokenizer's files. `describe_model` writes it, exports copy it. Weights come from the run's orbax
checkpoints, parameter by parameter, without the optimizer state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from models.config import ModelConfig
from models.decoder import Decoder
from models.families import render_config
from models.hf.read import CONFIG_FILE, GENERATION_FILE, companions, read_config
from models.hf.save import generation_config, save_policy, write_checkpoint, write_json
from models.parameters import outer_table, stacked_layer_table

DESCRIPTION = "model"
"""Folder within a run folder that says what its weights mean."""


def describe_model(config: ModelConfig, run: Path, source: Path | None = None) -> Path:
    """Write run/model: config.json, generation_config.json, and `source`'s tokenizer files.

    source: the folder of the checkpoint that the run began from, if any; its generation_config.json
    wins. Returns the folder.
    Raises: ValueError when the family has no such architecture.
    """
    folder = run / DESCRIPTION
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, render_config(config, "float32"))
    write_json(folder / GENERATION_FILE, generation_config(config))
    for path in companions(source) if source is not None else ():
        shutil.copyfile(path, folder / path.name)
    return folder


def export_policy(policy: Decoder, out: Path, *, run: Path, dtype: Any = None) -> None:
    """Write a policy in training, with the run's description, to the folder `out`.

    dtype: of the weights; None: the policy's. The folder appears complete or not at all; an earlier
    export there is replaced, as when a resumed run comes by the same step again.
    Raises: ValueError if `out` holds something else.
    """
    if (out / CONFIG_FILE).is_file():
        shutil.rmtree(out)
    _export(out, run / DESCRIPTION, lambda folder: save_policy(policy, folder, dtype=dtype))


def export_run(run: Path, out: Path, *, step: int | None = None, dtype: Any = "float32") -> int:
    """Write checkpoint `step` (None: the newest) of a run folder to the new folder `out`.

    dtype: of the weights; training keeps float32. Returns the step.
    Raises: ValueError if `run` is no run folder or has no such checkpoint, if its weights do not fit
    its description, or if `out` exists and is not empty.
    """
    if not (run / DESCRIPTION / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run} holds no {DESCRIPTION}/{CONFIG_FILE}; give the run.dir of a training run"
        )
    config = read_config(run / DESCRIPTION)
    steps = checkpoint_steps(run)
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {steps or 'none yet'}")
    parameter = _stored_parameters(run / "checkpoints" / str(step) / "state", config)
    _export(
        out,
        run / DESCRIPTION,
        lambda folder: write_checkpoint(config, parameter, folder, dtype),
    )
    return step


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, ascending."""
    folder = (run / "checkpoints").resolve()
    if not folder.is_dir():
        return []
    return sorted(ocp.utils.checkpoint_steps(folder))


def _stored_parameters(state: Path, config: ModelConfig) -> Callable[[str], np.ndarray]:
    """A function that reads one parameter of a checkpoint by its name."""
    outer = outer_table(config)
    table = outer | stacked_layer_table(config)
    reader = ocp.PyTreeCheckpointer()
    stored: Any = reader.metadata(state.resolve()).item_metadata
    keys = {name: f".policy.{'' if name in outer else 'layers.'}{name}" for name in table}
    for name, key in keys.items():
        found = tuple(stored[key].shape) if key in stored else None
        if found != table[name].shape:
            raise ValueError(
                f"parameter {name} in {state} has shape {found}, but the run's {DESCRIPTION}/"
                f"{CONFIG_FILE} implies {table[name].shape}; is that file of this run?"
            )

    def read(name: str) -> np.ndarray:
        key = keys[name]
        return reader.restore(
            state.resolve(),
            args=ocp.args.PyTreeRestore(
                item={key: 0},
                restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray)},
                partial_restore=True,
            ),
        )[key]

    return read


def _export(out: Path, description: Path, write: Callable[[Path], None]) -> None:
    """`write` and the description's companions into `out`, through a temporary folder beside it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new folder")
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for path in companions(description):
        shutil.copyfile(path, partial / path.name)
    if out.exists():
        out.rmdir()
    partial.rename(out)
