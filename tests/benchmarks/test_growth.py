"""The benchmark of growth: the programs that it compiles are those of today."""

import importlib
from dataclasses import replace

growth = importlib.import_module("benchmarks.growth")


def test_every_program_compiles() -> None:
    scale = replace(growth.SCALE, models={"small": replace(growth.MODEL, num_layers=1)})
    seconds = growth._programs(growth.Bench(scale=scale, name="small"))
    assert set(seconds) == {"score", "gradient", "prefill", "decode"}
    assert min(seconds.values()) > 0
