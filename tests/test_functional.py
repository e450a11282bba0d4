"""The front door and the operations without a PeftModel: get_peft_model, injection, helpers, base state dicts."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from toys import Mlp, tiny_llama

import peft.functional as functional
from peft import (
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_base_model_state_dict,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.model.walk import layers_of
from peft.helpers import (
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
)
from peft.utils.peft_types import PeftType


X = torch.linspace(-1, 1, 18).reshape(3, 6)
IDS = torch.arange(8)[None]


def lora(**kwargs):
    return LoraConfig(**{"r": 2, "target_modules": ["lin0"], "init_lora_weights": False, **kwargs})


def shaken(model):
    """The model with its trained tensors moved."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


# ---- get_peft_model -------------------------------------------------------------------------------------------------


def test_the_class_follows_the_task():
    assert type(get_peft_model(Mlp(), lora())) is PeftModel
    assert type(get_peft_model(Mlp(), lora(), mixed=True)) is PeftMixedModel
    assert type(get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))) is PeftModelForCausalLM


def test_the_origin_of_the_base_model_is_recorded():
    model, config = tiny_llama(), LoraConfig(revision="one")
    model.name_or_path = "someone/base"
    get_peft_model(model, config)
    assert (config.base_model_name_or_path, config.revision) == ("someone/base", "one")

    model, config = tiny_llama(), LoraConfig(base_model_name_or_path="other", revision="one")
    model.name_or_path = "someone/base"
    with pytest.warns(UserWarning) as caught:
        get_peft_model(model, config, revision="two")
    assert (config.base_model_name_or_path, config.revision) == ("someone/base", "two")
    text = " ".join(str(w.message) for w in caught)
    assert "'other' and is 'someone/base' now" in text
    assert "'one' and is 'two' now" in text

    model, config, further = tiny_llama(), LoraConfig(), LoraConfig()
    assert model.name_or_path == ""
    peft_model = get_peft_model(model, config)
    assert config.base_model_name_or_path is None, "a model that was loaded from nowhere has no name"
    model.name_or_path = "someone/base"
    peft_model.add_adapter("further", further)
    assert further.base_model_name_or_path == "someone/base"
    config = lora(base_model_name_or_path="kept")
    get_peft_model(Mlp(), config)
    assert config.base_model_name_or_path == "kept"


def test_what_is_no_config_or_no_model_is_refused():
    with pytest.raises(TypeError, match=r"get_peft_config\(config_dict\)"):
        get_peft_model(Mlp(), {"peft_type": "LORA"})
    with pytest.raises(TypeError, match="got LoraConfig, a class"):
        get_peft_model(Mlp(), LoraConfig)
    with pytest.raises(TypeError, match="nn.Module, got str"):
        get_peft_model("someone/base", lora())


def test_an_unknown_method_or_task_lists_what_there_is():
    config = lora()
    config.peft_type = PeftType.XLORA
    with pytest.raises(ValueError, match="LoraConfig has peft_type 'XLORA', whose config is XLoraConfig"):
        get_peft_model(Mlp(), config)
    config.peft_type = "LROA"
    with pytest.raises(ValueError, match="peft_type 'LROA'.*LORA"):
        get_peft_model(Mlp(), config)
    config = lora()
    config.task_type = "CAUSAL"
    with pytest.raises(ValueError, match="Did you mean 'CAUSAL_LM'"):
        get_peft_model(Mlp(), config)


def test_a_base_model_that_has_adapters_gets_one_warning():
    base = Mlp()
    get_peft_model(base, lora())
    with pytest.warns(UserWarning, match="a Mlp with the adapters default in it") as caught:
        model = get_peft_model(base, lora(), adapter_name="other")
    assert len(caught) == 1
    assert "add_adapter" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert list(model.peft_config) == ["default", "other"]


def test_get_peft_config():
    config = get_peft_config({"peft_type": "LORA", "r": 3})
    assert type(config) is LoraConfig
    assert config.r == 3
    with pytest.raises(ValueError, match="no 'peft_type'.*LORA"):
        get_peft_config({"r": 3})
    with pytest.raises(ValueError, match="LORR"):
        get_peft_config({"peft_type": "LORR"})
    with pytest.raises(TypeError, match="takes a dict"):
        get_peft_config(lora())


# ---- injection ------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"], trainable_token_indices=[3]),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "hira": HiraConfig(r=2, target_modules=["q_proj"]),
    "ln_tuning": LNTuningConfig(target_modules=["norm"]),
    "tokens": TrainableTokensConfig(token_indices=[1, 3]),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_injected_adapter_is_that_of_a_peft_model(method):
    base = tiny_llama().eval()
    model = shaken(get_peft_model(copy.deepcopy(base), copy.deepcopy(METHODS[method]))).eval()
    config = copy.deepcopy(METHODS[method])
    plain = copy.deepcopy(base)
    assert inject_adapter_in_model(config, plain, "mine") is plain
    assert plain.peft_config == {"mine": config}
    saved = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(plain, saved, adapter_name="mine")
    assert result.unexpected_keys == []
    assert result.missing_keys == []
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)
    assert (plain(IDS).logits - base(IDS).logits).abs().max() > 1e-6
    own = get_peft_model_state_dict(plain, adapter_name="mine")
    assert {name.removeprefix("base_model.model.") for name in saved} == set(own)
    functional.delete_adapter(plain, "mine", prefix="")
    torch.testing.assert_close(plain(IDS).logits, base(IDS).logits)
    assert set(plain.state_dict()) == set(base.state_dict())


def test_the_targets_are_settled_in_the_config_that_was_given():
    config = LoraConfig()
    inject_adapter_in_model(config, tiny_llama())
    assert config.target_modules == {"q_proj", "v_proj"}


def test_operations_on_a_plain_model():
    model = inject_adapter_in_model(lora(), Mlp())
    inject_adapter_in_model(lora(target_modules=["lin0", "lin1"]), model, "other")
    assert model.lin0.active_adapters == ["other"]
    both = model(X)
    functional.set_adapter(model, "default")
    assert (model(X) - both).abs().max() > 1e-4
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lin0.lora_A.default.weight", "lin0.lora_B.default.weight"}
    functional.set_requires_grad(model, "other")
    assert len([p for p in model.parameters() if p.requires_grad]) == 6
    model.to(torch.bfloat16)
    functional.cast_adapter_dtype(model, "default")
    assert {p.dtype for p in model.lin0.lora_A.parameters()} == {torch.float32, torch.bfloat16}
    assert functional.delete_adapter(model, "other", prefix="lora_") == ["default"]
    assert type(model.lin1) is nn.Linear


def test_shared_tensors_live_in_the_model_and_are_reused():
    def vera(**kwargs):
        return VeraConfig(**{"r": 4, "target_modules": ["lin0"], **kwargs})

    model = inject_adapter_in_model(vera(), Mlp())
    container = model.vera_A
    inject_adapter_in_model(vera(target_modules=["lin0"]), model, "other")
    assert model.vera_A is container
    assert set(container) == {"default", "other"}
    assert container["default"] is container["other"]
    before = model(X)
    model.double()
    assert model.vera_A["default"].dtype == torch.float64
    torch.testing.assert_close(model(X.double()).float(), before)
    duplicate = copy.deepcopy(model)
    assert duplicate.lin0.vera_A is duplicate.vera_A
    assert duplicate.vera_A is not container


def test_injection_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="get_peft_config"):
        inject_adapter_in_model({"peft_type": "LORA"}, Mlp())
    with pytest.raises(ValueError, match="adapters of another method than IA3"):
        inject_adapter_in_model(IA3Config(target_modules=["lin0"]), get_peft_model(Mlp(), lora()), "other")
    prompts = PromptTuningConfig(num_virtual_tokens=2)
    with pytest.raises(ValueError, match="cannot be injected"):
        inject_adapter_in_model(prompts, Mlp())


def test_arguments_of_newer_callers_are_ignored_aloud():
    with pytest.warns(UserWarning, match="does not know \\['something'\\]"):
        model = inject_adapter_in_model(lora(), Mlp(), something=1)
    assert "default" in model.lin0


def test_modules_are_taken_from_a_state_dict():
    saved = get_peft_model_state_dict(inject_adapter_in_model(lora(target_modules=["lin1"]), Mlp()))
    model = inject_adapter_in_model(lora(), Mlp(), state_dict=saved, low_cpu_mem_usage=True)
    assert [path for path, _ in layers_of(model)] == ["lin1"]
    assert model.lin1.lora_A["default"].weight.is_meta
    set_peft_model_state_dict(model, saved)
    torch.testing.assert_close(model.lin1.lora_A["default"].weight.data, saved["lin1.lora_A.weight"])


# ---- helpers --------------------------------------------------------------------------------------------------------


def test_scales_for_a_while():
    linear = Mlp()
    linear.norm = linear.act = linear.lin1 = nn.Identity()
    model = get_peft_model(linear, lora())
    with model.disable_adapter():
        base = model(X)
    full = model(X)
    with rescale_adapter_scale(model, 0.25):
        torch.testing.assert_close(model(X) - base, (full - base) * 0.25)
        with rescale_adapter_scale(model, 0):
            torch.testing.assert_close(model(X), base)
    with rescale_adapter_scale(model, True):
        torch.testing.assert_close(model(X), full)
    torch.testing.assert_close(model(X), full)
    with pytest.raises(RuntimeError, match="inside"), rescale_adapter_scale(model, 3):
        raise RuntimeError("inside")
    torch.testing.assert_close(model(X), full)
    with rescale_adapter_scale(model, 0.5):
        model.merge_adapter()  # by half, and whole afterwards
    torch.testing.assert_close(model(X), full)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base)


def test_scales_are_checked():
    model = get_peft_model(Mlp(), lora())
    for wrong in ("2", None):
        with pytest.raises(TypeError, match="should be a number"), rescale_adapter_scale(model, wrong):
            pass
    with pytest.raises(ValueError, match="finite"), rescale_adapter_scale(model, float("nan")):
        pass
    with pytest.raises(ValueError, match="this Mlp has no adapters"), rescale_adapter_scale(Mlp(), 2):
        pass
    ia3 = get_peft_model(Mlp(), IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="no adapters with a scale"), rescale_adapter_scale(ia3, 2):
        pass
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), rescale_adapter_scale(model, 2):
        pass


def test_inputs_are_not_cast_for_a_while():
    model = get_peft_model(Mlp().to(torch.bfloat16), lora())
    x = X.to(torch.bfloat16)
    model(x)
    with disable_input_dtype_casting(model, active=False):
        model(x)
    with pytest.raises(RuntimeError, match="dtype"), disable_input_dtype_casting(model):
        model(x)
    model(x)
    with disable_input_dtype_casting(Mlp()) as nothing:
        assert nothing is None


def test_signatures_of_the_base_model_are_shown():
    model = get_peft_model(tiny_llama(), LoraConfig())
    base, before = model.get_base_model(), model(IDS).logits
    assert "input_ids" not in inspect.signature(model.forward).parameters
    update_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert inspect.signature(model.generate) == inspect.signature(base.generate)
    assert model.forward.__doc__ == base.forward.__doc__
    torch.testing.assert_close(model(input_ids=IDS).logits, before)
    assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 10)
    duplicate = copy.deepcopy(model)
    assert duplicate.forward.__self__ is duplicate


def test_signatures_one_by_one():
    model = get_peft_model(tiny_llama(), LoraConfig())
    update_forward_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" not in inspect.signature(model.generate).parameters
    update_generate_signature(model)
    assert "generation_config" in inspect.signature(model.generate).parameters
    with pytest.raises(ValueError, match="'forward', 'generate', 'all'"):
        update_signature(model, "backward")
    task = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    own = inspect.signature(task.forward)
    update_forward_signature(task)
    assert inspect.signature(task.forward) == own


def test_what_is_an_adapter(tmp_path):
    get_peft_model(Mlp(), lora()).save_pretrained(tmp_path / "adapter")
    assert check_if_peft_model(str(tmp_path / "adapter"))
    assert not check_if_peft_model(str(tmp_path))
    assert not check_if_peft_model("nobody/nothing")
    (tmp_path / "adapter_config.json").write_text('{"config": {"adapter_type": "of another library"}}')
    assert not check_if_peft_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{broken")
    assert not check_if_peft_model(str(tmp_path))


# ---- the state dict of the base model -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tie", [False, True])
def test_the_base_model_s_state_dict_is_as_before(method, tie):
    base = tiny_llama(tie)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties
        model = shaken(get_peft_model(base, copy.deepcopy(METHODS[method])))
    found = get_base_model_state_dict(model)
    assert list(found) == list(before)
    for name, tensor in before.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    new = {name: tensor + 1 for name, tensor in before.items()}
    assert set_base_model_state_dict(model, new) == ([], [])
    for name, tensor in get_base_model_state_dict(model).items():
        torch.testing.assert_close(tensor, new[name], rtol=0, atol=0)


def test_injected_models_have_a_base_too():
    base = Mlp()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = inject_adapter_in_model(VeraConfig(r=4, target_modules=["lin0"]), base)
    assert list(get_base_model_state_dict(model)) == list(before)


def test_merged_weights_and_trained_biases_are_not_the_base():
    base = Mlp()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = shaken(get_peft_model(base, lora(bias="all")))
    model.merge_adapter()
    adapted = model(X)
    for name, tensor in get_base_model_state_dict(model).items():
        torch.testing.assert_close(tensor, before[name])
    torch.testing.assert_close(model(X), adapted)
    assert model.base_model.model.lin0.merged_adapters == ["default"]
    set_base_model_state_dict(model, {name: tensor * 2 for name, tensor in before.items()})
    assert model.base_model.model.lin0.merged_adapters == ["default"]
    for name, tensor in get_base_model_state_dict(model).items():
        torch.testing.assert_close(tensor, before[name] * 2)
    assert (model(X) - adapted).abs().max() > 1e-3


def test_state_dicts_that_do_not_fit_change_nothing():
    model = get_peft_model(Mlp(), lora())
    before = {name: tensor.clone() for name, tensor in get_base_model_state_dict(model).items()}
    new = {name: tensor + 1 for name, tensor in before.items()}
    some = {name: tensor for name, tensor in new.items() if name != "lin0.bias"}
    for wrong, message in [
        (some, "lacks lin0.bias"),
        ({**new, "lin0.wieght": torch.ones(1)}, "Did you mean 'lin0.weight'"),
        ({**new, "lin1.bias": torch.ones(5)}, r"lin1.bias: \[5\] given, \[4\] in the model"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            set_base_model_state_dict(model, wrong)
        for name, tensor in get_base_model_state_dict(model).items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    result = set_base_model_state_dict(model, {**some, "more": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["lin0.bias"]
    assert result.unexpected_keys == ["more"]
    torch.testing.assert_close(get_base_model_state_dict(model)["lin0.weight"], new["lin0.weight"])


def test_a_tied_tensor_may_be_given_once():
    model = get_peft_model(tiny_llama(tie=True), LoraConfig())
    state = get_base_model_state_dict(model)
    assert "lm_head.weight" in state
    del state["lm_head.weight"]
    assert set_base_model_state_dict(model, state).missing_keys == []
