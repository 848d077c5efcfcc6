"""A run's own programs, compiled for the host's devices and read: what CI can rehearse without a plug-in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax
import pytest

from jaxrl.config import Config, MeshConfig, ModelOptions, RolloutConfig, TrainConfig
from jaxrl.errors import UserError
from jaxrl.programs import Stage
from jaxrl.rehearse import device_bytes, main, make_stage, rehearse
from roofline.datasheets import datasheet
from roofline.phases import Phase
from roofline.rehearse import compare
from roofline.rehearse.executable import Executable, compile_program
from roofline.rehearse.target import HOST, target_devices, target_names

TINY = Config(
    model=ModelOptions(
        width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffw_size=96
    ),
    train=TrainConfig(row_tokens=32, rows_per_microbatch=16, logprob_chunk_tokens=128),
    rollout=RolloutConfig(slots=16, chunk_steps=4, max_prompt_tokens=16, max_new_tokens=16),
    mesh=MeshConfig(colocated=True),
)
NORMS_SHARE = 0.02
"""Norm scales and scalars are left out of predicted collectives: below this share at these sizes."""


@pytest.fixture(autouse=True)
def _promotion_as_in_a_run() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        yield


@cache
def stage(fsdp: int = 1) -> Stage:
    mesh = MeshConfig(colocated=True, learner_fsdp=fsdp, rollout_data=fsdp)
    return make_stage(replace(TINY, mesh=mesh), HOST, 8)


@cache
def compiled(phase: Phase, fsdp: int = 1) -> Executable:
    return compile_program(stage(fsdp).program(phase))


def line(executable: Executable, name: str) -> compare.Line:
    return next(one for one in compare.lines(executable) if one.name == name)


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.DECODE])
def test_the_compiled_flops_are_the_predicted_ones(phase: Phase) -> None:
    assert line(compiled(phase), "flops").ratio == pytest.approx(1.0)


def test_three_devices_deal_the_prompts_of_a_prefill() -> None:
    mesh = MeshConfig(learner_fsdp=4, rollout_data=3)
    rollout = replace(TINY.rollout, slots=24)
    grpo = replace(TINY.grpo, prompts_per_step=8, group_size=4)
    dealt = make_stage(replace(TINY, mesh=mesh, rollout=rollout, grpo=grpo), HOST, 8)
    executable = compile_program(dealt.program(Phase.PREFILL))
    assert executable.program.arguments[1].shape[0] == 6
    assert line(executable, "flops").ratio == pytest.approx(1.0)


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.DECODE, Phase.OPTIMIZER])
def test_donated_memory_is_taken_over_and_nothing_goes_through_the_host(phase: Phase) -> None:
    executable = compiled(phase)
    assert executable.donated > 0
    failed = [check for check in compare.checks(executable) if not check.holds]
    assert not failed


def test_the_logits_of_all_tokens_never_exist_at_once() -> None:
    program = compiled(Phase.TRAIN).program
    assert program.tokens == TINY.train.row_tokens * TINY.train.rows_per_microbatch
    assert not compiled(Phase.TRAIN).whole_logits


def test_a_program_that_makes_all_logits_at_once_is_found_out() -> None:
    whole = replace(TINY, train=replace(TINY.train, logprob_chunk_tokens=512))
    made = make_stage(whole, HOST, 1).program(Phase.SCORE)
    watched = replace(made, tokens=512)
    check = next(c for c in compare.checks(compile_program(watched)) if "logits" in c.name)
    assert not check.holds
    assert check.found != "none"


def test_collectives_on_eight_devices_are_those_predicted() -> None:
    executable = compiled(Phase.TRAIN, fsdp=8)
    gathered = line(executable, "all-gather, arrays")
    assert gathered.ratio == pytest.approx(1.0, abs=NORMS_SHARE)
    assert {len(c.group) for c in executable.collectives} == {8}


@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_publication_gathers_each_stacked_weight_once_and_lays_it_out_anew(fsdp: int) -> None:
    executable = compiled(Phase.PUBLISH, fsdp)
    exact = ["memory traffic", "kernels"]
    exact += ["all-gather, number", "all-gather, arrays"] if fsdp > 1 else []
    assert [line(executable, name).ratio for name in exact] == [1.0] * len(exact)


def test_building_the_programs_allocates_nothing() -> None:
    before = {id(array) for array in jax.live_arrays()}
    fresh = make_stage(replace(TINY, mesh=MeshConfig(colocated=True)), HOST, 1)
    for phase in (Phase.DECODE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH, Phase.PREFILL):
        fresh.program(phase)
    made = [a for a in jax.live_arrays() if id(a) not in before and a.size > 16]
    assert not made


def test_what_does_not_fit_is_refused_with_the_nearest_choice_that_should() -> None:
    executable = compiled(Phase.TRAIN)
    totals = device_bytes(stage(), [executable])
    assert set(totals) == {"shared"}
    small = replace(datasheet("h200"), hbm_bytes=0.8 * totals["shared"])
    from jaxrl.rehearse import _check_fits  # noqa: PLC0415

    with pytest.raises(UserError, match=r"GiB; by the plan it fits with --\w+\.\w+"):
        _check_fits(stage(), [executable], totals, small)
    _check_fits(stage(), [executable], totals, replace(small, hbm_bytes=2 * totals["shared"]))


def test_too_few_devices_and_unknown_hardware_are_refused() -> None:
    with pytest.raises(UserError, match="need 2 devices"):
        make_stage(replace(TINY, mesh=MeshConfig()), HOST, 1)
    with pytest.raises(ValueError, match=r"no target description of 'l4'\. Known: a100"):
        target_devices("l4", 1)
    with pytest.raises(ValueError, match="a node of h200 has 1 to 8"):
        target_devices("h200", 9)


def test_every_target_is_a_known_card() -> None:
    assert {"a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm", "h200", "b200"} == set(target_names())
    assert all(datasheet(name).name == name for name in target_names())


def test_a_misspelt_setting_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "quickstart", "--hardware", HOST, "--rollout.slotz", "4"])
    assert ended.value.code == 2
    assert "slots" in capsys.readouterr().err


def test_the_report_holds_every_line_in_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(hardware=HOST, devices=1, phases=["publish"], json=False, out=None)
    report = rehearse(TINY, options)
    (entry,) = report["programs"]
    assert entry["phase"] == "publish"
    assert report["compiled_not_run"]
    assert {"flops", "peak memory"} <= {one["name"] for one in entry["lines"]}
    assert "compiled, not run" in capsys.readouterr().out
