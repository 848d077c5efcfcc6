"""Seconds of a compiled program, from its own operators. Standard library only.

kernel      = a product: the product model at its sizes, but never faster than its bytes
              anything else: kernel_s + bytes / (em W)
collective  = the collective curve, less what the kernels between its start and its end take
seconds     = dispatch_s + sum of kernels + sum of exposed collectives
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roofline.executable import Operator, is_kernel
from roofline.hardware import Hardware
from roofline.hlo import CompiledCollective, Module
from roofline.operators.collectives import Collective
from roofline.operators.model import OperatorModel, operator_model

_CURVES: Mapping[str, Collective] = {
    "all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-reduce": "all_reduce",
    "all-to-all": "all_to_all",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one run of a program, by what takes them; they add up."""

    products_s: float
    attention_s: float
    passes_s: float
    """Every other kernel."""
    exposed_s: float
    """Collectives that no kernel hides."""
    dispatch_s: float
    hidden_s: float
    """Collectives behind kernels, not part of the sum."""
    largest: tuple[tuple[str, str, float], ...]
    """The ten kernels that take longest in all: name, scope, seconds."""

    @property
    def seconds(self) -> float:
        """Of one run."""
        parts = (self.products_s, self.attention_s, self.passes_s, self.exposed_s)
        return sum(parts) + self.dispatch_s


def time_program(
    module: Module,
    kernels: tuple[Operator, ...],
    collectives: tuple[CompiledCollective, ...],
    hardware: Hardware,
) -> Timing:
    """Seconds on this hardware.

    Raises:
        ValueError: hardware without operator models.
    """
    model = operator_model(hardware)
    seconds = {one.name: operator_s(one, model) for one in kernels}
    total = {one.name: one.times * seconds[one.name] for one in kernels}
    by_kind = {"product": 0.0, "attention": 0.0, "other": 0.0}
    for one in kernels:
        by_kind[one.kind if one.kind in by_kind else "other"] += total[one.name]
    exposed = hidden = 0.0
    for one in collectives:
        alone = collective_s(one, model)
        behind = min(alone, sum(seconds.get(name, 0.0) for name in _between(module, one)))
        behind = behind if one.is_async else 0.0
        exposed += one.times * (alone - behind)
        hidden += one.times * behind
    slowest = sorted(kernels, key=lambda one: -total[one.name])[:10]
    return Timing(
        products_s=by_kind["product"],
        attention_s=by_kind["attention"],
        passes_s=by_kind["other"],
        exposed_s=exposed,
        hidden_s=hidden,
        dispatch_s=hardware.dispatch_s,
        largest=tuple((one.name, one.scope, total[one.name]) for one in slowest),
    )


def operator_s(one: Operator, model: OperatorModel) -> float:
    """Seconds of one kernel, once."""
    floor = model.passes(one.moved_bytes)
    if one.attention_flops:
        share = model.prefill_coefficients.compute
        return max(floor, one.attention_flops / (share * model.hardware.peak("bfloat16")))
    return max(
        floor,
        sum(model.gemm(m=p.batch * p.m, n=p.n, k=p.k, dtype=p.dtype) for p in one.products),
    )


def collective_s(one: CompiledCollective, model: OperatorModel) -> float:
    """Seconds of one collective, once."""
    devices = len(one.group) or model.hardware.node_devices
    if one.kind == "collective-permute":
        sent = one.whole_bytes / model.hardware.link_bytes_per_s
        return model.hardware.link_latency_s + sent
    return model.collective(_CURVES[one.kind], one.whole_bytes, devices)


def _between(module: Module, one: CompiledCollective) -> tuple[str, ...]:
    """Kernels scheduled between the start of a collective and its end."""
    for body in module.computations.values():
        names = [entry.name for entry in body]
        if one.name not in names:
            continue
        found = []
        for entry in body[names.index(one.name) + 1 :]:
            if one.name in entry.operands:
                break
            if is_kernel(entry):
                found.append(entry.name)
        return tuple(found)
    return ()
