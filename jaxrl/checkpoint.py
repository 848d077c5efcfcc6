"""Checkpoints: training state and everything that decides what happens next. Written with orbax.

A checkpoint holds the training state (weights, optimizer, step) and a JSON record (prompts drawn and not
yet trained on, curves so far). Random streams are functions of the seed and of positions that are in it,
so nothing else is needed to go on exactly. Checkpoint 0 is made before the first step of reinforcement
learning and is never removed: it is also the frozen reference, and holds the frozen base of an adapter, of
which the other checkpoints have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrl.errors import UserError

FIRST_STEP = 0
FROZEN = "frozen"
"""Item of checkpoint 0 with the base of an adapter."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """`keep` newest ones stay, besides checkpoint 0."""
        self.folder = folder.resolve()
        policy = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(
                    [policy.LatestN(keep), policy.CustomSteps([FIRST_STEP])]
                ),
                create=True,
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any], frozen: Any = None) -> None:
        """Write in the background; returns once `state` may be donated.

        frozen: weights beside the state that no step changes; give them with checkpoint 0 only.
        """
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(_by_path(state)), "record": ocp.args.JsonSave(record)
        }  # fmt: skip
        if frozen is not None:
            items[FROZEN] = ocp.args.StandardSave(_by_path(frozen))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore_frozen(self, like: Any) -> Any:
        """The frozen weights in checkpoint 0, in the shapes, dtypes and shardings of `like`."""
        targets = _by_path(jax.tree.map(_abstract, like))
        args = ocp.args.Composite(**{FROZEN: ocp.args.StandardRestore(targets)})
        arrays = self._restore(FIRST_STEP, args)[FROZEN]
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in targets])

    def restore_record(self, step: int) -> dict[str, Any]:
        """The JSON record of checkpoint `step`."""
        restored = self._restore(step, ocp.args.Composite(record=ocp.args.JsonRestore()))
        return restored["record"]

    def restore_state(self, step: int, like: Any) -> Any:
        """The training state of checkpoint `step`, in the shapes, dtypes and shardings of `like`."""
        targets = _by_path(jax.tree.map(_abstract, like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        arrays = self._restore(step, args)["state"]
        leaves = [arrays[name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def restore_policy(self, step: int, like: Any) -> Any:
        """The weights alone of checkpoint `step`, whatever its algorithm kept beside them.

        like: a policy in the shapes, dtypes and shardings wanted.
        """
        targets = {
            f".policy{name}": leaf for name, leaf in _by_path(jax.tree.map(_abstract, like)).items()
        }
        args = ocp.args.PyTreeRestore(
            targets,
            restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
            partial_restore=True,
        )
        arrays = self._restore(step, ocp.args.Composite(state=args))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in targets])

    def wait(self) -> None:
        """Until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError, OSError) as error:
            if "not compatible with the stored shape" in str(error):
                raise UserError(
                    f"checkpoint {self.folder / str(step)} holds weights of another shape "
                    f"({_first_line(error).partition('. ')[0]}); set model.* and task.* as in "
                    f"{self.folder.parent / 'config.yaml'}"
                ) from error
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}); remove that "
                "folder to go on from the one before, or start in a new run.dir"
            ) from error


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in tree order: independent of the classes that hold them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
