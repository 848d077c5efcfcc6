"""kill -9 in the middle of a run, then the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrl.cli import save_config
from jaxrl.config import Config

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 240.0
LEARNT = ("actor/grad_norm", "actor/pg_loss", "reward/mean", "mismatch/kl_mean")


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "jaxrl.train", "--config", str(config)]


def environment() -> dict[str, str]:
    """Without the eight simulated devices of the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    return {**kept, "JAX_PLATFORMS": "cpu"}


def learnt(folder: Path) -> list[tuple[float, ...]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in LEARNT) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_killed_run_goes_on(
    tiny_config: Callable[..., Config], tmp_path: Path, max_staleness: int
) -> None:
    """Synchronous: bitwise the uninterrupted curve. Asynchronous: every step once, every prompt once."""
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    configs = {}
    for name, folder in folders.items():
        configs[name] = tmp_path / f"{name}.yaml"
        config = tiny_config(
            steps=60, max_staleness=max_staleness, dir=folder, checkpoint_every=5, eval_every=0
        )
        save_config(config, configs[name])
    subprocess.run(
        command(configs["whole"]), cwd=ROOT, env=environment(), check=True, timeout=DEADLINE_S
    )
    process = subprocess.Popen(command(configs["killed"]), cwd=ROOT, env=environment())
    began = time.monotonic()
    while not (folders["killed"] / "checkpoints" / "5").is_dir():
        assert time.monotonic() - began < DEADLINE_S
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    done_before = len((folders["killed"] / "metrics.jsonl").read_text().splitlines())
    assert done_before < 60, "killed too late to show anything"
    subprocess.run(
        command(configs["killed"]), cwd=ROOT, env=environment(), check=True, timeout=DEADLINE_S
    )
    steps = [json.loads(line)["step"] for line in (folders["killed"] / "metrics.jsonl").open()]
    assert steps == list(range(1, 61))
    if max_staleness == 0:
        assert learnt(folders["killed"]) == learnt(folders["whole"])
    summary = json.loads((folders["killed"] / "summary.json").read_text())
    assert sum(summary["staleness_histogram"].values()) == 60 * 16
