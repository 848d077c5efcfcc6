"""Run folders: the same run resumes, another is refused, one writer at a time, no step twice."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxrl import run_folder
from jaxrl.cli import load_config
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.run_folder import open_run
from jaxrl.telemetry.jsonl import read_records

ROOT = Path(__file__).resolve().parents[2]


def _config(folder: Path, **sections) -> Config:
    base = Config()
    changed = {name: replace(getattr(base, name), **values) for name, values in sections.items()}
    return replace(base, run=replace(base.run, dir=folder, **changed.pop("run_", {})), **changed)


def _open_and_close(config: Config) -> bool:
    """Open, leave a first checkpoint as a run does, close; whether it was resumed."""
    folder = open_run(config, ["--train.steps", "3"])
    (folder.checkpoints / "0").mkdir(parents=True, exist_ok=True)
    folder.close()
    return folder.resumed


def test_a_new_folder_is_made_and_holds_the_configuration(tmp_path):
    config = _config(tmp_path / "a" / "b", grpo={"clip_high": 0.28})
    assert not _open_and_close(config)
    assert load_config(tmp_path / "a" / "b" / "config.yaml") == config
    assert (tmp_path / "a" / "b" / "commands.txt").read_text().endswith(" --train.steps 3\n")


def test_the_same_configuration_resumes(tmp_path):
    assert not _open_and_close(_config(tmp_path / "r"))
    assert _open_and_close(_config(tmp_path / "r"))


def test_a_moved_folder_resumes(tmp_path):
    _open_and_close(_config(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert _open_and_close(_config(tmp_path / "new"))


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"steps": 999}},
        {"checkpoint": {"every_steps": 3, "keep": 9}},
        {"eval": {"every_steps": 3}},
        {"task": {"reward_workers": 5}},
    ],
)
def test_what_leaves_the_curve_so_far_alone_may_change(change, tmp_path):
    _open_and_close(_config(tmp_path))
    changed = _config(tmp_path, **change)
    assert _open_and_close(changed)
    assert load_config(tmp_path / "config.yaml") == changed


def test_another_configuration_is_refused_with_both_values_and_the_remedies(tmp_path):
    _open_and_close(_config(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()
    other = _config(tmp_path, grpo={"clip_high": 0.28}, train={"learning_rate": 1e-3, "steps": 9})
    with pytest.raises(UserError) as refused:
        open_run(other)
    message = str(refused.value)
    assert "grpo.clip_high: 0.2 in the folder, 0.28 now" in message
    assert "train.learning_rate: 1e-06 in the folder, 0.001 now" in message
    assert "train.steps" not in message
    assert "--run.dir=" in message
    assert f"--run.fork-from={tmp_path}" in message
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert _open_and_close(_config(tmp_path)), "the refusal kept the lock"


def test_more_steps_are_refused_where_the_learning_rate_depends_on_them(tmp_path):
    _open_and_close(_config(tmp_path, train={"schedule": "cosine"}))
    with pytest.raises(UserError, match=r"train\.steps: 100 in the folder, 200 now"):
        open_run(_config(tmp_path, train={"schedule": "cosine", "steps": 200}))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex but no config\.yaml"):
        open_run(_config(tmp_path))


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*file/run cannot be written"):
        open_run(_config(tmp_path / "file" / "run"))


def test_a_folder_without_write_permission_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr(run_folder.os, "open", refuse)  # root may write everywhere
    with pytest.raises(UserError, match=r"cannot be written: Permission denied .*--run\.dir"):
        open_run(_config(tmp_path))


HOLD = (
    "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
    "from jaxrl.config import Config, RunConfig\nfrom jaxrl.run_folder import open_run\n"
    "folder = open_run(Config(run=RunConfig(dir=Path(sys.argv[1]))))\n"
    "print('open', flush=True)\nsys.stdin.read()\n"
)


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"being written by process {holder.pid}"):
            open_run(_config(tmp_path))
        holder.kill()
        holder.wait(timeout=30)
    _open_and_close(_config(tmp_path))


def _write(path: Path, steps: list[int], torn: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + torn)


def test_rewinding_keeps_each_step_up_to_the_checkpoint_once(tmp_path):
    folder = open_run(_config(tmp_path))
    for log in (folder.metrics, folder.spans, folder.samples):
        _write(log, [0, 1, 2, 2, 3, 4], torn='{"step": 5, "rew')
    folder.rewind(2)
    for log in (folder.metrics, folder.spans, folder.samples):
        assert [record["step"] for record in read_records(log)] == [0, 1, 2, 2]
        assert log.read_bytes().endswith(b"\n")
    folder.rewind(None)
    assert folder.metrics.read_text() == ""
    folder.close()


def test_rewinding_a_run_that_logged_nothing_is_fine(tmp_path):
    folder = open_run(_config(tmp_path))
    folder.rewind(3)
    assert not folder.metrics.exists()
    folder.close()


def test_a_damaged_line_in_the_middle_is_named_not_skipped(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*m\.jsonl"):
        list(read_records(tmp_path / "m.jsonl"))
