"""Datasheet numbers of GPUs, as `Hardware`. Standard library only.

Peaks are dense (no 2:4 sparsity), for products that accumulate in float32. float32 is the TF32
peak, because XLA runs float32 products in TF32 on these devices unless
`jax_default_matmul_precision` is raised. Links are one direction, per device; cards without NVLink
between all devices are given their PCIe rate. Bytes and rates are decimal (GB = 1e9).

Sources: NVIDIA datasheets as collected in stas00/ml-engineering compute/accelerator/README.md
(744d01e1), ai-dynamo/aiconfigurator systems/*.yaml (095f58a5), Lightning-AI/pytorch-lightning
throughput.py (7f0c3436), scaling book gpus chapter (37acb5ea); read November 2026. Cross-checks:
132 SM * 4 * 1024 flops * 1.83 GHz = 989e12 (H100), 108 * 4 * 512 * 1.41e9 = 312e12 (A100), 58 SM *
128 * 2 * 2.04e9 = 30.3e12 float32 vector (L4). Efficiencies and kernel times of A100, H100 and
H200: fits to 784-1500 measured matrix products each (aiconfigurator tables): ec 0.80-0.81, em
0.75-0.88, t0 3.7-6.1 us. Collective latency: same source, 8-GPU all-reduce. B200: best measured
product 1745 of 2250 TFLOP/s (ml-engineering). The other cards carry the H100's shares as an
assumption.
"""

from __future__ import annotations

from collections.abc import Mapping

from roofline.hardware import Efficiency, Hardware

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6

ASSUMED_DISPATCH_S = 50 * MICRO
"""Starting one program with a tree of parameters from Python; calibration replaces it."""
RING_SHARE = 0.8
"""Share of the link that large NCCL rings reach: 361-367 of 450 GB/s (ml-engineering, network)."""


def _gpu(
    name: str,
    *,
    bf16: float,
    tf32: float,
    fp8: float | None,
    int8: float,
    memory_gb: float,
    hbm_gb_per_s: float,
    link_gb_per_s: float,
    shares: tuple[float, float] = (0.8, 0.85),
    kernel_us: float = 4.0,
    link_us: float = 15.0,
    source: str = "",
) -> Hardware:
    peaks = {"float32": tf32, "bfloat16": bf16, "float16": bf16, "int8": int8}
    if fp8 is not None:
        peaks["float8"] = fp8
    return Hardware(
        name=name,
        peak_flops_per_s={dtype: tera * TERA for dtype, tera in peaks.items()},
        hbm_bytes=memory_gb * GIGA,
        hbm_bytes_per_s=hbm_gb_per_s * GIGA,
        link_bytes_per_s=link_gb_per_s * GIGA,
        dispatch_s=ASSUMED_DISPATCH_S,
        kernel_s=kernel_us * MICRO,
        link_latency_s=link_us * MICRO,
        efficiency=Efficiency(compute=shares[0], memory=shares[1], link=RING_SHARE),
        source=(source or "NVIDIA datasheet; shares assumed, not measured",),
        date="2026-11-20",
    )


_FITTED = "NVIDIA datasheet; shares and kernel time fitted to aiconfigurator 095f58a5 tables"

DATASHEETS: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu(
            "a100-sxm-40gb", bf16=312, tf32=156, fp8=None, int8=624, memory_gb=40,
            hbm_gb_per_s=1555, link_gb_per_s=300, shares=(0.808, 0.748), kernel_us=6.13,
            link_us=20.9, source=_FITTED,
        ),
        _gpu(
            "a100-sxm-80gb", bf16=312, tf32=156, fp8=None, int8=624, memory_gb=80,
            hbm_gb_per_s=2039, link_gb_per_s=300, shares=(0.808, 0.748), kernel_us=6.13,
            link_us=20.9, source=_FITTED,
        ),
        _gpu(
            "h100-sxm", bf16=989.4, tf32=494.7, fp8=1978.9, int8=1978.9, memory_gb=80,
            hbm_gb_per_s=3350, link_gb_per_s=450, shares=(0.811, 0.877), kernel_us=3.73,
            link_us=15.3, source=_FITTED,
        ),
        _gpu(
            "h100-pcie", bf16=756, tf32=378, fp8=1513, int8=1513, memory_gb=80,
            hbm_gb_per_s=2000, link_gb_per_s=64,
        ),
        _gpu(
            "h200", bf16=989.4, tf32=494.7, fp8=1978.9, int8=1978.9, memory_gb=141,
            hbm_gb_per_s=4800, link_gb_per_s=450, shares=(0.797, 0.848), kernel_us=4.20,
            link_us=15.8, source=_FITTED,
        ),
        _gpu(
            "b200", bf16=2250, tf32=1125, fp8=4500, int8=4500, memory_gb=180,
            hbm_gb_per_s=8000, link_gb_per_s=900, shares=(0.776, 0.85), link_us=25.1,
        ),
        _gpu(
            "l40s", bf16=362.05, tf32=183, fp8=733, int8=733, memory_gb=48,
            hbm_gb_per_s=864, link_gb_per_s=32,
        ),
        _gpu(
            "l4", bf16=121, tf32=60, fp8=242, int8=242, memory_gb=24,
            hbm_gb_per_s=300, link_gb_per_s=32,
        ),
        _gpu(
            "rtx-4090", bf16=165.2, tf32=82.6, fp8=330.3, int8=660.6, memory_gb=24,
            hbm_gb_per_s=1008, link_gb_per_s=32,
        ),
        _gpu(
            "rtx-3090", bf16=71.2, tf32=35.6, fp8=None, int8=284, memory_gb=24,
            hbm_gb_per_s=936, link_gb_per_s=32,
        ),
    )
}  # fmt: skip
"""Known GPUs by name."""

_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("H100", "PCIe"), "h100-pcie"),
    (("H100",), "h100-sxm"),
    (("H200",), "h200"),
    (("B200",), "b200"),
    (("A100", "40GB"), "a100-sxm-40gb"),
    (("A100",), "a100-sxm-80gb"),
    (("L40S",), "l40s"),
    (("L4",), "l4"),
    (("RTX 4090",), "rtx-4090"),
    (("RTX 3090",), "rtx-3090"),
)
"""Words of a driver's device name, first match wins, and the datasheet they mean."""


def datasheet(name: str) -> Hardware:
    """Datasheet entry by name, for example "h200".

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in DATASHEETS:
        raise ValueError(f"no datasheet for {name!r}; known: {', '.join(DATASHEETS)}")
    return DATASHEETS[name]


def datasheet_of_device(device_kind: str) -> Hardware | None:
    """Datasheet of a device as its driver names it ("NVIDIA H100 80GB HBM3"); None when unknown."""
    words = device_kind.replace("-", " ").split()
    for needles, name in _KINDS:
        if all(set(needle.split()) <= set(words) for needle in needles):
            return DATASHEETS[name]
    return None
