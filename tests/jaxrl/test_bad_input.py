"""What a user can get wrong ends in one message on stderr and exit code 2, and overwrites nothing."""

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrl import evaluate, sft, train
from jaxrl.checkpoint import Checkpoints
from jaxrl.cli import save_config
from jaxrl.config import Config
from jaxrl.errors import UserError, user_message
from roofline.hardware import Hardware


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware(
        name="test machine", peak_flops_per_s={"float32": 1e14, "bfloat16": 1e14}, hbm_bytes=1e9,
        hbm_bytes_per_s=1e14, link_bytes_per_s=1e14, dispatch_s=1e-5, kernel_s=1e-6,
    )  # fmt: skip
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: hardware)


@pytest.fixture
def refusal(
    tiny_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command with extra words; the message of its refusal."""

    def call(
        *words: str, main: Callable[[list[str]], None] = train.main, bare: bool = False
    ) -> str:
        path = tmp_path / "tiny.yaml"
        save_config(tiny_config(), path)
        argv = [*words] if bare else ["--config", str(path), *words]
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert not any(file.stat().st_size for file in (tmp_path / "run").glob("*.jsonl"))
        return message

    return call


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grpo.clip-hihg=0.3"], ["clip-hihg", "clip-high"]),
        (["--train.steps=many"], ["train.steps", "many"]),
        (["--grpo.group-size=1"], ["group_size=1", "at least 2"]),
        (["--mesh.learner-data=64"], ["64", "8", "mesh"]),
        (["--mesh.learner-data=100000"], ["100001", "at most 256"]),
        (["--rollout.slots=0"], ["rollout.slots=0", "at least 1"]),
        (["--mesh.learner-data=3"], ["rows_per_microbatch=8", "6 or 9"]),
        (["--mesh.rollout-data=5"], ["slots=12", "10 or 15"]),
        (["--mesh.rollout-tensor=4"], ["rollout_tensor=4", "[1, 2]"]),
        (["--rollout.max-new-tokens=64"], ["row_tokens=16", "68"]),
        (["--rollout.max-prompt-tokens=3"], ["max_prompt_tokens=3", "4"]),
        (["--rollout.slots=100000000"], ["GiB", "rollout.slots"]),
        (["--model.path=nowhere"], ["nowhere", "config.json"]),
        (["--task.name=stories"], ["stories", "model.path"]),
        (["--task.name=jsonl"], ["task.path"]),
        (["--run.fork-from=nowhere"], ["nowhere", "checkpoints"]),
        (["--model.num-kv-heads=3"], ["num_kv_heads=3", "num_heads=4"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_setting_is_named_with_its_remedy(
    refusal: Callable[..., str], words: list[str], said: list[str]
) -> None:
    message = refusal(*words)
    for part in said:
        assert part in message, message


def test_a_mesh_that_divides_nothing_is_refused_before_the_machine_is_measured(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: pytest.fail("measured"))
    assert "use 6 or 9" in refusal("--mesh.learner-data=3")


def test_a_malformed_task_line_is_named_by_file_and_line(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"\n')
    message = refusal("--task.name=jsonl", f"--task.path={path}")
    assert "problems.jsonl" in message
    assert "2" in message


def test_a_corrupt_checkpoint_folder_is_named(
    refusal: Callable[..., str], shared_data: Path, tmp_path: Path
) -> None:
    source, broken = shared_data / "weights" / "stories260K", tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tok512.model"):
        (broken / name).write_bytes((source / name).read_bytes())
    words = ["--task.name=stories", f"--model.path={broken}", "--rollout.max-prompt-tokens=128",
             "--rollout.max-new-tokens=192", "--train.row-tokens=320", "--sft.steps=0"]  # fmt: skip
    untouched = ["--model.width=128", "--model.head-size=32", "--model.ffw-size=384"]
    assert "safetensors" in refusal(*words, *untouched)
    (broken / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "model.safetensors" in refusal(*words, *untouched)


def test_a_folder_of_another_run_is_left_as_it_was(
    refusal: Callable[..., str], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    (folder / "checkpoints" / "0").mkdir(parents=True)
    save_config(tiny_config(seed=7, dir=folder), folder / "config.yaml")
    before = (folder / "config.yaml").read_bytes()
    message = refusal(f"--run.dir={folder}")
    assert "run.seed: 7 in the folder, 0 now" in message
    assert "fork-from" in message
    assert (folder / "config.yaml").read_bytes() == before


def test_a_run_that_never_began_does_not_claim_its_folder(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A first try that failed on its model must not force another run.dir on the second."""
    monkeypatch.setattr(train.build, "make_store", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        refusal()
    with pytest.raises(ZeroDivisionError):
        refusal("--run.seed=3")
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_folder_that_cannot_be_made_is_named(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run.dir" in refusal(f"--run.dir={tmp_path / 'file' / 'run'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "run.dir" in refusal(f"--run.dir={locked / 'run'}")


def test_out_of_memory_names_what_to_lower(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")

    monkeypatch.setattr(train.build, "make_store", exhausted)
    message = refusal()
    assert "out of memory" in message
    assert "rows-per-microbatch" in message


def test_evaluate_says_what_it_needs(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "--run" in refusal(main=evaluate.main, bare=True)
    missing = str(tmp_path / "none")
    assert missing in refusal("--run", missing, main=evaluate.main, bare=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "no permission for /a/b"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "the disk is full while writing /a/b",
        ),
        (ValueError("RESOURCE_EXHAUSTED: writing x: No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: allocating 9 bytes"), "out of memory"),
        (ValueError("a bug"), None),
    ],
)
def test_what_the_system_refuses_is_told_apart(error: Exception, said: str | None) -> None:
    wrapped = RuntimeError("in a worker")
    wrapped.__cause__ = error
    message = user_message(wrapped)
    assert (message or "").startswith(said or "")
    assert (message is None) == (said is None)


def test_weights_of_another_shape_are_not_called_corrupt(tmp_path: Path) -> None:
    with closing(Checkpoints(tmp_path / "run" / "checkpoints", keep=1)) as checkpoints:
        checkpoints.save(0, {"w": jnp.zeros((4, 2))}, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=r"another shape.*set model\.\*") as refused:
            checkpoints.restore_state(0, {"w": jnp.zeros((4, 3))})
    assert "remove" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--problems=0"], "--problems=0"),
        (["--samples=0"], "--samples=0"),
        (["--task=nonsense"], "nonsense"),
    ],
)
def test_evaluate_refuses_what_it_cannot_sample(
    refusal: Callable[..., str], words: list[str], said: str
) -> None:
    assert said in refusal("--config=quickstart", *words, main=evaluate.main, bare=True)


def test_an_unknown_configuration_name_lists_the_known_ones(refusal: Callable[..., str]) -> None:
    message = refusal("--config=nowhere", bare=True)
    assert "nowhere" in message
    assert "quickstart" in message


def test_sft_without_steps_is_refused(refusal: Callable[..., str]) -> None:
    assert "sft.steps" in refusal("--sft.steps=0", main=sft.main)


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    save_config(tiny_config(), path)
    train.main(["--config", str(path), "--dry-run"])
    printed = capsys.readouterr().out
    for quantity in ("parameters", "micro-batch", "learner memory", "predicted train"):
        assert quantity in printed
    assert not (tmp_path / "run").exists()
