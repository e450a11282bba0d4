"""Layers and methods of third parties: registered classes, derived layers, tuners changed from outside."""

import copy
import functools
import gc
import re
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
from torch import nn
from toys import tiny_llama
from transformers.pytorch_utils import Conv1D

import peft
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.core.model.record import context_of
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method


class Foreign(nn.Module):
    """A linear layer of a library of its own: no ``nn.Linear``, and its weight is kept as codes."""

    def __init__(self, in_features=4, out_features=4):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.randint(-8, 8, (out_features, in_features)).to(torch.int8))

    def dense(self):
        return self.codes.float() / 8

    def forward(self, x):
        return x @ self.dense().T


class Scaled(nn.Module):
    """One that has a weight, and does more than multiply by it."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight)


def derived():
    """A class as ipex-llm's ``LoraLowBitLinear`` is."""

    class LowBitLora(nn.Module, LoraLayer):
        def __init__(self, base_layer, adapter_name, r=0, lora_alpha=1, lora_dropout=0.0, init_lora_weights=True,
                     use_rslora=False, **kwargs):  # fmt: skip
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self.fan_in_fan_out = False
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                              init_lora_weights=init_lora_weights, use_rslora=use_rslora)  # fmt: skip

        def forward(self, x, *args, **kwargs):
            self._check_forward_args(x, *args, **kwargs)
            adapter_names = kwargs.pop("adapter_names", None)
            result = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters or self.merged or adapter_names:
                return result
            for name in self.active_adapters:
                if name in self.lora_A:
                    down, up = self.lora_A[name], self.lora_B[name]
                    update = up(down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype))))
                    result = result + update.to(result.dtype) * self.scaling[name]
            return result

    return LowBitLora


def test_a_layer_derived_from_nn_module_and_lora_layer():
    torch.manual_seed(0)
    cls = derived()
    layer = cls(Foreign(), "default", r=2, lora_alpha=6, init_lora_weights=False)
    assert isinstance(layer, BaseTunerLayer) and isinstance(layer, nn.Module)
    assert layer.r == {"default": 2} and layer.scaling == {"default": 3.0} and layer.in_features == 4
    x = torch.randn(3, 4)
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 3
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.dense() + change).T)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="adapter_names"):
        layer(x, adapter_names=["default"])


def test_a_tuner_whose_modules_are_made_elsewhere(monkeypatch, tmp_path):
    """ipex-llm replaces ``LoraModel._create_new_module`` around get_peft_model, and makes layers of the keywords."""
    torch.manual_seed(0)
    cls, original = derived(), LoraModel._create_new_module

    def create(before, lora_config, adapter_name, target, **kwargs):
        if isinstance(target, Foreign):
            return cls(target, adapter_name, bias=kwargs.pop("bias", False), **kwargs)
        return before(lora_config, adapter_name, target, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_new_module", staticmethod(functools.partial(create, original)))
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["0", "1"], rank_pattern={"0": 3, "1": 1}, alpha_pattern={"0": 9}
    )
    model = get_peft_model(nn.Sequential(Foreign(), nn.Linear(4, 4)), config)
    first, second = model.base_model.model
    assert type(first) is cls and type(second) is LoraLinear
    assert (first.r, first.scaling, second.r, second.scaling) == (
        {"default": 3}, {"default": 3.0}, {"default": 1}, {"default": 6.0})  # fmt: skip
    model(torch.randn(3, 4)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{i}.lora_{x}.default.weight" for i in "01" for x in "AB"}
    model.base_model.model[0].lora_B["default"].weight.data.normal_()
    model.save_pretrained(tmp_path)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))
    model.set_adapter("second")
    assert first.active_adapters == ["second"] and first.r == {"default": 3, "second": 4}
    assert not first.lora_A["default"].weight.requires_grad and first.lora_A["second"].weight.requires_grad
    model.delete_adapter("second")
    base = model.unload()
    assert type(base[0]) is Foreign and type(base[1]) is nn.Linear
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert type(again.base_model.model[0]) is cls
    state = peft.load_peft_weights(str(tmp_path))
    torch.testing.assert_close(
        again.base_model.model[0].lora_B["default"].weight, state["base_model.model.0.lora_B.weight"]
    )


def test_registered_classes_are_used(tmp_path):
    class Own(LoraLinear):
        pass

    config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    config.rank_pattern, config.alpha_pattern = {"0": 3}, {"0": 6}
    config._register_custom_module({Scaled: Own})
    model = get_peft_model(nn.Sequential(Scaled(), nn.Linear(4, 4)), config)
    layer = model.base_model.model[0]
    assert type(layer) is Own and type(model.base_model.model[1]) is LoraLinear
    x = torch.randn(3, 4)
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    torch.testing.assert_close(layer(x), 2 * x + x @ change.T)
    assert "custom" not in str(config.to_dict())
    assert layer.r == {"default": 3} and layer.scaling == {"default": 2.0}
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    weight = layer.get_base_layer().weight
    torch.testing.assert_close(weight, torch.eye(4) + change)
    model.unmerge_adapter()
    torch.testing.assert_close(weight, torch.eye(4))
    expected, base = model(x), model.unload()
    assert type(base[0]) is Scaled
    config = LoraConfig.from_pretrained(tmp_path)
    config._register_custom_module({Scaled: Own})
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config)
    assert type(again.base_model.model[0]) is Own
    torch.testing.assert_close(again(x), expected)
    merged = again.merge_and_unload()
    assert type(merged[0]) is Scaled
    torch.testing.assert_close(merged[0].weight, torch.eye(4) + change)


def test_a_layer_with_an_update_and_an_unloading_of_its_own():
    """Further adapters go through ``update_layer``; ``unload`` and ``merge_and_unload`` take what the layer gives."""
    calls = []

    class Own(derived()):
        def update_layer(self, adapter_name, r, lora_alpha, config=None, **kwargs):
            calls.append((adapter_name, r, lora_alpha))
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
            if not merge:
                return self.base_layer
            layer = nn.Linear(4, 4, bias=False)
            change = self.lora_B["second"].weight @ self.lora_A["second"].weight * self.scaling["second"]
            layer.weight.data = self.base_layer.dense() + change.detach()
            return layer

    def adapted():
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False)
        config._register_custom_module({Foreign: Own})
        model = get_peft_model(nn.Sequential(Foreign(), nn.Linear(4, 4)), config)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"0": 3},
                                               alpha_pattern={"0": 9}, init_lora_weights=False))  # fmt: skip
        model.set_adapter("second")
        return model

    model, x = adapted(), torch.randn(3, 4)
    assert calls == [("default", 2, 6), ("second", 3, 9)]
    assert model.base_model.model[0].scaling == {"default": 3.0, "second": 3.0}
    wanted = model(x)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear and type(merged[1]) is nn.Linear
    torch.testing.assert_close(merged(x), wanted)
    assert type(adapted().unload()[0]) is Foreign


def test_a_subclass_of_a_layer_adds_to_its_forward():
    class Louder(LoraLinear):
        def forward(self, x, *args, **kwargs):
            return 2 * super().forward(x, *args, **kwargs)

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 4)
    before = model(x)
    model.base_model.model[0].__class__ = Louder
    torch.testing.assert_close(model(x), 2 * before)


# ---- Forwards replaced from outside, tensors read one by one --------------------------------------------------------


def lora_parameters(projection):
    """What its kernels read of an adapted layer."""
    base = getattr(projection, "base_layer", projection)
    if getattr(projection, "disable_adapters", True) or projection.merged:
        return base.weight, None, None, None, base.bias
    name = projection.active_adapters[0] if projection.active_adapters else projection.active_adapter
    assert len(getattr(projection, "lora_magnitude_vector", [])) == 0
    a, b = projection.lora_A[name].weight, projection.lora_B[name].weight
    return base.weight, a, b, projection.scaling[name], base.bias


def fast_mlp(self, x):
    def apply(projection, h):
        weight, a, b, s, bias = lora_parameters(projection)
        y = nn.functional.linear(h, weight, bias)
        return y if a is None else y + h @ a.T @ b.T * s

    return apply(self.down_proj, self.act_fn(apply(self.gate_proj, x)) * apply(self.up_proj, x))


def test_forwards_replaced_around_the_layers():
    torch.manual_seed(0)
    names = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    ids = torch.arange(6)[None]
    adapted = model(ids).logits
    with model.disable_adapter():
        plain = model(ids).logits
    for layer in model.model.model.layers:
        layer.mlp.forward = MethodType(fast_mlp, layer.mlp)
    torch.testing.assert_close(model(ids).logits, adapted)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain)
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)


# ---- Methods of third parties ---------------------------------------------------------------------------------------


def test_a_method_registered_from_outside(monkeypatch, tmp_path):
    from peft.utils import peft_types

    for table in ("CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"):
        name = f"PEFT_TYPE_TO_{table}_MAPPING"
        monkeypatch.setattr(peft_types, name, getattr(peft_types, name))
        mapping = getattr(peft_types, name)
        monkeypatch.setitem(mapping, "OUTSIDE", None)  # taken out again afterwards
        del mapping["OUTSIDE"]

    @dataclass
    class OutsideConfig(LoraConfig):
        METHOD = "OUTSIDE"

        def __post_init__(self):
            super().__post_init__()
            self.peft_type = "OUTSIDE"

    class OutsideModel(LoraModel):
        prefix = "lora_"

    assert issubclass(OutsideModel, BaseTuner) and issubclass(OutsideConfig, PeftConfig)
    register_peft_method(name="outside", config_cls=OutsideConfig, model_cls=OutsideModel)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(base, OutsideConfig(target_modules=["0"], r=2, init_lora_weights=False))
    assert isinstance(model.base_model, OutsideModel)
    x = torch.randn(3, 4)
    expected = model(x)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(again(x), expected)
    assert again.peft_config["default"].peft_type == "OUTSIDE"


# ---- Methods as 0.21 has them written -------------------------------------------------------------------------------


@dataclass
class ScaleConfig(PeftConfig):
    """Fields as a third party declares them, with no help of this package."""

    target_modules: object = None
    factor: float = 1.0
    modules_to_save: list | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "SCALE"


class ScaleLayer(BaseTunerLayer):
    """y' = f s y; its containers are its own, and nobody calls the constructor of BaseTunerLayer."""

    adapter_layer_names = ("scale_v", "scale_lin")
    other_param_names = ("scale_factor",)

    def __init__(self, base_layer, **kwargs):
        self.base_layer = base_layer
        self.scale_v, self.scale_lin, self.scale_factor = nn.ParameterDict({}), nn.ModuleDict({}), {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = self.get_base_layer().in_features, self.get_base_layer().out_features

    def update_layer(self, adapter_name, factor):
        self.scale_v[adapter_name] = nn.Parameter(torch.randn(self.out_features))
        self.scale_lin[adapter_name] = nn.Linear(self.out_features, 1, bias=False)
        self.scale_factor[adapter_name] = factor
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)


class ScaleLinear(nn.Module, ScaleLayer):
    def __init__(self, base_layer, adapter_name, factor, **kwargs):
        super().__init__()
        ScaleLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, factor)

    def _scale(self, name):
        return self.scale_v[name].detach() * self.scale_factor[name]

    def merge(self, safe_merge=False, adapter_names=None):
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.scale_v:
                base, s = self.get_base_layer(), self._scale(name)
                base.weight.data, base.bias.data = base.weight.data * s[:, None], base.bias.data * s
                self.merged_adapters.append(name)

    def unmerge(self):
        while self.merged_adapters:
            base, s = self.get_base_layer(), self._scale(self.merged_adapters.pop())
            base.weight.data, base.bias.data = base.weight.data / s[:, None], base.bias.data / s

    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.scale_v:
                    y = y * self.scale_v[name] * self.scale_factor[name]
        return y


class ScaleModel(BaseTuner):
    prefix = "scale_"
    tuner_layer_cls = ScaleLayer

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **optional):
        if isinstance(target, ScaleLinear):
            target.update_layer(adapter_name, config.factor)
        else:
            new = self._create_new_module(config, adapter_name, target)
            if adapter_name not in self.active_adapters:
                new.requires_grad_(False)
            self._replace_module(parent, target_name, new, target)

    @staticmethod
    def _create_new_module(config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{type(base).__name__} is not supported by Scale.")
        return ScaleLinear(target, adapter_name, config.factor)


@pytest.fixture
def scale(monkeypatch):
    from peft.utils import peft_types

    for table in ("CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"):
        mapping = getattr(peft_types, f"PEFT_TYPE_TO_{table}_MAPPING")
        monkeypatch.setitem(mapping, "SCALE", None)  # taken out again afterwards
        del mapping["SCALE"]
    register_peft_method(name="scale", config_cls=ScaleConfig, model_cls=ScaleModel)


def test_a_method_written_for_the_reference(scale, tmp_path):
    """Layers and tuner are written against 0.21's base classes alone: everything works with them."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def training(model):
        return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}

    x = torch.randn(5, 4)
    model = get_peft_model(base(), ScaleConfig(target_modules=["0", "2"], factor=2.0))
    expected = model(x)
    expected.sum().backward()
    assert training(model) == {f"{i}.scale_{x}" for i in "02" for x in ("v.default", "lin.default.weight")}
    assert model.base_model.model[0].scale_v["default"].grad is not None
    model.save_pretrained(tmp_path)
    names = {f"base_model.model.{i}.scale_{x}" for i in "02" for x in ("v", "lin.weight")}
    assert set(peft.load_peft_weights(str(tmp_path))) == set(peft.get_peft_model_state_dict(model)) == names
    model.add_adapter("b", ScaleConfig(target_modules=["0"], factor=3.0))
    assert all(".default" in name for name in training(model))
    model.set_adapter("b")
    assert training(model) == {"0.scale_v.b", "0.scale_lin.b.weight"} and not torch.equal(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base()(x))
    model.set_adapter("default")
    for merged in (True, False):
        model.merge_adapter() if merged else model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(x), expected)
    assert again.peft_config["default"].factor == 2.0 and not training(again)
    again.load_adapter(tmp_path, "c")
    again.set_adapter("c")
    torch.testing.assert_close(again(x), expected)
    again.delete_adapter("default")
    assert list(again.peft_config) == list(again.base_model.model[0].scale_v) == ["c"]
    merged = again.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected)
    torch.testing.assert_close(model.unload()(x), base()(x))
    plain = base()
    with pytest.raises(ValueError, match="ReLU is not supported by Scale"):
        get_peft_model(plain, ScaleConfig(target_modules=["0", "1"]))
    assert type(plain[0]) is nn.Linear and not hasattr(plain, "peft_config")


class Over(nn.Module, LoraLayer):
    """LoRA around a whole block, which is no layer with a weight."""

    def __init__(self, base_layer, adapter_name):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        size = base_layer.hidden_size
        self.scaling[adapter_name] = 1.0
        self.lora_A[adapter_name] = nn.Linear(size, 2, bias=False)
        self.lora_B[adapter_name] = nn.Linear(2, size, bias=False)

    def forward(self, x):
        y = self.base_layer(x)
        for name in self.active_adapters:
            y = y + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return y


def test_lora_around_modules_of_no_kind(monkeypatch, tmp_path):
    class OverModel(LoraModel):
        @staticmethod
        def _create_new_module(config, adapter_name, target, **kwargs):
            return Over(target, adapter_name)

    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, OverModel)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["mlp"], task_type="CAUSAL_LM"))
    ids = torch.arange(5)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("mlp.lora_" in name for name in trained)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    assert not any(isinstance(module, Over) for module in again.unload().modules())


def layers(tuner):
    return {name: module for name, module in tuner.model.named_modules() if isinstance(module, LoraLayer)}


def test_hooks_of_a_tuner_that_others_replace():
    """Which modules, what config, what rank at which module, and what trains: each has a method to replace."""

    class Chosen(LoraModel):
        @staticmethod
        def _check_target_module_exists(config, key):
            return key.endswith("q_proj") and ".1." in key

    class Prepared(LoraModel):
        def _prepare_adapter_config(self, peft_config, model_config):
            assert model_config["model_type"] == "llama"
            if peft_config.target_modules is None:
                peft_config.target_modules = {"o_proj"}
            return peft_config

    class Ranked(LoraModel):
        def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
            assert adapter_name == "default"
            own = copy.deepcopy(config)
            own.r = 4 if ".1." in current_key else config.r
            super()._create_and_replace(own, adapter_name, target, target_name, parent, current_key=current_key)

    class Smaller(LoraModel):
        @staticmethod
        def _create_new_module(config, adapter_name, target, **kwargs):
            return LoraModel._create_new_module(config, adapter_name, target, **{**kwargs, "r": 1})

    class More(LoraModel):
        def _mark_only_adapters_as_trainable(self, model):
            super()._mark_only_adapters_as_trainable(model)
            model.model.norm.requires_grad_(True)

    class Kept(LoraModel):
        def _replace_module(self, parent, child_name, new_module, child):
            assert type(child) is nn.Linear and len(new_module.lora_A) == 1
            super()._replace_module(parent, child_name, new_module, child)
            new_module.seen = True

    class KeptOfOwn(Kept):
        _create_new_module = staticmethod(functools.partial(LoraModel._create_new_module))

    config = functools.partial(LoraConfig, r=2, lora_alpha=4, target_modules=["q_proj"])
    assert list(layers(Chosen(tiny_llama(), config(), "default"))) == ["model.layers.1.self_attn.q_proj"]
    prepared = layers(Prepared(tiny_llama(), LoraConfig(r=2), "default"))
    assert prepared and all(name.endswith("o_proj") for name in prepared)
    ranked = layers(Ranked(tiny_llama(), config(), "default")).values()
    assert [(layer.r["default"], layer.scaling["default"]) for layer in ranked] == [(2, 2.0), (4, 1.0)]
    smaller = layers(Smaller(tiny_llama(), config(rank_pattern={"q_proj": 3}), "default")).values()
    assert [(layer.r["default"], layer.scaling["default"]) for layer in smaller] == [(1, 4.0), (1, 4.0)]
    more = More(tiny_llama(), config(), "default")
    trained = {name for name, p in more.model.named_parameters() if p.requires_grad}
    assert "model.norm.weight" in trained and len(trained) == 5
    for cls in (Kept, KeptOfOwn):
        assert all(layer.seen for layer in layers(cls(tiny_llama(), config(), "default")).values())


def small(r=2, **fields):
    """A model with an adapter that is not zero."""
    torch.manual_seed(0)
    names = fields.pop("target_modules", ["0"])
    config = LoraConfig(r=r, target_modules=names, init_lora_weights=False, **fields)
    return get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), config)


class Compiled:
    """A method as Cython makes it: called like a function, and of another type."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return self if instance is None else MethodType(self, instance)


@pytest.mark.parametrize("kind", [lambda function: function, Compiled])
def test_an_update_that_others_put_into_the_class(kind, monkeypatch):
    """Around the one that is there, or instead of it with parts of another shape."""
    update, seen = LoraLayer.update_layer, []

    @functools.wraps(update)
    def around(self, *args, **kwargs):
        update(self, *args, **kwargs)
        name = args[0] if args else kwargs["adapter_name"]
        seen.append((name, self.r[name]))

    monkeypatch.setattr(LoraLayer, "update_layer", kind(around))
    model = small(rank_pattern={"0": 3})
    model.add_adapter("b", LoraConfig(r=1, target_modules=["0", "1"]))
    assert seen == [("default", 3), ("b", 1), ("b", 1)]
    LoraLinear(nn.Linear(2, 2), "by_hand", LoraConfig(r=2), r=2)
    assert seen[-1] == ("by_hand", 2)

    def of_heads(self, adapter_name, r, lora_alpha, *args, **kwargs):
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = nn.ModuleDict({h: nn.Linear(self.in_features, r, bias=False) for h in "01"})
        self.lora_B[adapter_name] = nn.ModuleDict({h: nn.Linear(r, self.out_features // 2, bias=False) for h in "01"})
        self.set_adapter(self.active_adapters)

    def forward(self, x, *args, **kwargs):
        for name in self.active_adapters:
            a, b = self.lora_A[name], self.lora_B[name]
            return self.base_layer(x) + torch.cat([b[h](a[h](x)) for h in a], -1) * self.scaling[name]

    monkeypatch.setattr(LoraLayer, "update_layer", kind(of_heads))
    monkeypatch.setattr(LoraLinear, "forward", forward)
    model, x = small(), torch.randn(3, 4)
    model(x).sum().backward()
    assert len([p for p in model.parameters() if p.grad is not None]) == 4
    names = [f"base_model.model.0.lora_{part}.{head}.weight" for part in "AB" for head in "01"]
    assert list(peft.get_peft_model_state_dict(model)) == names


@pytest.mark.parametrize("derived", [False, True])
def test_a_start_that_others_put_into_the_class(derived, monkeypatch):
    def start(self, adapter_name, init_lora_weights):
        assert init_lora_weights is True
        nn.init.constant_(self.lora_A[adapter_name].weight, 3)

    config = LoraConfig(r=2, target_modules=["0"])
    if derived:
        config._register_custom_module({nn.Linear: type("Derived", (LoraLinear,), {"reset_lora_parameters": start})})
    else:
        monkeypatch.setattr(LoraLayer, "reset_lora_parameters", start)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    layer = model.base_model.model[0]
    assert (layer.lora_A["default"].weight == 3).all() and not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("derived", [False, True])
def test_a_start_that_only_others_know(derived, monkeypatch, tmp_path, request):
    """As 0.21.2, which leaves the name of a start to `reset_lora_parameters`; without one it is refused at once."""
    request.addfinalizer(gc.collect)  # a derived class counts for as long as it lives
    before = LoraLayer.reset_lora_parameters

    def start(self, adapter_name, init_lora_weights):
        if init_lora_weights != "mine":
            return before(self, adapter_name, init_lora_weights)
        nn.init.constant_(self.lora_A[adapter_name].weight, 3)

    gc.collect()
    with pytest.raises(ValueError, match="'mine' is not valid"):
        LoraConfig(init_lora_weights="mine")
    if derived:
        classes = {nn.Linear: type("Derived", (LoraLinear,), {"reset_lora_parameters": start})}
    else:
        classes = {}
        monkeypatch.setattr(LoraLayer, "reset_lora_parameters", start)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="mine")
    config._register_custom_module(classes)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    layer = model.base_model.model[0]
    assert (layer.lora_A["default"].weight == 3).all()
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).init_lora_weights == "mine"
    for own in ([LoraConfig(**{**config.to_dict(), "init_lora_weights": "other"})], [config] if derived else []):
        for one in own:  # what no layer's own start knows
            with pytest.raises(ValueError, match="is not valid"):
                get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(**one.to_dict()))
    monkeypatch.undo()
    if not derived:
        with pytest.raises(ValueError, match="'mine' is not valid"):
            PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_a_constructor_that_others_put_into_the_class(monkeypatch):
    made = LoraLinear.__init__

    def constructor(self, base_layer, adapter_name, *args, **kwargs):
        made(self, base_layer, adapter_name, *args, **kwargs)
        self.own = adapter_name

    monkeypatch.setattr(LoraLinear, "__init__", constructor)
    model = small()
    assert model.base_model.model[0].own == "default"
    assert model.base_model.model[0].lora_A["default"].weight.requires_grad


def test_an_unloading_that_others_put_around(monkeypatch):
    """As unsloth does, to refuse before anything is merged; and one in a derived tuner."""
    seen = []
    for name in ("_unload_and_optionally_merge", "merge_adapter"):
        before = vars(BaseTuner)[name]

        def around(self, *args, _before=before, _name=name, **kwargs):
            seen.append((_name, kwargs.get("merge", args[0] if args else True)))
            return _before(self, *args, **kwargs)

        monkeypatch.setattr(BaseTuner, name, around)
    model, x = small(), torch.randn(2, 4)
    wanted = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    plain = model.unload()
    assert not hasattr(plain, "peft_config")
    model = small()
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)
    unload = "_unload_and_optionally_merge"
    assert seen == [("merge_adapter", True), (unload, False), (unload, True)]

    class Own(LoraModel):
        def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
            return "mine" if merge else super()._unload_and_optionally_merge(merge=False)

    base = nn.Sequential(nn.Linear(4, 4))
    tuner = Own(base, LoraConfig(target_modules=["0"]), "default")
    assert tuner.merge_and_unload() == "mine" and tuner.unload() is base


def test_attributes_that_others_set_on_a_layer():
    """A number that is computed here, one name as the active adapter, tensors in front of the adapter's own."""
    model, x = small(), torch.randn(2, 4)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    assert layer.num_experts == 1
    layer.num_experts = 3
    assert layer.num_experts == 3
    model.set_adapter("second")
    wanted = model(x)
    model.set_adapter("default")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            layer._active_adapter = "second"
            torch.testing.assert_close(model(x), wanted)
    assert layer.active_adapter == "second" and layer.active_adapters == ["second"]
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    layer, held = model.base_model.model[0], model.base_model.model[0].ia3_l
    base = model(x)
    object.__setattr__(layer, "ia3_l", {"default": -held["default"]})
    torch.testing.assert_close(model(x), -base)
    layer.ia3_l = held
    torch.testing.assert_close(model(x), base)


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("base", [nn.Linear(4, 6), Conv1D(6, 4)], ids=["Linear", "Conv1D"])
def test_a_change_of_the_weight_that_others_compute(base, derived, monkeypatch):
    """Merging follows their get_delta_weight, whether it asks the one here or not."""

    own = LoraLinear.get_delta_weight

    def delta(self, adapter):
        return 2 * own(self, adapter)

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    if derived:
        config._register_custom_module({type(base): type("Derived", (LoraLinear,), {"get_delta_weight": delta})})
    else:
        monkeypatch.setattr(LoraLinear, "get_delta_weight", delta)
    model, x = get_peft_model(nn.Sequential(copy.deepcopy(base)), config), torch.randn(3, 4)
    layer, plain = model.base_model.model[0], base(x)
    half = model(x) - plain
    change = layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, base.weight + change)
    torch.testing.assert_close(model(x), plain + 2 * half)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, base.weight)


def test_a_scale_that_trains():
    model, x = small(target_modules=["0", "1"]), torch.randn(3, 4)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for _ in range(2):  # the second is computed from what the first has seen
            model(x)
    scale = layer.scaling["default"]
    wanted = model(x)
    layer.scale = nn.Parameter(torch.tensor(scale))
    layer.scaling["default"] = layer.scale
    model(x).sum().backward()
    assert layer.scale.grad is not None and layer.scale.grad.abs() > 0
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), wanted)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)


def test_ranks_and_targets_of_a_sum_that_others_make():
    model = small(r=2)
    model.add_adapter("b", LoraConfig(r=4, target_modules=["0", "1"]))
    assert model._check_add_weighted_adapter(["default", "b"], "cat", None) == ("cat", 6, {"0", "1"})
    assert model._check_add_weighted_adapter(["default", "b"], "svd", 3)[1] == 3
    for adapters, way in ((["default", "no"], "cat"), (["default", "b"], "no")):
        with pytest.raises(ValueError):
            model._check_add_weighted_adapter(adapters, way, None)


def test_each_block_by_itself():
    """verl asks for the adapter's tensors in the state dict of one block after the other."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    wanted, found = peft.get_peft_model_state_dict(model), {}
    for name, module in model.named_modules():
        if re.fullmatch(r"base_model\.model\.model\.layers\.\d+", name):
            part = peft.get_peft_model_state_dict(model, state_dict=module.state_dict())
            assert part.keys() == {f"{n}.lora_{x}.weight" for n in ("self_attn.q_proj", "mlp.down_proj") for x in "AB"}
            found.update({f"{name}.{key}": value for key, value in part.items()})
            state = module.state_dict()
            del state["mlp.down_proj.lora_A.default.weight"]
            with pytest.raises(ValueError, match="lacks"):
                peft.get_peft_model_state_dict(model, state_dict=state)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_layers_that_a_replaced_step_makes_know_their_model():
    """Also those of this package's classes: each row of a batch gets its own adapter."""

    class Own(LoraModel):
        def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
            if isinstance(target, LoraLayer):
                target.add_adapter(adapter_name, config, current_key)
            else:
                made = self._create_new_module(config, adapter_name, target, current_key=current_key)
                self._replace_module(parent, target_name, made, target)

    torch.manual_seed(0)
    config = functools.partial(LoraConfig, r=2, target_modules=["0"], init_lora_weights=False)
    tuner = Own(nn.Sequential(nn.Linear(4, 4)), config(), "default")
    tuner.inject_further(config(), "b", False, None)
    layer, x = tuner.model[0], torch.randn(2, 4)
    assert layer.context is context_of(tuner.model) and layer.key == "0"
    wanted = []
    for row, name in enumerate(["default", "b"]):
        tuner.set_adapter(name)
        wanted.append(tuner(x)[row])
    with layer.context.told(["default", "b"], None, keep=False):
        torch.testing.assert_close(tuner(x), torch.stack(wanted))


def test_a_layer_with_a_container_of_its_own(tmp_path):
    class Gated(LoraLinear):
        adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_gate")

        def update_layer(self, adapter_name, *args, **kwargs):
            if not hasattr(self, "lora_gate"):
                self.lora_gate = nn.ModuleDict({})
            self.lora_gate[adapter_name] = nn.Linear(self.in_features, 1)
            super().update_layer(adapter_name, *args, **kwargs)

        def forward(self, x, *args, **kwargs):
            base, gate = self.base_layer(x), self.lora_gate[self.active_adapters[0]]
            return base + torch.sigmoid(gate(x)) * (super().forward(x, *args, **kwargs) - base)

    def adapted(**fields):
        config = LoraConfig(r=2, target_modules=["0"], **fields)
        config._register_custom_module({nn.Linear: Gated})
        torch.manual_seed(0)
        return get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), config

    model, _ = adapted(init_lora_weights=False)
    parts = ["lora_A.weight", "lora_B.weight", "lora_gate.bias", "lora_gate.weight"]
    assert sorted(peft.get_peft_model_state_dict(model)) == [f"base_model.model.0.{part}" for part in parts]
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again, _ = adapted()
    peft.set_peft_model_state_dict(again, peft.load_peft_weights(str(tmp_path)))
    torch.testing.assert_close(again(x), model(x))


def test_a_prompt_of_a_derived_class():
    class Scaled(peft.PeftModelForCausalLM):
        def get_prompt(self, batch_size, task_ids=None, **kwargs):
            return super().get_prompt(batch_size, task_ids) * 2

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ids = torch.arange(5)[None]
    torch.manual_seed(0)
    base = tiny_llama()
    model = Scaled(copy.deepcopy(base), config)
    plain = peft.PeftModelForCausalLM(base, copy.deepcopy(config))
    prompt = model.prompt_encoder["default"].embedding.weight
    plain.prompt_encoder["default"].embedding.weight.data = 2 * prompt.data
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    tokens = [m.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*tokens)
