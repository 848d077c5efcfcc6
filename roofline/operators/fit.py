"""Fit the coefficients that the package ships: `python -m roofline.operators.fit --cases DIR`.

Reads gemm.jsonl, attention_prefill.jsonl, attention_decode.jsonl and collective.jsonl, fits each
GPU's models on part of the rows and writes `fitted.json` beside this file: coefficients, the ids of
the fitted rows, and the errors on the others. Which rows are fitted is decided by the shape alone:

    gemm, attention   sha256("jaxrl-operators:" + the shape's sizes, comma-separated) below a quarter
    collective        every second size: odd powers of two bytes

so that two measurements of one shape, or of two GPUs, fall on the same side. The loss is the soft
absolute error of log(predicted / measured), plus a weak pull to the starting values. Intervals come
from fits that left out a quarter of the fitted shapes at a time; held-out rows decide nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from roofline.datasheets import datasheet
from roofline.hardware import Hardware
from roofline.operators.attention import (
    DecodeCoefficients,
    PrefillCoefficients,
    decode_s,
    prefill_s,
)
from roofline.operators.collectives import (
    Curve,
    ProtocolCurve,
    SendCurve,
    curve_s,
    egress_bytes,
)
from roofline.operators.gemm import GemmCoefficients, gemm_s
from roofline.validate.kernels import COLLECTIVE_OF, DTYPES, decode_shape, prefill_shape
from roofline.validate.kinds import Row

FITTED_PART = 0.25
SEED = "jaxrl-operators"
PULL = 0.05
"""Weight of (coefficient - start) in the transformed space, beside residuals of log seconds."""
FOLDS = 4
"""Parts of the fitted rows; each is predicted without itself for the intervals."""
OUTLIER = 0.1
"""Log error above which a row counts by its absolute, not its squared error."""
DIGITS = 4
MICRO, NANO = 1e-6, 1e-9
FP8_OVER_BF16 = {"compute": 0.543 / 0.811, "memory": 0.817 / 0.877, "fixed_s": 6.72 / 3.73}
"""Ratios of three-parameter fits to 840 fp8 and 840 bf16 products of one stack on the H100
(aiconfigurator@095f58a tables); the tables fitted here hold no fp8."""
SHAPE_KEYS = {
    "gemm": ("m", "n", "k"),
    "attention_prefill": ("batch", "seq", "num_heads", "num_kv_heads", "head_dim"),
    "attention_decode": ("batch", "kv_len", "num_heads", "num_kv_heads", "head_dim"),
}
GPUS = {"a100-80gb-sxm": "nccl-tests 2.27.3", "h100-80gb-sxm": "nccl-tests 2.29.2"}
"""Names in the tables, and the library version that predictions use by default."""


Seconds = Callable[[Mapping[str, float], Row], float]
"""Seconds of a row under coefficients by name."""


@dataclass(frozen=True)
class Scale:
    """How a coefficient is searched: the map from any real number to its allowed range."""

    start: float
    kind: str
    """positive, share in (0, 1), or above_one."""

    def to_line(self) -> float:
        """Starting point of the search."""
        if self.kind == "share":
            return math.log(self.start / (1 - self.start))
        return math.log(self.start - (self.kind == "above_one"))

    def to_value(self, x: float) -> float:
        """Coefficient at a point of the search."""
        if self.kind == "share":
            return 1 / (1 + math.exp(-x))
        return math.exp(x) + (self.kind == "above_one")


def positive(start: float) -> Scale:
    """A time, a rate or a count."""
    return Scale(start, "positive")


def share(start: float) -> Scale:
    """Between 0 and 1."""
    return Scale(start, "share")


def above_one(start: float) -> Scale:
    """An exponent, or a speed-up."""
    return Scale(start, "above_one")


GEMM_SCALES = {
    "fixed_s": positive(4 * MICRO), "compute": share(0.85), "memory": share(0.85),
    "quantisation": share(0.7), "overlap": above_one(3.5), "half_tile": share(0.95),
    "fill_k": positive(100.0), "reduction": positive(1.0), "throttle": positive(0.03),
}  # fmt: skip
PREFILL_SCALES = {
    "fixed_s": positive(10 * MICRO), "compute": share(0.7), "narrow": share(0.8),
    "memory": share(0.7), "imbalance": share(0.4), "overlap": above_one(2.0),
    "fill_keys": positive(100.0), "token_s": positive(1 * NANO), "kv_copies": positive(2.0),
}  # fmt: skip
DECODE_SCALES = {
    "fixed_s": positive(10 * MICRO), "memory": share(0.9), "pair_s": positive(20 * NANO),
    "sequence_s": positive(5 * NANO), "overlap": above_one(2.0), "l2_speed": above_one(3.0),
    "l2_share": share(0.6), "key_s": positive(12 * NANO), "split_s": positive(4 * MICRO),
    "part_s": positive(0.2 * MICRO),
}  # fmt: skip
CURVE_SCALES = {
    "latency_s": positive(12 * MICRO), "ll128_s": positive(2 * MICRO),
    "simple_s": positive(10 * MICRO), "ll": positive(0.02), "ll128": positive(0.5),
    "simple": positive(0.85),
}  # fmt: skip
SEND_SCALES = {
    "latency_s": positive(12 * MICRO), "spread_s": positive(1 * MICRO),
    "simple_s": positive(2 * MICRO), "full_s": positive(10 * MICRO), "ll": positive(0.02),
    "simple": positive(0.85), "few": share(0.6),
}  # fmt: skip
LL_BYTES = (16 * 1024, 32 * 16 * 1024)
"""Limits of LL for a message to one peer: 16 KiB (NCCL_P2P_LL_THRESHOLD) times the channels that such a
message fills or, in older versions, times all 32 of a pair behind NVLink switches (NVIDIA/nccl
src/enqueue.cc, addP2pToPlan: nChannels of Simple there, thresholdLL before)."""


def shape_of(row: Row) -> str:
    """The sizes of a row, comma-separated: what decides on which side it falls."""
    if row["kind"] == "collective":
        return f"{row['bytes']:020d}"
    return ",".join(str(row[key]) for key in SHAPE_KEYS[row["kind"]])


def is_fitted(row: Row) -> bool:
    """Whether a row belongs to the part that coefficients are fitted on."""
    if row["kind"] == "collective":
        return int(row["bytes"]).bit_length() % 2 == 0
    digest = hashlib.sha256(f"{SEED}:{shape_of(row)}".encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < FITTED_PART


def fit(rows: Sequence[Row], scales: Mapping[str, Scale], seconds: Seconds) -> dict[str, float]:
    """Coefficients by name that bring seconds(coefficients, row) close to the measured times."""
    measured = np.array([row["measured_s"] for row in rows])
    start = np.array([scale.to_line() for scale in scales.values()])

    def values(x: np.ndarray) -> dict[str, float]:
        return {name: s.to_value(v) for (name, s), v in zip(scales.items(), x, strict=True)}

    def residuals(x: np.ndarray) -> np.ndarray:
        coefficients = values(x)
        predicted = np.array([seconds(coefficients, row) for row in rows])
        return np.concatenate([np.log(predicted / measured), PULL * (x - start)])

    found = least_squares(
        residuals, start, loss="soft_l1", f_scale=OUTLIER, diff_step=1e-3, max_nfev=60
    )
    return {name: float(f"{v:.{DIGITS}g}") for name, v in values(found.x).items()}


def gemm_seconds(hardware: Hardware) -> Seconds:
    """Seconds of a gemm row under coefficients by name."""

    def seconds(values: Mapping[str, float], row: Row) -> float:
        c = GemmCoefficients(**values)
        return gemm_s(c, hardware, m=row["m"], n=row["n"], k=row["k"], dtype=DTYPES[row["dtype"]])

    return seconds


def prefill_seconds(hardware: Hardware) -> Seconds:
    """Seconds of an attention_prefill row under coefficients by name."""

    def seconds(values: Mapping[str, float], row: Row) -> float:
        return prefill_s(PrefillCoefficients(**values), hardware, **prefill_shape(row))

    return seconds


def decode_seconds(hardware: Hardware, *, splits_mha: bool) -> Seconds:
    """Seconds of an attention_decode row under coefficients by name."""

    def seconds(values: Mapping[str, float], row: Row) -> float:
        c = DecodeCoefficients(**values, splits_mha=splits_mha)
        return decode_s(c, hardware, **decode_shape(row))

    return seconds


def curve_seconds(hardware: Hardware) -> Seconds:
    """Seconds of a collective row, no all-to-all, under coefficients by name."""

    def seconds(values: Mapping[str, float], row: Row) -> float:
        return _curve_row_s(ProtocolCurve(**values), row, hardware)

    return seconds


def send_seconds(hardware: Hardware, ll_bytes: float) -> Seconds:
    """Seconds of an all-to-all row under coefficients by name."""

    def seconds(values: Mapping[str, float], row: Row) -> float:
        return _curve_row_s(SendCurve(**values, ll_bytes=ll_bytes), row, hardware)

    return seconds


def _curve_row_s(curve: Curve, row: Row, hardware: Hardware) -> float:
    sent = egress_bytes(COLLECTIVE_OF[row["op"]], row["bytes"], row["devices"])
    return curve_s(curve, sent, hardware.link_bytes_per_s, row["devices"])


def errors(ratios: Sequence[float]) -> dict[str, float]:
    """Mean, median, 90th percentile and bias of predicted / measured - 1 [%]."""
    off = 100 * (np.array(ratios) - 1)
    return {
        "n": len(ratios),
        "mean_percent": round(float(np.mean(np.abs(off))), 2),
        "median_percent": round(float(np.median(np.abs(off))), 2),
        "p90_percent": round(float(np.quantile(np.abs(off), 0.9)), 2),
        "bias_percent": round(float(np.mean(off)), 2),
    }


@dataclass(frozen=True)
class Fit:
    """Coefficients, and predicted / measured of three sets of rows."""

    values: dict[str, Any]
    inside: list[float]
    """Fitted rows."""
    left_out: list[float]
    """Fitted rows again, each predicted by a fit that left out its quarter of the shapes."""
    outside: list[float]
    """Held-out rows."""


def fit_one(rows: Sequence[Row], scales: Mapping[str, Scale], seconds: Seconds) -> Fit:
    """Fit one operator of one GPU on its part of the rows."""
    fitted = [row for row in rows if is_fitted(row)]
    shapes = sorted({shape_of(row) for row in fitted})
    fold = {shape: i % FOLDS for i, shape in enumerate(shapes)}
    left_out: list[float] = []
    for index in range(FOLDS):
        rest = [row for row in fitted if fold[shape_of(row)] != index]
        values = fit(rest, scales, seconds)
        left = [row for row in fitted if fold[shape_of(row)] == index]
        left_out += ratios(values, left, seconds)
    values = fit(fitted, scales, seconds)
    held_out = [row for row in rows if not is_fitted(row)]
    return Fit(values, ratios(values, fitted, seconds), left_out, ratios(values, held_out, seconds))


def ratios(values: Mapping[str, float], rows: Sequence[Row], seconds: Seconds) -> list[float]:
    """Predicted over measured."""
    return [seconds(values, row) / row["measured_s"] for row in rows]


def fit_collectives(rows: Sequence[Row], hardware: Hardware) -> Fit:
    """Curves by library, collective and number of devices."""
    whole = Fit({}, [], [], [])
    groups: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        by_devices = groups.setdefault((row["stack"].strip(), COLLECTIVE_OF[row["op"]]), {})
        by_devices.setdefault(row["devices"], []).append(row)
    for library, kind in sorted(groups):
        own = groups[library, kind]
        if kind == "all_to_all":
            found = fit_sends(own, hardware)
        else:
            seconds = curve_seconds(hardware)
            found = {n: fit_one(own[n], CURVE_SCALES, seconds) for n in sorted(own)}
        by_kind = whole.values.setdefault(library, {})
        by_kind[kind] = {str(devices): one.values for devices, one in found.items()}
        for one in found.values():
            whole.inside.extend(one.inside)
            whole.left_out.extend(one.left_out)
            whole.outside.extend(one.outside)
    return whole


def fit_sends(rows: Mapping[int, Sequence[Row]], hardware: Hardware) -> dict[int, Fit]:
    """All-to-all curves of one library by number of devices, under the limit of LL, one for all of
    them, that predicts left-out fitted rows best."""

    def under(ll_bytes: int) -> dict[int, Fit]:
        seconds = send_seconds(hardware, ll_bytes)
        fits = {n: fit_one(rows[n], SEND_SCALES, seconds) for n in sorted(rows)}
        for one in fits.values():
            one.values["ll_bytes"] = ll_bytes
        return fits

    def off(fits: Mapping[int, Fit]) -> float:
        return sum(abs(math.log(ratio)) for one in fits.values() for ratio in one.left_out)

    return min(map(under, LL_BYTES), key=off)


def fit_gpu(name: str, tables: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Everything that fitted.json says about one GPU."""
    hardware, is_hopper = datasheet(name), name.startswith("h")
    own = {kind: [r for r in rows if r["hardware"] == name] for kind, rows in tables.items()}
    fits = {
        "gemm": fit_one(own["gemm"], GEMM_SCALES, gemm_seconds(hardware)),
        "attention_prefill": fit_one(
            own["attention_prefill"], PREFILL_SCALES, prefill_seconds(hardware)
        ),
        "attention_decode": fit_one(
            own["attention_decode"], DECODE_SCALES, decode_seconds(hardware, splits_mha=is_hopper)
        ),
        "collective": fit_collectives(own["collective"], hardware),
    }
    result: dict[str, Any] = {kind: found.values for kind, found in fits.items()}
    bf16 = result["gemm"]
    result["gemm"] = {"bfloat16": bf16}
    if is_hopper:
        scaled = {key: float(f"{bf16[key] * r:.{DIGITS}g}") for key, r in FP8_OVER_BF16.items()}
        result["gemm"]["float8"] = {**bf16, **scaled}
    result["attention_decode"]["splits_mha"] = is_hopper
    result["library"] = GPUS[name]
    result["intervals"] = {
        kind: [round(float(np.quantile(1 / np.array(found.left_out), q)), 4) for q in (0.05, 0.95)]
        for kind, found in fits.items()
    }
    result["fit_errors"] = {kind: errors(found.inside) for kind, found in fits.items()}
    result["cross_validation_errors"] = {k: errors(found.left_out) for k, found in fits.items()}
    result["held_out_errors"] = {kind: errors(found.outside) for kind, found in fits.items()}
    return result


def main() -> None:
    """Read the tables, fit, write, and print the held-out errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=Path, required=True, help="folder of measured tables")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fitted.json"))
    args = parser.parse_args()
    tables = {
        kind: [json.loads(line) for line in (args.cases / f"{kind}.jsonl").open()]
        for kind in (*SHAPE_KEYS, "collective")
    }
    gpus = {datasheet(name).name: fit_gpu(name, tables) for name in GPUS}
    fitted = {
        kind: " ".join(sorted(r["id"].rpartition("-")[2] for r in rows if is_fitted(r)))
        for kind, rows in tables.items()
    }
    report = {
        "source": "ai-dynamo/aiconfigurator@095f58a gemm, attention and nccl tables; fitted rows: "
        "see roofline/operators/fit.py",
        "gpus": gpus,
        "fitted_rows": fitted,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, values in gpus.items():
        for kind, line in values["held_out_errors"].items():
            print(f"{name:14s} {kind:18s} {line}")


if __name__ == "__main__":
    main()
