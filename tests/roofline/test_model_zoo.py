"""Architectures by name have the published parameter counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roofline.model_zoo import ZOO, find_model


def test_every_published_parameter_count_is_met_exactly(shared_data: Path) -> None:
    rows = json.loads((shared_data / "roofline" / "model_configs.json").read_text("utf-8"))
    assert len(rows) == len(ZOO)
    for row in rows:
        model = find_model(row["name"].partition(" (")[0])
        assert model.num_parameters == row["params_total"], row["name"]
        assert model.num_parameters == (row["reported_exact_params"] or model.num_parameters)


def test_an_organisation_and_capitals_do_not_matter() -> None:
    assert find_model("Qwen/Qwen3-1.7B") is ZOO["qwen3-1.7b"]


def test_a_config_json_and_its_folder_name_the_same_model(tmp_path: Path) -> None:
    content = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128,
        "num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 32,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert find_model(str(file)) == find_model(str(tmp_path))
    assert find_model(str(file)).config.width == 64


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"qwen3-0\.6b"):
        find_model("qwen9-1t")
