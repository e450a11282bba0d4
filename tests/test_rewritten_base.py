"""What an adapter's start makes of the base weight is undone bit for bit when the adapter goes."""

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core.layer.rewritten import rewrite


def started(names, dtype=torch.float32, seed=0):
    """A model with an adapter for each name; each has rewritten the base weight. Also the original weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    original = model[0].weight.detach().clone()
    peft_model = get_peft_model(model, LoraConfig(target_modules=["0"]), adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, LoraConfig(target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    changes = {name: torch.randn(5, 6).to(dtype) for name in names}
    for name in names:
        rewrite(layer, name, layer.get_base_layer().weight.detach() + changes[name])
    return peft_model, layer, original, changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leave", ["unload", "delete"])
def test_the_base_comes_back_bit_for_bit(dtype, leave):
    model, layer, original, changes = started(["default"], dtype)
    base = layer.get_base_layer()
    assert torch.equal(base.weight, original + changes["default"])
    model.unload() if leave == "unload" else model.delete_adapter("default")
    assert torch.equal(base.weight, original) and not base.weight.requires_grad


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_several_starts_go_in_any_order(order):
    model, layer, original, changes = started(["a", "b", "c"])
    base, left = layer.get_base_layer(), set("abc")
    for name in order:
        layer.delete_adapter(name)
        left.remove(name)
        torch.testing.assert_close(base.weight, original + sum(changes[n] for n in left))
    assert torch.equal(base.weight, original)


def test_merging_keeps_the_start_of_what_is_merged_and_undoes_that_of_others():
    model, layer, original, changes = started(["a", "b"])
    for p in layer.lora_B.parameters():
        nn.init.normal_(p)
    update = layer.get_delta_weight("a")
    merged = model.merge_and_unload(adapter_names=["a"])
    torch.testing.assert_close(merged[0].weight, original + changes["a"] + update)


def test_a_start_while_another_adapter_is_merged():
    model, layer, original, changes = started(["a"])
    model.add_adapter("b", LoraConfig(target_modules=["0"]))
    nn.init.normal_(layer.lora_B["b"].weight)
    update = layer.get_delta_weight("b")
    layer.merge(adapter_names=["b"])
    layer.delete_adapter("a")
    torch.testing.assert_close(layer.get_base_layer().weight, original + update)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, original)


def test_a_tied_weight_stays_for_the_module_that_shares_it():
    model, head = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)}), None
    model["head"].weight = model["table"].weight
    original = model["table"].weight.detach().clone()
    peft_model = get_peft_model(model, LoraConfig(target_modules=["head"]))
    head = peft_model.base_model.model["head"]
    rewrite(head, "default", torch.zeros(7, 4))
    assert torch.equal(model["table"].weight, original) and not head.get_base_layer().weight.any()
    plain = peft_model.unload()
    assert plain["head"].weight is plain["table"].weight and torch.equal(plain["table"].weight, original)


def test_loftq_leaves_the_base_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    original = copy.deepcopy(model)
    config = LoraConfig(init_lora_weights="loftq", target_modules=["0"])
    peft_model = get_peft_model(model, config)
    assert not torch.equal(peft_model.base_model.model[0].get_base_layer().weight, original[0].weight)
    assert torch.equal(peft_model.unload()[0].weight, original[0].weight)
