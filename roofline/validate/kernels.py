"""Kinds of cases that time one operator: gemm, attention_prefill, attention_decode, collective.
Standard library only.

Row fields: gemm m, n, k; attention batch, seq or kv_len, num_heads, num_kv_heads, head_dim;
collective op, bytes (nccl-tests convention), devices.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.operators.attention import (
    decode_bound_s,
    prefill_bound_s,
    prefill_flops,
)
from roofline.operators.collectives import Collective, collective_bound_s, egress_bytes
from roofline.operators.gemm import gemm_bound_s
from roofline.operators.model import OperatorModel, load_fitted, operator_model
from roofline.validate.kinds import Kind, Row, hardware_and_stack

DTYPES: Mapping[str, str] = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "int8": "int8", "fp32": "float32",
}  # fmt: skip
"""Types as the rows write them."""
COLLECTIVE_OF: Mapping[str, Collective] = {
    "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "all_reduce": "all_reduce",
    "alltoall": "all_to_all", "all_to_all": "all_to_all",
}  # fmt: skip
"""Collectives as nccl-tests and as this package write them."""


@functools.cache
def model_of(hardware: str) -> OperatorModel:
    """Operator models of a GPU by name; ValueError for one that has none."""
    return operator_model(datasheet(hardware))


@functools.cache
def _fitted_ids(kind: str) -> frozenset[str]:
    return frozenset(load_fitted()["fitted_rows"].get(kind, "").split())


def was_fitted(row: Row) -> bool:
    """Whether the shipped coefficients were fitted on this row."""
    return str(row["id"]).rpartition("-")[2] in _fitted_ids(row["kind"])


def _hardware(row: Row) -> Hardware:
    return datasheet(row["hardware"])


def _dtype(row: Row) -> str:
    return DTYPES[row["dtype"]]


def predict_gemm(row: Row) -> float:
    """Seconds of one product."""
    sizes = {size: row[size] for size in ("m", "n", "k")}
    return model_of(row["hardware"]).gemm(**sizes, dtype=_dtype(row))


def _gemm_bound(row: Row) -> float:
    return gemm_bound_s(_hardware(row), m=row["m"], n=row["n"], k=row["k"], dtype=_dtype(row))


def _gemm_math(row: Row) -> float:
    return 2.0 * row["m"] * row["n"] * row["k"] / _hardware(row).peak(_dtype(row))


def prefill_shape(row: Row) -> dict[str, Any]:
    """The row's shape under the names of `roofline.operators.attention`."""
    return {
        "batch": row["batch"], "tokens": row["seq"], "num_heads": row["num_heads"],
        "num_kv_heads": row["num_kv_heads"], "head_size": row["head_dim"],
    }  # fmt: skip


def decode_shape(row: Row) -> dict[str, Any]:
    """The row's shape under the names of `roofline.operators.attention`."""
    return {
        "batch": row["batch"], "kv_len": row["kv_len"], "num_heads": row["num_heads"],
        "num_kv_heads": row["num_kv_heads"], "head_size": row["head_dim"],
    }  # fmt: skip


def predict_prefill(row: Row) -> float:
    """Seconds of one causal attention."""
    return model_of(row["hardware"]).prefill(**prefill_shape(row), dtype=_dtype(row))


def _prefill_bound(row: Row) -> float:
    return prefill_bound_s(_hardware(row), **prefill_shape(row), dtype=_dtype(row))


def _prefill_math(row: Row) -> float:
    flops = prefill_flops(row["batch"], row["seq"], row["num_heads"], row["head_dim"])
    return flops / _hardware(row).peak(_dtype(row))


def predict_decode(row: Row) -> float:
    """Seconds of one decode attention, repeated on the same cache as the benchmarks do."""
    shape = decode_shape(row)
    return model_of(row["hardware"]).decode(**shape, kv_dtype=_dtype(row), warm_l2=True)


def _decode_bound(row: Row) -> float:
    return decode_bound_s(_hardware(row), **decode_shape(row), kv_dtype=_dtype(row))


def _decode_math(row: Row) -> float:
    flops = 4.0 * row["batch"] * row["kv_len"] * row["num_heads"] * row["head_dim"]
    return flops / _hardware(row).peak(_dtype(row))


def predict_collective(row: Row) -> float:
    """Seconds of one collective, with the curves of the row's library where it has some, else with
    those of the GPU's main library."""
    kind, library = COLLECTIVE_OF[row["op"]], str(row["stack"]).strip()
    model = model_of(row["hardware"])
    own = library if library in model.curves else None
    return model.collective(kind, row["bytes"], row["devices"], library=own)


def _collective_bound(row: Row) -> float:
    kind = COLLECTIVE_OF[row["op"]]
    return collective_bound_s(_hardware(row), kind, row["bytes"], row["devices"])


def _collective_math(row: Row) -> float:
    sent = egress_bytes(COLLECTIVE_OF[row["op"]], row["bytes"], row["devices"])
    return sent / _hardware(row).link_bytes_per_s


def _collective_stack(row: Row) -> str:
    return f"{hardware_and_stack(row)} / {row['op']} / {row['devices']} GPUs"


def interval(row: Row) -> tuple[float, float]:
    """Where nine of ten measurements of this row's operator should lie [s]."""
    predict = {
        "gemm": predict_gemm, "attention_prefill": predict_prefill,
        "attention_decode": predict_decode, "collective": predict_collective,
    }[row["kind"]]  # fmt: skip
    return model_of(row["hardware"]).interval(row["kind"], predict(row))


GEMM = Kind(
    name="gemm",
    predict=predict_gemm,
    bound=_gemm_bound,
    math=_gemm_math,
    fitted=was_fitted,
    interval=interval,
)
ATTENTION_PREFILL = Kind(
    name="attention_prefill",
    predict=predict_prefill,
    bound=_prefill_bound,
    math=_prefill_math,
    fitted=was_fitted,
    interval=interval,
)
ATTENTION_DECODE = Kind(
    name="attention_decode",
    predict=predict_decode,
    bound=_decode_bound,
    math=_decode_math,
    fitted=was_fitted,
    interval=interval,
)
COLLECTIVE = Kind(
    name="collective",
    predict=predict_collective,
    bound=_collective_bound,
    math=_collective_math,
    stack=_collective_stack,
    fitted=was_fitted,
    interval=interval,
)
