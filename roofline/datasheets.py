"""Datasheet numbers of GPUs, as `Hardware`. Standard library only.

Peaks are dense (no 2:4 sparsity), for products that accumulate in float32. float32 is the TF32
peak, because XLA runs float32 products in TF32 on these devices unless
`jax_default_matmul_precision` is raised. Links are one direction, per device; cards without NVLink
between all devices are given their PCIe rate. Bytes and rates are decimal (GB = 1e9).

`SOURCES` names where each number comes from; shares and kernel times that were never measured on a
card say so. Cross-checks: 132 SM * 4 * 1024 flops * 1.83 GHz = 989e12 (H100), 108 * 4 * 512 *
1.41e9 = 312e12 (A100), 148 * 4 * 2048 * 1.86e9 = 2255e12 (B200), 58 SM * 128 * 2 * 2.04e9 = 30.3e12
float32 vector (L4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from roofline.hardware import Efficiency, Hardware
from roofline.names import meant

TERA, GIGA, MEGA, MICRO = 1e12, 1e9, 1e6, 1e-6

ASSUMED_DISPATCH_S = 50 * MICRO
"""Starting one program with a tree of parameters from Python; calibration replaces it."""
RING_SHARE = 0.8
"""Share of the link that large NCCL rings reach: 361-367 of 450 GB/s (ml-engineering, network)."""

_AIC = "ai-dynamo/aiconfigurator@095f58a systems/*.yaml"
_STAS = "stas00/ml-engineering@744d01e compute/accelerator/README.md, citing NVIDIA's pages"
_LIGHTNING = "Lightning-AI/pytorch-lightning@7f0c343 throughput.py, citing NVIDIA's datasheets"
_BOOK = "scaling book, gpus chapter (Future-Outlier/scaling-book@37acb5e gpus.md)"
_ANALYSIS = "cli99/llm-analysis@d841e40 gpu_configs/*.json"
_NANOCHAT = "karpathy/nanochat@92d63d4 nanochat/common.py"
_FITTED = (
    "three-parameter fits to aiconfigurator@095f58a tables of measured products (784-840 rows)"
)
_NCCL = "fit to aiconfigurator@095f58a nccl-tests tables, all-reduce of 8 GPUs"
_ASSUMED = "assumed equal to the H100's; measure with roofline.calibrate"
_NO_LATENCY = "assumed 15 us, the H100's 8-GPU all-reduce; measure with roofline.calibrate"
_PCIE = "PCIe generation of the card, x16, one direction (NVIDIA product page)"
_NIC_400 = "one 400 Gb/s ConnectX-7 per GPU (docs.nvidia.com/dgx-basepod, core components)"
_NIC_200 = "one 200 Gb/s HDR port per GPU of a DGX A100"
_NO_NIC = "0: no fixed network belongs to the card"


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
    sms: int,
    l2_mb: float,
    capability: float,
    topology: Literal["switch", "bridge", "pcie"],
    network_gb_per_s: float = 0.0,
    shares: tuple[float, float] = (0.8, 0.85),
    kernel_us: float = 4.0,
    link_us: float = 15.0,
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
        num_sms=sms,
        l2_bytes=l2_mb * MEGA,
        capability=capability,
        topology=topology,
        network_bytes_per_s=network_gb_per_s * GIGA,
        efficiency=Efficiency(compute=shares[0], memory=shares[1], link=RING_SHARE),
        source=tuple(f"{number}: {where}" for number, where in SOURCES[name].items()),
        date="2026-11-20",
    )


def _sources(
    peaks: str,
    memory: str,
    *,
    link: str,
    chip: str,
    network: str = _NO_NIC,
    shares: str = _ASSUMED,
    latency: str = _NO_LATENCY,
) -> Mapping[str, str]:
    """Where each number of one card comes from."""
    return {
        "peak_flops_per_s": peaks,
        "hbm_bytes": memory,
        "hbm_bytes_per_s": memory,
        "link_bytes_per_s": link,
        "topology": link,
        "num_sms": chip,
        "l2_bytes": chip,
        "capability": "developer.nvidia.com/cuda-gpus",
        "network_bytes_per_s": network,
        "efficiency.compute": shares,
        "efficiency.memory": shares,
        "efficiency.link": "361-367 of 450 GB/s in large rings (stas00/ml-engineering, network)",
        "kernel_s": shares,
        "link_latency_s": latency,
        "dispatch_s": "assumed 50 us; measure with roofline.calibrate",
    }


_A100 = _sources(
    f"{_AIC}; {_STAS}", f"{_ANALYSIS}; {_LIGHTNING}", link=f"NVLink 3, 12 x 25 GB/s ({_BOOK})",
    chip=_BOOK, network=_NIC_200, shares=_FITTED, latency=_NCCL,
)  # fmt: skip

SOURCES: Mapping[str, Mapping[str, str]] = {
    "a100-sxm-40gb": _A100,
    "a100-sxm-80gb": _A100,
    "h100-sxm": _sources(
        f"{_AIC}; {_STAS}", f"{_AIC}; {_STAS}", link=f"NVLink 4, 18 x 25 GB/s ({_BOOK})",
        chip=_BOOK, network=_NIC_400, shares=_FITTED, latency=_NCCL,
    ),
    "h100-pcie": _sources(
        f"{_AIC}; {_STAS}", f"{_AIC}; {_ANALYSIS}",
        link="PCIe 5 x16; the optional bridge joins pairs only (aiconfigurator models PCIe)",
        chip="114 SMs as drivers report (gpu_specs, torch device properties); L2 50 MB (NVIDIA)",
    ),
    "h200": _sources(
        f"same die as the H100; {_AIC}; {_STAS}", f"{_AIC}; {_STAS}",
        link=f"NVLink 4, 18 x 25 GB/s ({_BOOK})", chip=f"{_BOOK}; a driver reports 60 MB of L2",
        network=_NIC_400, shares=_FITTED, latency=_NCCL,
    ),
    "b200": _sources(
        f"{_AIC}; {_STAS}", f"{_STAS}, {_BOOK}; aiconfigurator has 7.7 TB/s, others 192 GB",
        link=f"NVLink 5, 18 x 50 GB/s ({_BOOK})", chip=f"{_BOOK}; drivers report 148 SMs, 126 MB",
        network=_NIC_400, latency=_NCCL,
        shares=f"best measured product 1745 of 2250 TFLOP/s ({_STAS}); the rest as the H100",
    ),
    "l40s": _sources(
        f"{_AIC}; {_STAS}", f"{_AIC}; {_STAS}", link=_PCIE,
        chip="142 SMs as drivers report; L2 96 MB (hmc-tech.com/gpu)",
    ),
    "l4": _sources(
        f"{_AIC}; {_LIGHTNING}", f"{_AIC}; {_LIGHTNING}", link=_PCIE,
        chip="58 SMs from 30.3 TFLOP/s float32 at 2.04 GHz; L2 48 MB (third-party pages)",
    ),
    "rtx-4090": _sources(
        f"{_NANOCHAT}; waredb.com", "waredb.com; thefpsreview.com", link=_PCIE,
        chip="128 SMs, 72 MB as drivers report",
    ),
    "rtx-3090": _sources(
        f"{_NANOCHAT}; {_LIGHTNING}; int8 = 4 x bf16, NVIDIA GA102 whitepaper", _NANOCHAT,
        link=f"{_PCIE}; the optional bridge joins pairs only", chip="82 SMs, 6 MB L2 (GA102)",
    ),
}  # fmt: skip
"""Where each number of a datasheet entry comes from, by GPU and field. Read November 2026."""

DATASHEETS: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu(
            "a100-sxm-40gb", bf16=312, tf32=156, fp8=None, int8=624, memory_gb=40,
            hbm_gb_per_s=1555, link_gb_per_s=300, sms=108, l2_mb=40, capability=8.0, topology="switch",
            network_gb_per_s=25, shares=(0.808, 0.748), kernel_us=6.13, link_us=20.9,
        ),
        _gpu(
            "a100-sxm-80gb", bf16=312, tf32=156, fp8=None, int8=624, memory_gb=80,
            hbm_gb_per_s=2039, link_gb_per_s=300, sms=108, l2_mb=40, capability=8.0, topology="switch",
            network_gb_per_s=25, shares=(0.808, 0.748), kernel_us=6.13, link_us=20.9,
        ),
        _gpu(
            "h100-sxm", bf16=989.4, tf32=494.7, fp8=1978.9, int8=1978.9, memory_gb=80,
            hbm_gb_per_s=3350, link_gb_per_s=450, sms=132, l2_mb=50, capability=9.0, topology="switch",
            network_gb_per_s=50, shares=(0.811, 0.877), kernel_us=3.73, link_us=15.3,
        ),
        _gpu(
            "h100-pcie", bf16=756, tf32=378, fp8=1513, int8=1513, memory_gb=80,
            hbm_gb_per_s=2000, link_gb_per_s=64, sms=114, l2_mb=50, capability=9.0, topology="bridge",
        ),
        _gpu(
            "h200", bf16=989.4, tf32=494.7, fp8=1978.9, int8=1978.9, memory_gb=141,
            hbm_gb_per_s=4800, link_gb_per_s=450, sms=132, l2_mb=50, capability=9.0, topology="switch",
            network_gb_per_s=50, shares=(0.797, 0.848), kernel_us=4.20, link_us=15.8,
        ),
        _gpu(
            "b200", bf16=2250, tf32=1125, fp8=4500, int8=4500, memory_gb=180,
            hbm_gb_per_s=8000, link_gb_per_s=900, sms=148, l2_mb=126, capability=10.0, topology="switch",
            network_gb_per_s=50, shares=(0.776, 0.85), link_us=25.1,
        ),
        _gpu(
            "l40s", bf16=362.05, tf32=183, fp8=733, int8=733, memory_gb=48,
            hbm_gb_per_s=864, link_gb_per_s=32, sms=142, l2_mb=96, capability=8.9, topology="pcie",
        ),
        _gpu(
            "l4", bf16=121, tf32=60, fp8=242, int8=242, memory_gb=24,
            hbm_gb_per_s=300, link_gb_per_s=32, sms=58, l2_mb=48, capability=8.9, topology="pcie",
        ),
        _gpu(
            "rtx-4090", bf16=165.2, tf32=82.6, fp8=330.3, int8=660.6, memory_gb=24,
            hbm_gb_per_s=1008, link_gb_per_s=32, sms=128, l2_mb=72, capability=8.9, topology="pcie",
        ),
        _gpu(
            "rtx-3090", bf16=71.2, tf32=35.6, fp8=None, int8=284, memory_gb=24,
            hbm_gb_per_s=936, link_gb_per_s=32, sms=82, l2_mb=6, capability=8.6, topology="bridge",
        ),
    )
}  # fmt: skip
"""Known GPUs by name."""

ALSO_CALLED: Mapping[str, str] = {
    "a100": "a100-sxm-80gb", "a100-40gb-sxm": "a100-sxm-40gb", "a100-80gb-sxm": "a100-sxm-80gb",
    "h100": "h100-sxm", "h100-80gb-sxm": "h100-sxm", "h100-80gb-pcie": "h100-pcie",
    "h200-sxm": "h200", "h200-141gb-sxm": "h200", "b200-sxm": "b200", "b200-180gb-sxm": "b200",
    "rtx4090": "rtx-4090", "rtx3090": "rtx-3090",
}  # fmt: skip
"""Other names that users and tables of measurements have for the same GPUs."""

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
    """Datasheet entry by name, for example "h200" or "H100-80GB-SXM".

    Raises:
        ValueError: unknown name; the message lists the known ones and the most similar.
    """
    known = {**{key: key for key in DATASHEETS}, **ALSO_CALLED}
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in known:
        raise ValueError(
            f"no datasheet for hardware {name!r}{meant(key, known)} Known: {', '.join(DATASHEETS)}"
        )
    return DATASHEETS[known[key]]


def datasheet_of_device(device_kind: str) -> Hardware | None:
    """Datasheet of a device as its driver names it ("NVIDIA H100 80GB HBM3"); None when unknown."""
    words = device_kind.replace("-", " ").split()
    for needles, name in _KINDS:
        if all(set(needle.split()) <= set(words) for needle in needles):
            return DATASHEETS[name]
    return None
