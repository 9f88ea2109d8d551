"""One file of weights out of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from potamos.pretrain.config import parse_recipe
from potamos.pretrain.runs import RunError, open_run
from potamos.pretrain.weights import write_weights


@pytest.fixture(scope="module")
def run(trial, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    assert trial.fit(folder, "train.steps=2") == 0
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_file_holds_what_the_model_computes_with(run, tmp_path, dtype):
    out = tmp_path / "new" / "weights.safetensors"
    count = write_weights(run, out, dtype=dtype)
    opened = open_run(run)
    expected = opened.system.state_dict()
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == {name for name, _ in opened.system.named_parameters()}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            assert torch.equal(file.get_tensor(name).float(), expected[name].to(file.get_tensor(name).dtype).float())
        metadata = file.metadata()
    assert count == sum(p.numel() for p in opened.system.parameters())
    assert parse_recipe(metadata["recipe"]).name == opened.recipe.name
    assert metadata["step"] == "2"
    assert [path.name for path in out.parent.iterdir()] == ["weights.safetensors"]


def test_what_cannot_be_written_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="--dtype int8: choose one of fp32"):
        write_weights(run, tmp_path / "a", dtype="int8")
    with pytest.raises(RunError, match="is a folder"):
        write_weights(run, tmp_path)
    with pytest.raises(RunError):
        write_weights(tmp_path / "none", tmp_path / "a")
