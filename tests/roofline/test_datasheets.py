"""Datasheet entries: each number has a source, and the collected specifications agree."""

import json
from pathlib import Path

import pytest

from roofline.datasheets import ALSO_CALLED, DATASHEETS, SOURCES, datasheet

NUMBERS = {
    "capability", "peak_flops_per_s", "hbm_bytes", "hbm_bytes_per_s", "link_bytes_per_s", "topology", "num_sms",
    "l2_bytes", "network_bytes_per_s", "efficiency.compute", "efficiency.memory",
    "efficiency.link", "kernel_s", "link_latency_s", "dispatch_s",
}  # fmt: skip
MEBI_IS_MEGA = 0.05  # caches are quoted in MB and reported in MiB


@pytest.mark.parametrize("name", DATASHEETS)
def test_every_number_names_its_source(name):
    assert set(SOURCES[name]) == NUMBERS
    assert all(SOURCES[name].values())
    hardware = datasheet(name)
    assert not hardware.calibrated
    assert len(hardware.source) == len(NUMBERS)
    for number in NUMBERS - {"efficiency.compute", "efficiency.memory", "efficiency.link"}:
        assert hasattr(hardware, number)


def test_chips_agree_with_the_collected_specifications(shared_data: Path):
    specs = json.loads((shared_data / "roofline" / "gpu_specs.json").read_text())["gpus"]
    names = {
        "A100-SXM4-40GB": "a100-40gb-sxm", "A100-SXM4-80GB": "a100-80gb-sxm",
        "H100-SXM5-80GB": "h100-80gb-sxm", "H100-PCIe-80GB": "h100-pcie",
        "H200-SXM5-141GB": "h200-141gb-sxm", "B200-SXM-180GB": "b200-180gb-sxm",
        "L40S-48GB": "l40s", "L4-24GB": "l4", "RTX-4090": "rtx-4090", "RTX-3090": "rtx-3090",
    }  # fmt: skip
    for spec in specs:
        ours, dense = datasheet(names.pop(spec["name"])), spec["dense_tflops"]
        assert ours.num_sms == spec["sm_count"]
        assert ours.l2_bytes == pytest.approx(1e6 * spec["l2_mb"], rel=MEBI_IS_MEGA)
        assert ours.peak("int8") == pytest.approx(1e12 * dense["int8_tops"])
        assert ours.peak("float32") == pytest.approx(1e12 * dense["tf32"])
        assert ("float8" in ours.peak_flops_per_s) == (dense["fp8"] is not None)
        link = spec["nvlink_gb_per_s_per_direction"]
        if ours.topology == "switch":
            assert ours.link_bytes_per_s == pytest.approx(1e9 * link)
        else:  # a bridge joins pairs only: what all devices reach each other by is PCIe
            pcie = spec["pcie_gb_per_s_per_direction"]
            assert ours.link_bytes_per_s == pytest.approx(1e9 * pcie)
    assert not names


def test_names_of_measured_tables_are_known():
    for other, name in ALSO_CALLED.items():
        assert datasheet(other) is DATASHEETS[name]


def test_an_unknown_gpu_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'h100-80gb-sxm'"):
        datasheet("h100-80gb-sxn")
