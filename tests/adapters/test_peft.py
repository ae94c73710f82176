"""Adapter folders against the real `peft`: what we write it reads, what it writes we read, or say why not."""

from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import SEQUENCE, TINY, TINY_ALGORITHM
from models import PATHS, TARGETS, Attention, Model, tokens
from torch import nn

from varshare_rl.adapters import Adapter, LowRank, apply_lora, describe, read_adapter, write_adapter
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device
from varshare_rl.continual.sequence import load_sequence
from varshare_rl.errors import UserError
from varshare_rl.nn.merge import merged

peft = pytest.importorskip("peft")


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)


def random_adapter(model: nn.Module, paths: list[str], seed: int) -> Adapter:
    """Factors of random ranks and scales for some linear modules."""
    draw = random.Random(seed)
    adapter = {}
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        rank = draw.choice([1, 2, 3, 5])
        a, b = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
        adapter[path] = LowRank(a, b, draw.choice([0.25, 1 / 3, 1.0, math.pi]))
    return adapter


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_peft_reads_what_we_write(tmp_path: Path, seed: int, rslora: bool) -> None:
    base, x = Model(), tokens()
    adapter = random_adapter(base, [*PATHS, "head"][seed:], seed)
    write_adapter(tmp_path / "task", adapter, describe(adapter, "base", rslora, dropout=0.1))
    lora = apply_lora(copy.deepcopy(base), list(adapter))
    lora.add("task", adapter)
    lora.activate("task")
    assert not torch.allclose(lora.model(x), base(x))

    model = peft.PeftModel.from_pretrained(base, tmp_path / "task").eval()
    torch.testing.assert_close(model.double()(x), lora.model.double()(x), rtol=1e-9, atol=1e-9)
    result = model.load_adapter(tmp_path / "task", "again")
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    layers = {name for name, module in model.named_modules() if hasattr(module, "lora_A") and "task" not in name}
    assert layers == {f"base_model.model.{path}" for path in adapter}


def test_names_that_end_alike_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """A plain list of names would also match ``inner.0`` and ``inner.2``, whose factors are missing."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    base = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 4))
    adapter = random_adapter(base, ["0", "2"], seed=0)
    write_adapter(tmp_path / "task", adapter)
    expected = apply_lora(copy.deepcopy(base), "[02]")
    expected.add("task", adapter)
    expected.activate("task")
    x = torch.randn(5, 4)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "task").eval()
    torch.testing.assert_close(model(x), expected.model(x), rtol=1e-5, atol=1e-5)
    result = model.load_adapter(tmp_path / "task", "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "rank_pattern": {"r": 2, "lora_alpha": 3, "rank_pattern": {"q_proj": 5, "blocks.1.v_proj": 1}},
    "alpha_pattern": {"r": 2, "lora_alpha": 3, "alpha_pattern": {"^blocks.0.q_proj": 7, "v_proj": 2}},
    "both_and_rslora": {
        "r": 3, "lora_alpha": 2, "rank_pattern": {r".*\.0\..*": 4}, "alpha_pattern": {"q_proj": 9},
        "use_rslora": True,
    },
    "gaussian": {"r": 2, "lora_alpha": 5, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "expression": {"r": 2, "lora_alpha": 5, "target_modules": r".*1\.[qv]_proj"},
    "layers": {"r": 2, "lora_alpha": 5, "layers_to_transform": [1], "layers_pattern": "blocks"},
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_we_read_what_peft_writes(tmp_path: Path, case: str) -> None:
    base, x = Model(), tokens()
    config = peft.LoraConfig(**{"target_modules": TARGETS, **CONFIGS[case]})
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "task")
    lora = apply_lora(copy.deepcopy(base).eval(), TARGETS)
    lora.load(tmp_path / "task", "task")
    lora.activate("task")
    torch.testing.assert_close(lora.model(x), model(x), rtol=1e-5, atol=1e-5)
    adapter, info = read_adapter(tmp_path / "task")
    assert info.dropout == config.lora_dropout
    for path, factors in adapter.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        assert (factors.rank, factors.scale) == (layer.r["default"], pytest.approx(layer.scaling["default"]))
    lora.save("task", tmp_path / "back")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_folder_of_several_adapters_is_read_one_by_one(tmp_path: Path) -> None:
    base, x = Model(), tokens()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=TARGETS), "first")
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    lora = apply_lora(base, TARGETS)
    for name in ("first", "second"):
        lora.load(tmp_path / name, name)
        lora.activate(name)
        model.set_adapter(name)
        torch.testing.assert_close(lora.model(x), model(x), rtol=1e-5, atol=1e-5)


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "lora_only"}, "biases of the base"),
    "lora_bias": ({"lora_bias": True}, "biases on its factors"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "whole modules"),
    "tokens": ({"trainable_token_indices": {"embed": [1]}}, "embeddings"),
    "embedding": ({"target_modules": ["embed"]}, "embeddings"),
    "pissa": ({"init_lora_weights": "pissa"}, "base weights"),
}


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of tensors that are no matrices
@pytest.mark.parametrize("case", REFUSED)
def test_kinds_of_lora_that_we_cannot_read_are_refused(tmp_path: Path, case: str) -> None:
    settings, reason = REFUSED[case]
    config = peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, **settings})
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        read_adapter(tmp_path)


def test_convolutions_and_other_methods_are_refused(tmp_path: Path) -> None:
    convolution = nn.Sequential(nn.Conv2d(2, 3, 3))
    peft.get_peft_model(convolution, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "conv")
    with pytest.raises(UserError, match="convolutions"):
        read_adapter(tmp_path / "conv")
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
    peft.get_peft_model(Attention(), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="'IA3', and only LORA"):
        read_adapter(tmp_path / "ia3")


def follow_instructions() -> dict[str, Any]:
    """Run the code in the README.md of the current folder and return what it makes."""
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_an_exported_task_runs_in_peft_as_its_own_instructions_say(
    command: Command, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    settings = (*TINY, *TINY_ALGORITHM[algorithm], "network.rank=3", "network.alpha=2", "network.layer_norm=true")
    assert command("train", *settings, "total_transitions=960", "run_dir=run").code == 0
    outcome = command("export", "run=run", "task=swapped_left", "format=peft", "out=files")
    assert outcome.code == 0, outcome.err
    agent = load_agent(Path("run"), "last", Device.cpu)
    actor = agent.algorithm.trained_modules()["actor"].get_submodule("network")

    monkeypatch.chdir("files")
    names = follow_instructions()
    x = torch.randn(20, names["base"].get_submodule("0").in_features)
    task = list(agent.suite.task_names).index("swapped_left")
    torch.testing.assert_close(names["network"](x), merged(actor, task)(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(names["network"](x), merged(actor, 0)(x), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "share", "varshare"])
def test_a_task_of_a_sequence_runs_in_peft_too(
    command: Command, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = (
        "method.rank=3",
        "method.alpha=2",
        f"method={method}",
        *(("method.initial_tasks=1",) * (method == "share")),
    )
    outcome = command("continual", *TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE, *settings, "run_dir=run")
    assert outcome.code == 0, outcome.err
    outcome = command("export", "run=run", "task=swapped_left", "format=peft", "out=files")
    assert outcome.code == 0, outcome.err
    policy = load_sequence(Path("run"), "last", Device.cpu)[0].networks.policy
    monkeypatch.chdir("files")
    names = follow_instructions()
    x = torch.randn(20, names["base"].get_submodule("0").in_features)
    torch.testing.assert_close(names["network"](x), merged(policy(2), 0)(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(names["network"](x), merged(policy(0), 0)(x), atol=1e-5)
    assert Path("varshare_posterior.safetensors").exists() == (method == "varshare")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_base_weight_train_as_in_peft(tmp_path: Path, init: str) -> None:
    base, x = Model(), tokens()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    lora = apply_lora(copy.deepcopy(base), TARGETS)
    before = base(x)
    lora.add("task", rank=2, alpha=3, init=init)
    lora.activate("task")
    torch.testing.assert_close(lora.model(x), before, rtol=1e-5, atol=1e-5)
    trained = [parameter for name, parameter in theirs.named_parameters() if "lora_" in name]
    for parameters, model in ((lora.parameters("task"), lora.model), (trained, theirs)):
        optimizer = torch.optim.SGD(parameters, 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert not torch.allclose(lora.model(x), before, atol=1e-3)
    torch.testing.assert_close(lora.model(x), theirs(x), rtol=1e-3, atol=1e-4)
    lora.save("task", tmp_path / "task")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "task").eval()
    torch.testing.assert_close(again(x), lora.model(x), rtol=1e-3, atol=1e-4)
    assert read_adapter(tmp_path / "task")[0][PATHS[0]].rank == 4
    out = lora.model(x)
    lora.merge("task")
    torch.testing.assert_close(lora.model(x), out, rtol=1e-4, atol=1e-5)
    lora.unmerge()
    lora.remove("task")
    assert not [key for key in lora.model.state_dict() if "task" in key]
    assert torch.equal(lora.model(x), before)
