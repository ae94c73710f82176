"""Adapters in memory, their information, and their folders without the `peft` library."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from varshare_rl.adapters import Adapter, AdapterInfo, LowRank, adapter_scale, describe, read_adapter, write_adapter
from varshare_rl.errors import UserError


def factors(inputs: int, outputs: int, rank: int, scale: float = 1.0) -> LowRank:
    return LowRank(torch.randn(rank, inputs), torch.randn(outputs, rank), scale)


def example() -> Adapter:
    return {
        "actor.0": factors(4, 7, 2, 1.5),
        "actor.10": factors(7, 7, 2, 1.5),
        "critic.0": factors(4, 7, 3, 0.7),
        "0": factors(5, 3, 1, 1.5),
    }


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.keys() == other.keys()
    for module, pair in one.items():
        assert torch.equal(pair.a, other[module].a)
        assert torch.equal(pair.b, other[module].b)
        assert math.isclose(pair.scale, other[module].scale, rel_tol=1e-12)


def test_low_rank_by_hand() -> None:
    pair = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0], [-1.0]]), 0.5)
    assert (pair.rank, pair.in_features, pair.out_features) == (1, 2, 3)
    assert pair.delta().tolist() == [[1.5, 3.0], [0.0, 0.0], [-0.5, -1.0]]
    folded = pair.folded()
    assert (folded.scale, folded.b.tolist()) == (1.0, [[1.5], [0.0], [-0.5]])
    assert pair.is_finite()
    assert not LowRank(pair.a, pair.b, math.inf).is_finite()
    assert not LowRank(pair.a * math.nan, pair.b).is_finite()


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 3)), ((3,), (4, 3)), ((0, 3), (4, 0))])
def test_factors_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(torch.zeros(a), torch.zeros(b))


def test_scales_by_hand() -> None:
    assert adapter_scale(16.0, 4, rslora=False) == 4.0
    assert adapter_scale(16.0, 4, rslora=True) == 8.0


@pytest.mark.parametrize("rslora", [False, True])
def test_description_states_every_rank_and_scale(rslora: bool) -> None:
    adapter = example()
    info = describe(adapter, "base", rslora, dropout=0.1)
    assert (info.rank, info.base_model, info.dropout) == (2, "base", 0.1)
    for module, pair in adapter.items():
        assert info.rank_of(module) == pair.rank
        assert info.scale_of(module) == pytest.approx(pair.scale, rel=1e-14)
    # names are matched whole: the pattern of "0" does not speak of "actor.0"
    assert isinstance(info.target_modules, str)
    assert [bool(re.fullmatch(info.target_modules, name)) for name in ("0", "actor.0", "actor.1", "actorx0")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_patterns_match_ends_of_paths_and_the_first_counts() -> None:
    info = AdapterInfo(rank=8, alpha=4.0, rank_pattern={"q": 2, "layers.1.q": 3}, alpha_pattern={"^v$": 1.0})
    assert [info.rank_of(path) for path in ("q", "layers.1.q", "iq", "q.x")] == [2, 2, 8, 8]
    assert [info.alpha_of(path) for path in ("v", "layers.v")] == [1.0, 4.0]


@pytest.mark.parametrize("rslora", [False, True])
def test_folders_round_trip(tmp_path: Path, rslora: bool) -> None:
    adapter = example()
    info = describe(adapter, "some/base", rslora, dropout=0.25)
    write_adapter(tmp_path / "new" / "one", adapter, info)
    found, stated = read_adapter(tmp_path / "new" / "one")
    assert_same(found, adapter)
    assert stated == info
    write_adapter(tmp_path / "two", found, stated)
    assert_same(read_adapter(tmp_path / "two")[0], adapter)
    assert os.listdir(tmp_path / "new") == ["one"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", example())
    write_adapter(tmp_path / "one", {"x": factors(2, 2, 1)})
    assert list(read_adapter(tmp_path / "one")[0]) == ["x"]
    assert os.listdir(tmp_path) == ["one"]


def test_an_adapter_folder_stays_if_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = example()
    write_adapter(tmp_path / "one", adapter)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("varshare_rl.adapters.folder.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(tmp_path / "one", {"x": factors(2, 2, 1)})
    assert_same(read_adapter(tmp_path / "one")[0], adapter)
    assert os.listdir(tmp_path) == ["one"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no factors"):
        write_adapter(tmp_path / "x", {})
    with pytest.raises(UserError, match=r"states rank 8 and scale 1 for actor\.0"):
        write_adapter(tmp_path / "x", example(), AdapterInfo())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        write_adapter(tmp_path / "full", example())
    with pytest.raises(UserError, match="it is a file"):
        write_adapter(tmp_path / "full" / "thesis.tex", example())
    assert os.listdir(tmp_path) == ["full"]


REFUSED = {
    "kind": ({"peft_type": "IA3"}, "only LORA"),
    "dora": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "all"}, "biases of the base"),
    "lora_bias": ({"lora_bias": True}, "biases on its factors"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "whole modules"),
    "tokens": ({"trainable_token_indices": [1]}, "embeddings"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "qalora": ({"use_qalora": True}, "quantised"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
    "nan_alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "infinite_alpha": ({"alpha_pattern": {"x": float("inf")}}, "lora_alpha is inf"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "base weights"),
    "unknown": ({"use_quantum": True}, "use_quantum=true"),
    "no_rank": ({"r": None}, "adapter_config.json"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout is 1"),
    "no_expression": ({"rank_pattern": {"(": 2}}, "adapter_config.json"),
    "wrong_rank": ({"r": 5}, "states 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_kinds_that_cannot_be_read_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    change, reason = REFUSED[case]
    write_adapter(tmp_path / "one", {"x": factors(4, 3, 2)})
    file = tmp_path / "one" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=reason) as caught:
        read_adapter(tmp_path / "one")
    assert "\n" not in str(caught.value)


A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
TENSORS = {
    "no_b": ({A: torch.zeros(2, 4)}, "only factor A"),
    "embedding": ({"base_model.model.x.lora_embedding_A": torch.zeros(2, 4)}, "embeddings"),
    "magnitude": ({"base_model.model.x.lora_magnitude_vector": torch.zeros(2)}, "DoRA"),
    "factor_bias": ({"base_model.model.x.lora_B.bias": torch.zeros(2)}, "biases on factors"),
    "convolution": ({A: torch.zeros(2, 4, 3, 3), B: torch.zeros(3, 2, 1, 1)}, "convolutions"),
    "integers": ({A: torch.zeros(2, 4).char(), B: torch.zeros(3, 2).char()}, "int8"),
    "ranks": ({A: torch.zeros(2, 4), B: torch.zeros(3, 1)}, "rank 2 and 1"),
    "empty": ({A: torch.zeros(0, 4), B: torch.zeros(3, 0)}, "states 2"),
    "whole_module": ({"base_model.model.head.weight": torch.zeros(2, 4)}, r"head\.weight"),
    "nothing": ({}, "no factors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_factors_are_refused(tmp_path: Path, case: str) -> None:
    tensors, reason = TENSORS[case]
    write_adapter(tmp_path / "one", {"x": factors(4, 3, 2)})
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=reason):
        read_adapter(tmp_path / "one")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    write_adapter(tmp_path / "one", {"x": factors(4, 3, 2)})
    file = tmp_path / "one" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    with pytest.raises(UserError, match="damaged"):
        read_adapter(tmp_path / "one")
    file.unlink()
    with pytest.raises(UserError, match="it is missing"):
        read_adapter(tmp_path / "one")
    (tmp_path / "one" / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled"):
        read_adapter(tmp_path / "one")
    (tmp_path / "one" / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no JSON object"):
        read_adapter(tmp_path / "one")


def test_the_names_in_the_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", {"layers.0": factors(4, 3, 2)})
    shapes = {
        key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "one/adapter_model.safetensors").items()
    }
    assert shapes == {
        "base_model.model.layers.0.lora_A.weight": (2, 4),
        "base_model.model.layers.0.lora_B.weight": (3, 2),
    }


def test_what_peft_leaves_out_or_adds_is_understood(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", {"x": factors(4, 3, 8)})
    file = tmp_path / "one" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["r"], config["lora_alpha"]
    config |= {
        "runtime_config": {"ephemeral_gpu_offload": True},
        "loftq_config": {"loftq_bits": None, "loftq_iter": 0},
        "layer_replication": [],
        "fan_in_fan_out": True,
        "alpha_pattern": {"^nothing$": 3, "x": 4},
    }
    file.write_text(json.dumps(config))
    adapter, info = read_adapter(tmp_path / "one")
    assert (info.rank, info.alpha, info.fan_in_fan_out, adapter["x"].scale) == (8, 8.0, True, 0.5)


def test_a_pattern_that_is_no_expression_of_the_path_counts_if_it_is_the_path() -> None:
    info = AdapterInfo(rank=8, alpha=4.0, alpha_pattern={"blocks[0].q": 1.0}, rank_pattern={"a+b": 2})
    assert (info.alpha_of("blocks[0].q"), info.alpha_of("blocks0.q")) == (1.0, 1.0)
    assert (info.rank_of("a+b"), info.rank_of("aab")) == (2, 2)


def test_a_readme_is_kept_and_paths_are_those_of_the_plain_model(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", example())
    (tmp_path / "one" / "README.md").write_text("mine")
    write_adapter(
        tmp_path / "one", {"module._orig_mod.x": factors(2, 2, 1), "module.y._orig_mod.z": factors(2, 2, 1)}
    )
    assert sorted(read_adapter(tmp_path / "one")[0]) == ["x", "y.z"]
    assert (tmp_path / "one" / "README.md").read_text() == "mine"
    write_adapter(tmp_path / "two", {"module.x": factors(2, 2, 1), "y": factors(2, 2, 1)})
    assert sorted(read_adapter(tmp_path / "two")[0]) == ["module.x", "y"]
    with pytest.raises(UserError, match="plain and compiled form"):
        write_adapter(tmp_path / "two", {"_orig_mod.x": factors(2, 2, 1), "x": factors(2, 2, 1)})
