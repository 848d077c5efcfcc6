"""python -m models.hf: export of a run, merging, inspection, and what they refuse."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.checkpoint import Checkpoints
from jaxrl.learner.steps import TrainState
from jaxrl.tokenizer import CharTokenizer, load_tokenizer
from models.config import Lora, ModelConfig
from models.hf import checkpoint_folder, describe_model, export_policy, load_policy, save_policy
from models.hf.__main__ import main
from models.hf.merge import merge
from models.sharding import map_parameters

CONFIG = ModelConfig(
    family="qwen3", vocab_size=14, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
    ffw_size=64, max_positions=32, qk_norm=True, eos_token_ids=(1,),
)  # fmt: skip
MERGE_ATOL = 1e-6  # float32 sums of values of order one


def make(seed, config=CONFIG):
    rng = np.random.default_rng(seed)
    noise = partial(rng.standard_normal, dtype=np.float32)
    return map_parameters(lambda _, abstract: jnp.asarray(noise(abstract.shape)), config)


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with checkpoints 0 and 7."""
    run = tmp_path_factory.mktemp("run")
    CharTokenizer("0123456789+=").save(describe_model(CONFIG, run))
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    for step in (0, 7):
        policy = make(step)
        state = TrainState(policy=policy, optimizer=(policy, jnp.int32(3)), step=jnp.int32(step))
        checkpoints.save(step, state, {})
    checkpoints.close()
    return run


def test_the_newest_checkpoint_of_a_run_is_exported_with_its_tokenizer(
    run_folder, tmp_path, capsys
):
    main(["export", f"--run={run_folder}", f"--out={tmp_path / 'out'}"])
    assert "checkpoint 7" in capsys.readouterr().out
    back = load_policy(tmp_path / "out")
    assert back.config == CONFIG
    assert equal(back, make(7))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode("12+3=") == CharTokenizer("0123456789+=").encode("12+3=")
    assert tokenizer.stop_ids == (1,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_earlier_checkpoint_is_exported_in_bfloat16(run_folder, tmp_path):
    main(["export", f"--run={run_folder}", f"--out={tmp_path}", "--step=0", "--dtype=bfloat16"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make(0))
    assert equal(load_policy(tmp_path, dtype=jnp.bfloat16), half)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_policy_in_training_is_exported_like_a_checkpoint(run_folder, tmp_path):
    for seed in (3, 7):  # the second replaces the first
        export_policy(make(seed), tmp_path / "step_7", run=run_folder)
    main(["export", f"--run={run_folder}", f"--out={tmp_path / 'out'}"])
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("step_7", "out")]
    assert names[0] == names[1]
    assert equal(load_policy(tmp_path / "step_7"), load_policy(tmp_path / "out"))


def test_the_source_checkpoints_tokenizer_and_stop_tokens_go_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    CharTokenizer("ab").save(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    describe_model(CONFIG, tmp_path / "run", source)
    export_policy(make(0), tmp_path / "out", run=tmp_path / "run")
    assert load_tokenizer(tmp_path / "out").stop_ids == (1, 2)


def test_exports_that_cannot_be_made_say_why(run_folder, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    describe_model(replace(CONFIG, ffw_size=32), other)
    adapted = tmp_path / "adapted"
    describe_model(replace(CONFIG, lora=Lora.of(2, 4.0, "all-linear")), adapted)
    for words, message in (
        ([f"--run={tmp_path}", "--out=x"], "holds no model/config.json"),
        ([f"--run={run_folder}", f"--out={tmp_path / 'used'}"], "exists and is not empty"),
        ([f"--run={run_folder}", "--out=x", "--step=5"], "no checkpoint of step 5; it has [0, 7]"),
        ([f"--run={other}", "--out=x"], "parameter up in"),
        ([f"--run={run_folder}", "--out=x", "--adapter"], "no adapter; export it without"),
        ([f"--run={adapted}", "--out=x", "--adapter", "--dtype=bfloat16"], "leave --dtype out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["export", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def three(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for seed, folder in enumerate(folders):
        save_policy(make(seed), folder)
    return folders


def close(policy, expected):
    return jax.tree.all(
        jax.tree.map(lambda a, b: np.allclose(a, b, atol=MERGE_ATOL, rtol=0), policy, expected)
    )


def test_a_soup_is_the_mean(three, tmp_path):
    main(["merge", *map(str, three), f"--out={tmp_path / 'out'}"])
    mean = jax.tree.map(
        lambda *x: sum(np.asarray(v, np.float64) for v in x) / 3, *map(make, range(3))
    )
    assert close(load_policy(tmp_path / "out"), mean)


def test_a_linear_merge_weighs_and_keeps_the_first_ones_files(three, tmp_path):
    CharTokenizer("0123456789+=").save(three[0])
    merge(three[:2], tmp_path / "out", weights=[0.9, 0.1])
    line = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, make(0), make(1))
    assert close(load_policy(tmp_path / "out"), line)
    assert load_tokenizer(tmp_path / "out").encode("1") == CharTokenizer("0123456789+=").encode("1")
    assert load_policy(tmp_path / "out").config == CONFIG


def test_the_ends_of_the_line_are_the_checkpoints_themselves(three, tmp_path):
    merge(three[:2], tmp_path / "out", weights=[0.0, 1.0])
    assert equal(load_policy(tmp_path / "out"), make(1))


def test_merges_without_a_meaning_are_refused(three, tmp_path):
    save_policy(make(0, replace(CONFIG, num_layers=1)), tmp_path / "short")
    for sources, weights, message in (
        (three[:1], None, "at least 2"),
        (three[:2], [1.0], "1 weights for 2 checkpoints"),
        (three[:2], [0.9, 0.2], "sum to 1.1; they must sum to 1"),
        (three[:2], [float("nan"), 1.0], "must sum to 1"),
        ([three[0], tmp_path / "short"], None, "num_layers=2, but .* has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(sources, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_a_runs_folder_is_no_checkpoint_and_the_message_says_how_to_make_one(
    run_folder, three, tmp_path, capsys
):
    out = f"--out={tmp_path / 'out'}"
    for words in (["merge", str(three[0]), str(run_folder), out], ["inspect", str(run_folder)]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert f"export --run {run_folder} --step STEP" in capsys.readouterr().err


def test_weights_may_be_read_by_whoever_may_read_the_configuration(three):
    assert {path.stat().st_mode & 0o777 for path in three[0].iterdir()} == {
        (three[0] / "config.json").stat().st_mode & 0o777
    }


def test_inspection_gives_sizes_and_shardings(tmp_path, capsys):
    save_policy(make(0), tmp_path)
    main(["inspect", str(tmp_path), "--fsdp=4", "--tensor=2"])
    text = capsys.readouterr().out
    assert f"qwen3, {CONFIG.num_parameters:,} parameters, stored as F32 in 1 file" in text
    up = next(line for line in text.splitlines() if line.split()[0] == "up")
    assert "(2, 32, 64)" in up
    assert "(-, fsdp, tensor)" in up
    assert f"{4 * 2 * 32 * 64 / 8 / 2**20:.2f} MiB" in up
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), "--tensor=3"])
    assert "kv_heads=2 (of parameter" in capsys.readouterr().err
    inspect, new = ["inspect", str(tmp_path), "--fsdp=0"], ["new", "--text=x", "--out=y", "--ffw=0"]
    for words in (inspect, new):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert "'0' must be a whole number from 1 on" in capsys.readouterr().err


def test_what_is_neither_folder_nor_reachable_is_said_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is no folder and no hub id; give a folder"):
        checkpoint_folder("/nowhere/at/all")
    with pytest.raises(ValueError, match=r"not in the local cache, .* download .* make it first"):
        checkpoint_folder("nobody/no-such-model")
