"""XLA options of one program: known ones are taken, unknown ones are left out with a word."""

import jax
import pytest

from models import compiler_options as options_of


def test_this_jaxlib_knows_every_option_that_gpus_get() -> None:
    """The optional parts of the list of commands are spelt as this version spells them."""
    for options in (options_of._DECODE_ON_CUDA, options_of._train_on_cuda()):
        assert options_of.accepted(options) == options


def test_an_option_that_is_not_known_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_of.accepted({"xla_gpu_no_such_thing": True}) == {}
    assert "xla_gpu_no_such_thing=True is left out" in capsys.readouterr().err


def test_a_cpu_gets_no_options() -> None:
    device = jax.devices("cpu")[0]
    assert options_of.decode_options(device) == options_of.train_options(device) == {}
