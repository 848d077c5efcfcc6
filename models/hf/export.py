"""A training run's weights as a Hugging Face folder that transformers and vLLM load.

A run folder keeps in `model/` what its weights mean: config.json, generation_config.json, the tokenizer's
files, and where an adapter is trained its adapter_config.json. `describe_model` writes it, exports copy it.
Weights come from the run's orbax checkpoints, parameter by parameter, without the optimizer state; an
adapter is merged into them, or exported alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.config import Lora, ModelConfig
from models.decoder import Decoder
from models.families import render_config
from models.hf.adapter import ADAPTER_CONFIG, read_lora, save_adapter, write_adapter_config
from models.hf.read import CONFIG_FILE, GENERATION_FILE, companions, read_config
from models.hf.save import generation_config, save_policy, write_checkpoint, write_json
from models.lora import AdaptedDecoder, adapter_table, merged
from models.parameters import Parameter, outer_table, stacked_layer_table
from models.sharding import parameters_by_name

DESCRIPTION = "model"
"""Folder within a run folder that says what its weights mean."""


def describe_model(
    config: ModelConfig, run: Path, source: Path | None = None, name: str | None = None
) -> Path:
    """Write run/model: config.json, generation_config.json, `source`'s tokenizer files, the adapter's shape.

    source: the folder of the checkpoint that the run began from, if any; its generation_config.json
    wins. name: what others find that checkpoint under. Returns the folder.
    Raises: ValueError when the family has no such architecture.
    """
    folder = run / DESCRIPTION
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, render_config(config, "float32"))
    write_json(folder / GENERATION_FILE, generation_config(config))
    for path in companions(source) if source is not None else ():
        shutil.copyfile(path, folder / path.name)
    if config.lora is not None:
        write_adapter_config(config, folder, name)
    return folder


def described_lora(run: Path) -> Lora | None:
    """The adapter that the run in folder `run` trains; None if it trains all weights."""
    return read_lora(run / DESCRIPTION)


def export_policy(
    policy: Decoder | AdaptedDecoder, out: Path, *, run: Path, dtype: Any = None
) -> None:
    """Write a policy in training, with the run's description, to the folder `out`; an adapter is merged.

    dtype: of the weights; None: the policy's. The folder appears complete or not at all; an earlier
    export there is replaced, as when a resumed run comes by the same step again.
    Raises: ValueError if `out` holds something else.
    """
    if (out / CONFIG_FILE).is_file():
        shutil.rmtree(out)
    if isinstance(policy, AdaptedDecoder):
        arrays = parameters_by_name(policy.base)

        def parameter(name: str) -> np.ndarray:
            return np.asarray(merged(policy.config, name, arrays[name], policy.adapter))

        dtype = policy.embedding.dtype if dtype is None else dtype
        _export(
            out,
            run / DESCRIPTION,
            lambda folder: write_checkpoint(policy.config, parameter, folder, dtype),
        )
        return
    _export(out, run / DESCRIPTION, lambda folder: save_policy(policy, folder, dtype=dtype))


def export_run(
    run: Path, out: Path, *, step: int | None = None, dtype: Any = "float32", adapter: bool = False
) -> int:
    """Write checkpoint `step` (None: the newest) of a run folder to the new folder `out`.

    dtype: of the weights; training keeps float32. adapter: write the adapter alone, in peft's form
    (always float32), instead of merging it. Returns the step.
    Raises: ValueError if `run` is no run folder or has no such checkpoint, if its weights do not fit
    its description, if it has no adapter to write alone, or if `out` exists and is not empty.
    """
    if not (run / DESCRIPTION / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run} holds no {DESCRIPTION}/{CONFIG_FILE}; give the run.dir of a training run"
        )
    config = replace(read_config(run / DESCRIPTION), lora=described_lora(run))
    if adapter and config.lora is None:
        raise ValueError(f"{run} trained all weights, no adapter; export it without --adapter")
    if adapter and dtype != "float32":
        raise ValueError(f"an adapter is exported in float32, not in {dtype}; leave --dtype out")
    steps = checkpoint_steps(run)
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {steps or 'none yet'}")
    state = run / "checkpoints" / str(step) / "state"
    if config.lora is None:
        write = _writer(config, _stored_parameters(state, config), dtype)
    else:
        names = {name: f".policy['{name}']" for name in adapter_table(config)}
        stored = _stored(state, names, adapter_table(config))
        trained = {name: stored(name) for name in names}
        if adapter:
            write = partial(save_adapter, config, trained)
        else:
            frozen = run / "checkpoints" / "0" / "frozen"
            base = _stored_parameters(frozen, config, within="")
            write = _writer(config, lambda name: merged(config, name, base(name), trained), dtype)
    _export(out, run / DESCRIPTION, write)
    if adapter:
        shutil.copyfile(run / DESCRIPTION / ADAPTER_CONFIG, out / ADAPTER_CONFIG)
    return step


def _writer(
    config: ModelConfig, parameter: Callable[[str], np.ndarray], dtype: Any
) -> Callable[[Path], None]:
    return lambda folder: write_checkpoint(config, parameter, folder, dtype)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, ascending."""
    import orbax.checkpoint as ocp  # 30 MiB that only an export needs  # noqa: PLC0415

    folder = (run / "checkpoints").resolve()
    if not folder.is_dir():
        return []
    return sorted(ocp.utils.checkpoint_steps(folder))


def _stored_parameters(
    state: Path, config: ModelConfig, within: str = ".policy"
) -> Callable[[str], np.ndarray]:
    """A function that reads one parameter of a checkpoint by its name."""
    outer = outer_table(config)
    table = outer | stacked_layer_table(config)
    keys = {name: f"{within}.{'' if name in outer else 'layers.'}{name}" for name in table}
    return _stored(state, keys, table)


def _stored(
    state: Path, keys: Mapping[str, str], table: Mapping[str, Parameter]
) -> Callable[[str], np.ndarray]:
    """A function that reads one array of a checkpoint by its name; keys: where it is stored."""
    import orbax.checkpoint as ocp  # noqa: PLC0415

    reader = ocp.PyTreeCheckpointer()
    stored: Any = reader.metadata(state.resolve()).item_metadata
    for name, key in keys.items():
        found = tuple(stored[key].shape) if key in stored else None
        if found != table[name].shape:
            raise ValueError(
                f"parameter {name} in {state} has shape {found}, but the run's {DESCRIPTION}/ "
                f"implies {table[name].shape}; is that description of this run?"
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
