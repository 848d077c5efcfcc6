"""The table of figures to reach: what a figure pools, and that it says what falls short."""

import importlib

from roofline.validate.score import Score, errors_of

bench = importlib.import_module("benchmarks.cases")


def score(stack: str, *ratios: float) -> Score:
    errors = errors_of([(ratio, 1.0) for ratio in ratios])
    return Score(
        kind="collective", stack=stack, rows=len(ratios), fitted=0, calibration=(), unpredicted=0,
        errors={"ours": errors}, inside=None, ratios={"ours": ratios},
    )  # fmt: skip


EIGHT = score("h100-80gb-sxm / nccl-tests / alltoall / 8 GPUs", 1.2, 1.1)
SCORES = {
    **{one.kind: [] for one in bench.WANTED},
    "collective": [
        EIGHT,
        score("h100-80gb-sxm / nccl-tests / alltoall / 2 GPUs", 1.0, 1.0),
        score("a100-80gb-sxm / nccl-tests / alltoall / 8 GPUs", 1.0, 1.0),
    ],
}


def test_a_figure_of_eight_gpus_pools_no_stack_of_two() -> None:
    (figure,) = (one for one in bench.WANTED if "alltoall" in one.stack)
    assert figure.errors(SCORES) == {"ours": EIGHT.errors["ours"]}


def test_the_table_says_by_how_much_a_figure_falls_short() -> None:
    lines = bench.describe(SCORES).splitlines()
    (line,) = (line for line in lines if line.startswith("| collective h100, alltoall, 8 GPUs"))
    assert line.endswith("| 2 | 3.0 |")
    (line,) = (line for line in lines if "Megatron-core" in line)
    assert line.endswith("| 0 | no rows |")
