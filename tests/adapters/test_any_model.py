"""Adapters on models of other people: what hangs on a layer, weights that are read, tiny transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from varshare_rl.adapters import AdapterSet, LoRALinear, LowRank, apply_lora, read_adapter
from varshare_rl.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning"),
]


def randomize(lora: AdapterSet, name: str = "task") -> None:
    lora.add(name, rank=2)
    with torch.no_grad():
        for factor in lora.parameters(name):
            factor.normal_(0.0, 0.3)


def test_hooks_of_the_wrapped_layer_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(3, 4)
    before = model(x)
    lora = apply_lora(model, ["0"])
    assert torch.equal(model(x), before)
    randomize(lora)
    lora.activate("task")
    delta = lora.adapter("task")["0"].delta()
    torch.testing.assert_close(model(x), before + x @ delta.T)


MADE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "new_weight_norm": parametrizations.weight_norm,
    "new_spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.parametrize("kind", MADE)
def test_weights_that_are_made_at_every_call(kind: str) -> None:
    model = nn.Sequential(MADE[kind](nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    before = model(x)
    lora = apply_lora(model, ["0"])
    assert torch.equal(model(x), before)
    randomize(lora)
    lora.activate("task")
    optimizer = torch.optim.SGD(lora.parameters("task"), 0.1)
    for _ in range(3):  # a second backward through the same graph would fail
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    inner = model[0]
    assert isinstance(inner, LoRALinear)
    torch.testing.assert_close(inner(x), inner.base(x) + x @ lora.adapter("task")["0"].delta().T)
    with pytest.raises(UserError, match="the weight of 0 is made anew at every call"):
        lora.merge("task")
    assert torch.equal(lora.unload()(x), before)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["layers.1.linear2"]])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_pytorchs_encoder_applies_the_adapter_in_eval_mode(targets: list[str], padding: bool, grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 5, 8), None
    if padding:
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
    plain = copy.deepcopy(model)
    lora = apply_lora(model, targets)
    randomize(lora)
    with torch.set_grad_enabled(grad):
        inactive = model(x, src_key_padding_mask=mask)
        lora.activate("task")
        active = model(x, src_key_padding_mask=mask)
        with lora.rows(["task"] * 3):
            by_row = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        for path, factors in lora.adapter("task").items():
            plain.get_submodule(path).get_parameter("weight").add_(factors.delta())
        expected = plain(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask  # padded positions mean nothing
    torch.testing.assert_close(inactive[kept], before[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(active[kept], expected[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_row[kept], expected[kept], rtol=1e-4, atol=1e-5)
    lora.merge("task")
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], expected[kept], rtol=1e-4, atol=1e-5)


class ReadsWeight(nn.Module):
    """A module that multiplies with a layer's weight itself, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.step.weight.dtype == x.dtype
        assert (self.step.in_features, self.step.out_features) == (3, 4)
        return x @ self.step.weight.t() + self.step.bias


def test_a_weight_that_is_read_is_the_one_that_is_applied() -> None:
    model = ReadsWeight()
    lora = apply_lora(model, ["step"])
    randomize(lora)
    x = torch.randn(5, 3)
    before = model(x)
    lora.activate("task")
    after = model(x)
    torch.testing.assert_close(after, before + x @ lora.adapter("task")["step"].delta().T)
    after.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters("task"))
    with lora.rows(["task"] * 5):
        assert lora.layers["step"].weight.shape == (4, 3)
        with pytest.raises(UserError, match="there is no one weight"):
            model(x)
    lora.merge("task")
    torch.testing.assert_close(model(x), after)


def test_functional_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lora = apply_lora(model, ["0"])
    randomize(lora)
    lora.activate("task")
    x = torch.randn(3, 4)
    parameters = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), model(x))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    grads = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    model(x).square().sum().backward()
    for key in ("0.a:task", "0.b:task"):
        torch.testing.assert_close(grads[key], model.get_parameter(key).grad)


def test_a_layer_at_two_paths_is_adapted_at_both() -> None:
    same = nn.Linear(4, 4)
    model = nn.Sequential(same, nn.Tanh(), same)
    plain = copy.deepcopy(model)
    lora = apply_lora(model, ["2"])
    assert list(lora.layers) == ["2"]
    assert model[0] is model[2] is lora.layers["2"]
    randomize(lora)
    lora.activate("task")
    x = torch.randn(3, 4)
    with torch.no_grad():
        plain[0].weight.add_(lora.adapter("task")["2"].delta())
    torch.testing.assert_close(model(x), plain(x))
    lora.merge("task")
    torch.testing.assert_close(model(x), plain(x))
    assert lora.unload()[0] is same  # type: ignore[index]
    assert model[2] is same


def test_a_wider_kind_of_linear_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4))
    x = torch.randn(3, 4)
    before = model(x)
    lora = apply_lora(model, ["0"])
    randomize(lora)
    lora.activate("task")
    torch.testing.assert_close(model(x), before + x @ lora.adapter("task")["0"].delta().T)
    for module, reason in (
        (nn.LazyLinear(3), "sizes are not known yet"),
        (nn.Conv2d(2, 3, 3), "only linear layers"),
    ):
        with pytest.raises(UserError, match=reason):
            apply_lora(nn.Sequential(module), ["0"])


def test_default_targets_and_all_linear() -> None:
    def paths(target: str | None) -> list[str]:
        return sorted(apply_lora(Model(), target).layers)

    projections = [
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("k_proj", "out_proj", "q_proj", "v_proj")
    ]
    assert paths(None) == projections
    assert paths("all-linear") == [*projections, "head"]
    with pytest.raises(UserError, match="no projection of attention"):
        apply_lora(nn.Sequential(nn.Linear(2, 2)))
    value_head = nn.ModuleDict({"value": nn.Linear(2, 1), "policy": nn.Linear(2, 2)})
    with pytest.raises(UserError, match="no projection of attention"):
        apply_lora(value_head)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(UserError, match="no linear layer"):
        apply_lora(attention, "all-linear")


@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_compiled_and_wrapped_models_write_plain_paths(tmp_path: Path, wrap: str) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model: Any = torch.compile(plain, backend="eager") if wrap == "compiled" else nn.DataParallel(plain)
    lora = apply_lora(model, ["0", "1"])
    randomize(lora)
    lora.activate("task")
    x = torch.randn(3, 4)
    out = model(x)
    lora.save("task", tmp_path / "task")
    adapter, info = read_adapter(tmp_path / "task")
    assert sorted(adapter) == ["0", "1"]
    assert info.target_modules == "^(?:0|1)$"
    lora.load(tmp_path / "task", "again")
    lora.activate("again")
    torch.testing.assert_close(model(x), out)
    bare = apply_lora(lora.unload().get_submodule("_orig_mod" if wrap == "compiled" else "module"), ["0", "1"])
    bare.load(tmp_path / "task", "task")
    bare.activate("task")
    torch.testing.assert_close(bare.model(x), out)


transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(intermediate_size=24, num_key_value_heads=2, **SMALL)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=12)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "t5":
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=20, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(intermediate_size=24, **SMALL)).eval()
    config = transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=20)
    return transformers.MambaForCausalLM(config).eval()


def output(model: Any, kind: str) -> Tensor:
    ids = torch.tensor([[1, 5, 2, 9], [3, 3, 7, 0]])
    with torch.no_grad():
        made = model(ids, decoder_input_ids=ids) if kind == "t5" else model(ids)
    return made.last_hidden_state if kind == "bert" else made.logits


FAMILIES: dict[str, Any] = {
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value"],
    "mamba": ["in_proj", "x_proj"],
}


@pytest.mark.filterwarnings("ignore")  # of peft and transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_tiny_transformers_agree_with_peft(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = tiny(kind).to(dtype)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=FAMILIES[kind])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path / "task")
    lora = apply_lora(copy.deepcopy(base), FAMILIES[kind])
    before = output(lora.model, kind)
    assert torch.equal(before, output(base, kind))
    lora.load(tmp_path / "task", "task")
    lora.activate("task")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    expected = output(theirs, kind)
    assert not torch.allclose(before, expected, **tolerance)
    torch.testing.assert_close(output(lora.model, kind), expected, **tolerance)
    with lora.rows(["task"] * 2):
        torch.testing.assert_close(output(lora.model, kind), expected, **tolerance)
    lora.save("task", tmp_path / "back")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    torch.testing.assert_close(output(again, kind), expected, **tolerance)
    if kind == "llama":  # its output head is the embedding's weight in some models, not in this one
        assert sorted(read_adapter(tmp_path / "back")[0])[0] == "lm_head"
    lora.merge("task")
    torch.testing.assert_close(output(lora.model, kind), expected, **tolerance)


@pytest.mark.filterwarnings("ignore")
def test_mambas_step_is_adapted_though_its_weight_is_read() -> None:
    base = tiny("mamba")
    lora = apply_lora(copy.deepcopy(base), ["dt_proj"])
    randomize(lora)
    lora.activate("task")
    with torch.no_grad():
        for path, factors in lora.adapter("task").items():
            base.get_submodule(path).get_parameter("weight").add_(factors.delta())
    torch.testing.assert_close(output(lora.model, "mamba"), output(base, "mamba"), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_default_targets_of_tiny_transformers() -> None:
    def ends(kind: str, target: str | None = None) -> set[str]:
        return {path.rpartition(".")[2] for path in apply_lora(tiny(kind), target).layers}

    assert ends("llama") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert ends("gpt2") == {"c_attn", "c_proj"}
    assert ends("t5") == {"q", "k", "v", "o"}
    assert ends("bert") == {"query", "key", "value", "dense"}
    assert ends("llama", "all-linear") == ends("llama") | {"gate_proj", "up_proj", "down_proj"}  # no lm_head
    assert len(apply_lora(tiny("gpt2")).layers) == 4  # none of the feed-forward c_proj


@pytest.mark.filterwarnings("ignore")
def test_an_output_head_with_another_weight_is_refused(tmp_path: Path) -> None:
    base = tiny("llama")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path / "task")
    with torch.no_grad():
        base.get_submodule("lm_head").get_parameter("weight").add_(1.0)
    lora = apply_lora(base, ["lm_head"])
    with pytest.raises(UserError, match="brings a weight of its own for lm_head"):
        lora.load(tmp_path / "task", "task")
    assert lora.names == ()


def test_a_tied_head_is_adapted_and_not_merged() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    lora = apply_lora(model, ["head"])
    lora.add("task", {"head": LowRank(torch.randn(2, 4), torch.randn(7, 2))})
    lora.activate("task")
    x = torch.randn(3, 4)
    expected = x @ (model["embed"].weight + lora.adapter("task")["head"].delta()).T
    torch.testing.assert_close(model["head"](x), expected)
    with pytest.raises(UserError, match=r"serves other modules too \(embed\.weight, head\.base\.weight\)"):
        lora.merge("task")
