"""The weight that an adapter's start makes of the base is that adapter's alone, and is undone bit for bit."""

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, MontecloraConfig, get_peft_model
from peft.core.layer.rewritten import follow, rewrite
from peft.helpers import spectral_surgery
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.warning import PeftWarning


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
        rewrite(layer, name, original + changes[name])
    follow(layer)
    return peft_model, layer, original, changes


def weight_of(layer):
    return layer.get_base_layer().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leave", ["unload", "delete"])
def test_the_base_comes_back_bit_for_bit(dtype, leave):
    model, layer, original, changes = started(["default"], dtype)
    base = layer.get_base_layer()
    assert torch.equal(base.weight, original + changes["default"])
    model.unload() if leave == "unload" else model.delete_adapter("default")
    assert torch.equal(base.weight, original) and not base.weight.requires_grad


def test_each_adapter_stands_on_its_own_weight():
    model, layer, original, changes = started(["a", "b"])
    model.add_adapter("plain", LoraConfig(target_modules=["0"]))
    for name in ("a", "b", "a", "plain", "b"):
        model.set_adapter(name)
        assert torch.equal(weight_of(layer), original + changes[name] if name in changes else original)
    with model.disable_adapter():
        assert torch.equal(weight_of(layer), original)
    assert torch.equal(weight_of(layer), original + changes["b"])
    model.base_model.set_adapter(["a", "b", "plain"])
    torch.testing.assert_close(weight_of(layer), original + changes["a"] + changes["b"])
    model.base_model.set_adapter("a")
    assert torch.equal(weight_of(layer), original + changes["a"])


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_several_starts_go_in_any_order(order):
    model, layer, original, changes = started(["a", "b", "c"])
    model.base_model.set_adapter(["a", "b", "c"])
    base, left = layer.get_base_layer(), set("abc")
    for name in order:
        layer.delete_adapter(name)
        left.remove(name)
        torch.testing.assert_close(base.weight, original + sum(changes[n] for n in left))
    assert torch.equal(base.weight, original) and layer.rewritten is None


def test_merging_keeps_the_start_of_what_is_merged_and_undoes_that_of_others():
    model, layer, original, changes = started(["b", "a"])
    for p in layer.lora_B.parameters():
        nn.init.normal_(p)
    update = layer.get_delta_weight("a")
    merged = model.merge_and_unload(adapter_names=["a"])
    torch.testing.assert_close(merged[0].weight, original + changes["a"] + update)


def test_merged_adapters_keep_their_starts_while_others_come_and_go():
    model, layer, original, changes = started(["a", "b"])
    for p in layer.lora_B.parameters():
        nn.init.normal_(p)
    update = {name: layer.get_delta_weight(name) for name in "ab"}
    layer.merge(adapter_names=["a"])
    layer.set_adapter("b")
    torch.testing.assert_close(weight_of(layer), original + changes["a"] + update["a"] + changes["b"])
    layer.unmerge()
    assert torch.equal(weight_of(layer), original + changes["b"])
    layer.merge()
    layer.enable_adapters(False)
    model(torch.randn(2, 6))  # a disabled layer takes out what is merged when it is called
    assert torch.equal(weight_of(layer), original)


def test_a_start_while_another_adapter_is_merged():
    model, layer, original, changes = started(["a"])
    model.add_adapter("b", LoraConfig(target_modules=["0"]))
    nn.init.normal_(layer.lora_B["b"].weight)
    update = layer.get_delta_weight("b")
    layer.merge(adapter_names=["b"])
    layer.delete_adapter("a")
    torch.testing.assert_close(weight_of(layer), original + update)
    layer.unmerge()
    torch.testing.assert_close(weight_of(layer), original)


START = ["pissa", "olora"]


def two(start, **fields):
    """A model with an adapter of such a start and a plain one, both moved; an input."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0", "2"], r=2, **fields))
    config = LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=start, **fields)
    model.add_adapter("started", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return base, model.eval(), torch.randn(3, 6)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
@pytest.mark.parametrize("start", START)
def test_an_adapter_with_a_start_and_others_do_not_touch_each_other(start, fields, tmp_path):
    base, model, x = two(start, **fields)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    alone = model(x)
    model.set_adapter("started")
    own = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["started"])
    model.load_adapter(tmp_path / "started", "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(x), own)
    model.delete_adapter("again")
    model.set_adapter("default")
    assert torch.equal(model(x), alone)
    with pytest.raises(ValueError, match="stands on another weight"):
        model(x, adapter_names=["started", "default", "started"])
    torch.testing.assert_close(model(x, adapter_names=["default", "__base__", "default"])[0], alone[0])
    model.set_adapter("started")
    torch.testing.assert_close(model(x, adapter_names=["started"] * 3), own)


@pytest.mark.parametrize("way", ["linear", "cat", "svd"])
@pytest.mark.parametrize("start", START)
def test_a_weighted_sum_takes_its_part_of_the_starts(start, way, tmp_path):
    base, model, x = two(start)
    layer = model.base_model.model[0]
    model.set_adapter("started")
    change = weight_of(layer) - base[0].weight + layer.get_delta_weight("started")
    model.base_model.add_weighted_adapter(["started"], [0.5], "part", combination_type=way)
    model.set_adapter("part")
    torch.testing.assert_close(
        weight_of(layer) + layer.get_delta_weight("part"), base[0].weight + 0.5 * change, atol=1e-5, rtol=1e-5
    )
    with pytest.warns(PeftWarning, match="a sum of adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["part"])


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


@pytest.mark.parametrize("start", ["pissa_niter_2", "pissa"])
def test_a_file_that_cannot_be_loaded_as_it_was_is_said(start, tmp_path, recwarn):
    _, model, _ = two(start)
    model.save_pretrained(tmp_path, selected_adapters=["started"])
    said = [str(w.message) for w in recwarn if issubclass(w.category, PeftWarning)]
    assert bool(said) == (start != "pissa")
    assert all("started" in message and "path_initial_model_for_weight_conversion" in message for message in said)


def test_a_variant_that_follows_the_rank_is_not_converted(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa", monteclora_config=MontecloraConfig())
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="twice the rank"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("change", ["intruders", "surgery"])
def test_what_makes_a_changed_copy_refuses_an_adapter_on_a_weight_of_its_own(change):
    """The copy would stand on the original weight, and be another model."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        if change == "intruders":
            reduce_intruder_dimension(model)
        else:
            spectral_surgery(model, (model(torch.randn(3, 8)).sum() for _ in range(2)))
    assert list(model.peft_config) == ["default"]
