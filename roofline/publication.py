"""Work of one publication of the learner's weights. Standard library only.

The learner's devices cast what they hold and gather it; each then sends its part of the copies that the
rollout's devices need.
"""

from __future__ import annotations

from models.config import ModelConfig
from roofline import traffic
from roofline.kernels import FLOAT32_BYTES, Layout, Work, as_cost, passes
from roofline.parameters import joined_arrays, trained_arrays, trained_parameters
from roofline.phases import Phase, PhaseCost
from roofline.traffic import as_work


def publish(
    model: ModelConfig, learner: Layout, rollout: Layout, *, same_devices: bool = False
) -> PhaseCost:
    """Cast to the rollout's type, gather over fsdp, copy to every rollout replica. Of an adapted model
    the adapter alone.

    Counted on the learner's busiest device, of which all send equal parts. `same_devices`: rollout and
    learner share them, and what the cast made is used where it lies.
    """
    work = _resharding(model, learner, rollout)
    if not same_devices:
        total = trained_parameters(model, Layout()) if model.lora else model.num_parameters
        sent = total * rollout.param_bytes * rollout.row_shards / learner.devices
        work += passes(sent, 1, 0) + Work(link_bytes=sent, collectives=trained_arrays(model))
    return as_cost(Phase.PUBLISH, work, learner, dispatches=2)


def reshard(model: ModelConfig, learner: Layout, rollout: Layout) -> PhaseCost:
    """Of a publication the one program on the learner's devices: the cast and the gathers."""
    return as_cost(Phase.PUBLISH, _resharding(model, learner, rollout), learner, dispatches=1)


def _resharding(model: ModelConfig, learner: Layout, rollout: Layout) -> Work:
    """A gather puts device after device; so what is split along an inner dimension, as widths are, arrives
    with it in front, and is read and written once more to be laid out as it was. What a rollout on one CPU
    reads side by side is written as one array; gate and up are read and written once more to be turned."""
    arrays, held = trained_arrays(model), trained_parameters(model, learner)
    arrays -= 0 if rollout.copies_weights else joined_arrays(model)
    stored = FLOAT32_BYTES if model.lora else learner.param_bytes
    work = passes(held, stored, arrays) + passes(held, rollout.param_bytes, 0)
    if model.gated_mlp and not rollout.copies_weights:
        both = 2 * model.num_layers * model.width * model.ffw_size
        work += passes(2 * both, rollout.param_bytes)
    gathers = traffic.publication(model, learner, rollout)
    inner = [one.array_bytes for one in gathers if one.axis == "fsdp"]
    if learner.fsdp == 1:  # vocabularies stand in front anyway
        inner = [one.array_bytes for one in gathers[1 if model.tied_embeddings else 2 :]]
    return work + as_work(gathers) + passes(2 * sum(inner), 1, len(inner))
