"""What is true of adapter files beyond one method: state dicts given, old names, other tools, tensors of the base."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Mlp
from toys import tiny_llama as any_llama
from transformers.pytorch_utils import Conv1D

from peft import (
    AbbaConfig,
    AdaLoraConfig,
    AdamssConfig,
    GloraConfig,
    HiraConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.core.layer.layer import BaseTunerLayer
from peft.utils.error import ConfigError
from peft.utils.warning import UnusedEntryWarning


IDS = torch.arange(8)[None]


def tiny_llama(tie=False):
    """The same tiny llama each time."""
    torch.manual_seed(0)
    return any_llama(tie).eval()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def shaken(model, seed=0):
    """The model with every adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


def write(folder, tensors, **config):
    """An adapter's files, as any tool may have written them."""
    os.makedirs(folder, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, os.path.join(folder, "adapter_model.safetensors"))
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump(config, file)


# --- values come from the state dict --------------------------------------------------------------------------


def test_an_adapter_s_state_dict_is_given_back(method, tmp_path):
    """Scripts of alpaca-lora's kind let ``model.state_dict`` give the adapter alone, and then save the model."""
    model = method()
    own = get_peft_model_state_dict(model)
    again = get_peft_model_state_dict(model, own)
    assert again.keys() == own.keys() and all(torch.equal(again[name], own[name]) for name in own)
    whole = model.state_dict
    model.state_dict = lambda *args, **kwargs: get_peft_model_state_dict(model, whole())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())  # as the Trainer does
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)


def test_a_given_state_dict_is_all_that_is_read(method):
    """As ZeRO-3 leaves the model: its own tensors are empty, and the whole state dict is gathered elsewhere."""
    model = method()
    wanted = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    full = {name: t.clone() for name, t in model.state_dict().items()}
    for p in model.parameters():
        p.data = torch.empty(0)
    found = get_peft_model_state_dict(model, full)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_a_given_state_dict_lacks_is_an_error(method):
    model = method()
    full = dict(model.state_dict())
    own = {id(p) for p in model.parameters() if p.requires_grad}
    trained = [name for name, p in model.named_parameters() if id(p) in own]
    del full[trained[0]]
    with pytest.raises(ValueError, match=trained[0].replace(".", r"\.")):
        get_peft_model_state_dict(model, full)
    assert get_peft_model_state_dict(model, {}) == {}


def test_what_is_given_out_can_be_written(method, tmp_path):
    found = get_peft_model_state_dict(method())
    assert all(t.is_contiguous() for t in found.values())
    save_file(found, tmp_path / "file")


METHODS = {
    "lora": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, bias="all")),
    "padded": lambda: _padded(),
    "embedding": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["embed_tokens"], r=2)),
    "dora": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, use_dora=True)),
    "copies": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "ia3": lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "prompt": lambda: get_peft_model(
        tiny_llama(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    ),
}


# what 0.21.2 has twice in a whole model's state, by the config
TWICE = {
    "vera": (lambda: VeraConfig(target_modules=["q_proj", "k_proj"], r=2), ("vera_A", "vera_B")),
    "pvera": (lambda: PveraConfig(target_modules=["q_proj", "k_proj"], r=2), ("pvera_A", "pvera_B")),
    "randlora": (lambda: RandLoraConfig(target_modules=["q_proj", "k_proj"], r=2), ("randlora_A", "randlora_B")),
    "prompts": (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), ()),
    "prefix": (lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), ()),
}


@pytest.mark.parametrize("case", TWICE)
def test_a_whole_state_of_the_reference_loads(case):
    """As `accelerator.load_state` loads it, which is strict."""
    config, shared = TWICE[case]
    model = shaken(get_peft_model(tiny_llama(), config()))
    state = dict(model.state_dict())
    for matrix in shared:
        value = state[f"base_model.{matrix}.default"]
        for path in ("self_attn.q_proj", "self_attn.k_proj"):
            state[f"base_model.model.model.layers.0.{path}.{matrix}.default"] = value
    if not shared:
        state["word_embeddings.weight"] = model.get_input_embeddings().weight
    other = get_peft_model(tiny_llama(), config()).eval()
    other.load_state_dict(state)
    nn.ModuleDict({"wrapped": other}).load_state_dict({f"wrapped.{name}": t for name, t in state.items()})
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "word_embedding.weight": torch.zeros(1)})


def test_the_states_of_an_optimizer_find_their_parameters():
    """AdaLoRA's, whose parameters have no order of their own: it is that of 0.21.2."""
    model = get_peft_model(tiny_llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name.split(".")[-2] for name in trained[:3]] == ["lora_A", "lora_B", "lora_E"]


def _padded():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = METHODS["lora"]()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    return model


@pytest.fixture(params=METHODS)
def method(request):
    return lambda: shaken(METHODS[request.param]())


@pytest.mark.parametrize("how", ["bias", "file"])
def test_rows_of_a_batch_share_the_tensors_of_the_base(how):
    x = torch.randn(2, 6)
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"], r=2, bias="all" if how == "bias" else "none"))
    if how == "file":
        state = get_peft_model_state_dict(model)
        set_peft_model_state_dict(model, {**state, "base_model.model.norm.bias": torch.randn(8)})
    model.add_adapter("other", LoraConfig(target_modules=["lin0"], r=2))
    shaken(model)
    assert torch.allclose(model(x, adapter_names=["default", "default"]), model(x), atol=1e-6)
    for names in (["default", "other"], ["__base__", "__base__"]):
        with pytest.raises(ValueError, match="active"):
            model(x, adapter_names=names)
    model.set_adapter("other")
    with model.disable_adapter():
        base = model(x)
    assert torch.allclose(
        model(x, adapter_names=["other", "__base__"]), torch.stack([model(x)[0], base[1]]), atol=1e-6
    )
    with pytest.raises(ValueError, match="active"):
        model(x, adapter_names=["other", "default"])


# --- what torch puts around modules ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["all", "base", "block", "layer"])
def test_compiled_parts_have_no_name(where, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    plain = get_peft_model(tiny_llama(), config)
    wanted = get_peft_model_state_dict(plain)
    base = tiny_llama()
    if where == "base":
        base = torch.compile(base, backend="eager")
    elif where == "block":
        base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    elif where == "layer":
        base.model.layers[0].self_attn.q_proj = torch.compile(base.model.layers[0].self_attn.q_proj, backend="eager")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))
    model = torch.compile(model, backend="eager") if where == "all" else model
    result = set_peft_model_state_dict(model, wanted)
    assert not result.missing_keys and not result.unexpected_keys
    found = get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_names_of_a_replica(inside, tmp_path):
    def base():
        return nn.ModuleDict({"module" if inside else "part": Mlp()})

    model = shaken(get_peft_model(base(), LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"], r=2)))
    wanted = get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    for form in (lambda name: f"module.{name}", lambda name: f"module._orig_mod.{name}"):
        save_file({form(name): t.clone() for name, t in wanted.items()}, tmp_path / "adapter_model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = PeftModel.from_pretrained(base(), tmp_path)
        found = get_peft_model_state_dict(loaded)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_state_dict_says_what_to_adapt_in_a_compiled_model():
    state = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama()))
    model = torch.compile(tiny_llama(), backend="eager")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, state_dict=state)
    assert get_peft_model_state_dict(model).keys() == state.keys()


@pytest.mark.parametrize("fields", [{"config_C": "vector"}, {"config_C": "none"}, {"config_A_B": "vector"}], ids=str)
def test_what_a_file_writes_in_another_way_goes_into_a_plain_model_too(fields):
    wanted = shaken(get_peft_model(Mlp(), GloraConfig(target_modules=["lin0"], r=2, **fields)))
    model = inject_adapter_in_model(wanted.peft_config["default"], Mlp())
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(wanted))
    assert not result.missing_keys and not result.unexpected_keys
    again = get_peft_model(Mlp(), wanted.peft_config["default"])
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    for name, tensor in get_peft_model_state_dict(wanted).items():
        assert torch.equal(get_peft_model_state_dict(again)[name], tensor)


def test_a_model_under_fsdp():
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = shaken(get_peft_model(Mlp(), LoraConfig(target_modules=["lin0", "lin1"], r=2)))
    wanted = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model.base_model.model.lin0 = FSDP(
            model.base_model.model.lin0, use_orig_params=True, device_id=torch.device("cpu")
        )
        wrapped = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
        found = get_peft_model_state_dict(wrapped)
    finally:
        dist.destroy_process_group()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.lin0(x, x, x)[0]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["lin0"]),
        LoraConfig(target_parameters=["lin0.in_proj_weight"]),
        OFTConfig(target_modules=["lin0"], oft_block_size=2),
        AbbaConfig(target_modules=["lin0"], r1=2, r2=2),  # starts from a decomposition
        AdamssConfig(target_modules=["lin0"], r=4, num_subspaces=2, subspace_rank=2),
    ],
    ids=lambda c: f"{c.method_name}{'-parameter' if getattr(c, 'target_parameters', None) else ''}",
)
def test_a_step_under_fsdp_is_one_without(config):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.manual_seed(0)
    model = shaken(get_peft_model(Attending(), config))
    x = torch.randn(2, 3, 8)
    wanted = model(x)
    wanted.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
        output = wrapped(x)
        output.square().sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(output, wanted)
    found = {
        n.removeprefix("_fsdp_wrapped_module."): p.grad for n, p in wrapped.named_parameters() if p.grad is not None
    }
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


# --- configs --------------------------------------------------------------------------------------------------

OTHERS = {
    "mlx-lm": {"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": {"rank": 8}},
    "adapters": {"model_class": "BertModel", "model_name": "bert", "hidden_size": 8, "config": {}},
    "config of a model": {"model_type": "llama", "hidden_size": 64},
    "diffusers": {"_class_name": "UNet", "_diffusers_version": "0.1"},
    "base_model": {"base_model": "x"},
    "empty": {},
}


@pytest.mark.parametrize("cls", [PeftConfig, LoraConfig, IA3Config])
@pytest.mark.parametrize("tool", OTHERS)
def test_a_config_without_a_method_is_refused(tmp_path, tool, cls):
    (tmp_path / "adapter_config.json").write_text(json.dumps(OTHERS[tool]))
    with pytest.raises(ConfigError, match="peft_type") as info:
        cls.from_pretrained(tmp_path)
    assert tool in str(info.value) and str(tmp_path) in str(info.value)


def test_what_belongs_to_a_process_is_not_read(tmp_path):
    write(tmp_path, {}, peft_type="LORA", runtime_config={"ephemeral_gpu_offload": True})
    assert not LoraConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload


@pytest.mark.parametrize(("given", "warns"), [("lora", False), ("LORA", False), ("QLORA", True), ("IA3", True)])
def test_a_config_class_keeps_its_method(given, warns):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert LoraConfig(peft_type=given).peft_type == "LORA"
    assert bool(seen) == warns


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "("),
        ("exclude_modules", "["),
        ("target_modules", [None]),
        ("target_modules", 3),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"q": None}),
        ("alpha_pattern", {"q": "2"}),
        ("layers_pattern", ["("]),
        ("modules_to_save", [1]),
        ("r", "2"),
        ("r", None),
        ("lora_dropout", []),
        ("use_dora", "yes"),
        ("target_parameters", [{}]),
        ("trainable_token_indices", {"embed": [None]}),
        ("base_model_name_or_path", 1),
    ],
)
def test_a_bad_entry_is_named(tmp_path, field, value):
    write(
        tmp_path, {}, **{"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [0], field: value}
    )
    with pytest.raises(ConfigError, match=field) as info:
        PeftConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(info.value)


# --- a file is judged by its tensors --------------------------------------------------------------------------

PLACE = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def pair(model, layer=0):
    """A LoRA pair of rank 2 for a layer, and that layer's weight moved by it."""
    weight = model.model.layers[layer].self_attn.q_proj.weight
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    weight.data += b @ a
    return {PLACE.format(layer, "A"): a, PLACE.format(layer, "B"): b}


@pytest.mark.parametrize(
    "said",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
        {"corda_config": {}},
        {"velora_config": {}},
        {"init_lora_weights": None},
        {"layers_to_transform": []},
        {"lora_alpha": 2.0},
    ],
    ids=str,
)
def test_how_a_lora_started_does_not_matter(tmp_path, said):
    wanted = tiny_llama()
    tensors = pair(wanted)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"], **said}
    write(tmp_path, tensors, **config)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.allclose(model(IDS).logits, wanted(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("form", [True, "bat"])
def test_files_of_a_method_that_was_renamed(tmp_path, form):
    model = shaken(get_peft_model(tiny_llama(), MissConfig(target_modules=["q_proj"], r=2, init_weights=form)))
    wanted = model(IDS).logits
    state = {name.replace(".miss_", ".bone_"): t for name, t in get_peft_model_state_dict(model).items()}
    write(tmp_path, state, peft_type="BONE", r=2, init_weights=form, target_modules=["q_proj"], bias="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert isinstance(loaded.peft_config["default"], MissConfig)
    assert torch.allclose(loaded(IDS).logits, wanted, atol=1e-6)


def test_tensors_of_the_base_are_the_adapters_own(tmp_path):
    """They act while it is active, are saved with it, and disabling or another adapter gives the base."""
    wanted, base = tiny_llama(), tiny_llama()(IDS).logits
    tensors = pair(wanted)
    norm = torch.full_like(wanted.model.norm.weight, 1.7)
    wanted.model.norm.weight.data = norm.clone()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
    write(tmp_path / "a", {**tensors, "base_model.model.model.norm.weight": norm}, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert torch.allclose(model(IDS).logits, wanted(IDS).logits, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    assert torch.allclose(model(IDS).logits, base, atol=1e-6)
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "b", selected_adapters=["default"])
    assert torch.equal(load_file(tmp_path / "b/adapter_model.safetensors")["base_model.model.model.norm.weight"], norm)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")
    assert torch.allclose(again(IDS).logits, wanted(IDS).logits, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(IDS).logits, wanted(IDS).logits, atol=1e-5)


UNDER = {
    "Linear": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), "0", "0.base_layer.weight"),
    "Conv1D": (lambda: nn.Sequential(Conv1D(5, 6), nn.Linear(5, 4)), "0", "0.base_layer.weight"),
    "Conv2d": (
        lambda: nn.Sequential(nn.Unflatten(-1, (1, 2, 3)), nn.Conv2d(1, 4, 2)), "1", "1.base_layer.weight"
    ),
    "MultiheadAttention": (
        lambda: nn.ModuleList([nn.MultiheadAttention(6, 2)]), "0", "0.base_layer.in_proj_weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, HiraConfig, OFTConfig], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", UNDER)
def test_weights_under_an_adapter_are_too(tmp_path, kind, config):
    """They reach the model, as with 0.21.2, while their adapter acts; its own file has them, and no other adapter."""
    make, target, name = UNDER[kind]
    own = {IA3Config: {"feedforward_modules": []}, OFTConfig: {"oft_block_size": 2}}.get(config, {"r": 2})

    def base():
        torch.manual_seed(0)
        return make().eval()

    def output(model):
        m = model[0] if isinstance(model, nn.ModuleList) else model
        return m(x, x, x)[0] if isinstance(model, nn.ModuleList) else m(x)

    def adapted(folder=None):
        config_of = config(target_modules=[target], **own)
        return (
            shaken(get_peft_model(base(), config_of)) if folder is None else PeftModel.from_pretrained(base(), folder)
        )

    x, model = torch.randn(3, 6), adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.base_model.model.get_submodule(name.partition(".base_layer")[0])
    weight = getattr(layer.get_base_layer(), layer.kind.weight)
    brought = torch.randn_like(weight)
    original, plain = weight.detach().clone(), output(base())
    with torch.no_grad():
        weight.copy_(brought)
    wanted = output(model.base_model.model)
    save_file({**tensors, f"base_model.model.{name}": brought}, tmp_path / "adapter_model.safetensors")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = adapted(tmp_path)
    inner = loaded.base_model.model
    torch.testing.assert_close(output(inner), wanted)
    with loaded.disable_adapter():
        assert torch.equal(output(inner), plain)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(output(adapted(tmp_path / "again").base_model.model), wanted)
    loaded.add_adapter("other", config(target_modules=[target], **own))
    loaded.eval().set_adapter("other")
    torch.testing.assert_close(output(inner), plain)
    loaded.set_adapter("default")
    loaded.merge_adapter()
    torch.testing.assert_close(output(inner), wanted)
    loaded.unmerge_adapter()
    loaded.delete_adapter("default")
    loaded.set_adapter("other")
    torch.testing.assert_close(output(inner), plain)
    torch.testing.assert_close(output(loaded.unload()), plain)

    save_file({**tensors, f"base_model.model.{name}": brought[:1]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=f"size mismatch for base_model.model.{name}"):
        adapted(tmp_path)
    save_file({**tensors, f"base_model.model.{name}": original}, tmp_path / "adapter_model.safetensors")
    assert all(layer.rewritten is None for layer in adapted(tmp_path).modules() if isinstance(layer, BaseTunerLayer))


def test_buffers_of_the_base_are_too(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()

    x, mean = torch.randn(3, 4), torch.full((4,), 1.5)
    get_peft_model(base(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.1.running_mean": mean}, file)
    model = PeftModel.from_pretrained(base(), tmp_path)
    wanted = base()
    wanted[1].running_mean.copy_(mean)
    assert torch.allclose(model(x), wanted(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base()(x))
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(PeftModel.from_pretrained(base(), tmp_path / "again")(x), wanted(x))
    save_file({**load_file(file), "base_model.model.1.running_mean": mean[:2]}, file)
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.1.running_mean"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_tensors_of_the_base_beside_a_prompt(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama(), config).eval()
    before = model(IDS).logits
    model.save_pretrained(tmp_path)
    file, norm = tmp_path / "adapter_model.safetensors", torch.full_like(model.base_model.model.norm.weight, 1.7)
    save_file({**load_file(file), "base_model.model.norm.weight": norm}, file)
    model.base_model.model.norm.weight.data = norm.clone()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits)
    for off in (loaded.disable_adapter, loaded.disable_adapter):
        with off():
            assert torch.equal(loaded(IDS).logits, tiny_llama()(IDS).logits)
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits)
    loaded.add_adapter("other", copy.deepcopy(config))
    loaded.set_adapter("other")
    assert torch.equal(loaded.base_model(IDS).logits, tiny_llama()(IDS).logits)
    assert not torch.allclose(model(IDS).logits, before)


def test_replicas_have_no_name():
    """What DataParallel gives, and a state dict of a replicated model, mean the model inside."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted, outer = get_peft_model_state_dict(model), nn.DataParallel(model)
    for got in (get_peft_model_state_dict(outer), get_peft_model_state_dict(model, outer.state_dict())):
        assert got.keys() == wanted.keys() and all(torch.equal(t, wanted[name]) for name, t in got.items())
    other = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert set_peft_model_state_dict(nn.DataParallel(other), wanted).unexpected_keys == []
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_table_below_trained_tokens_has_the_name_that_others_read():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
    state = get_peft_model_state_dict(get_peft_model(tiny_llama(), config), save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.token_adapter.base_layer.weight" in state
    assert set_peft_model_state_dict(get_peft_model(tiny_llama(), config), state).unexpected_keys == []


def test_a_file_for_another_shape_is_refused_by_a_runtime_error():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: torch.zeros(3, 3) for name in get_peft_model_state_dict(model)}
    with pytest.raises(RuntimeError, match="size mismatch for base_model.model.model.layers.0.self_attn.q_proj"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --- names ----------------------------------------------------------------------------------------------------


def test_missing_names_are_those_in_the_model():
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), tiny_llama(), "fast")
    state = get_peft_model_state_dict(model, adapter_name="fast")
    gone = sorted(state)[0]
    del state[gone]
    result = set_peft_model_state_dict(model, state, "fast")
    assert result.missing_keys == [gone.replace(".weight", ".fast.weight")]
    assert result.missing_keys[0] in model.state_dict()


class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"proj": nn.Linear(4, 4)})


class New(nn.Module):
    _checkpoint_conversion_mapping = {"^model": "model.language_model"}

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"language_model": nn.ModuleDict({"proj": nn.Linear(4, 4)})})


def test_the_bases_own_renaming_counts(tmp_path):
    old = get_peft_model(Old(), LoraConfig(target_modules=["proj"], init_lora_weights=False))
    old.save_pretrained(tmp_path)
    new = PeftModel.from_pretrained(New(), tmp_path)
    wanted = old.base_model.model.model["proj"].lora_B["default"].weight
    assert torch.equal(new.base_model.model.model["language_model"]["proj"].lora_B["default"].weight, wanted)


@pytest.mark.parametrize(
    "mapping",
    [{"^model": "model.language_model"}, {"^base_model.model.model": "base_model.model.model.language_model"}],
)
def test_a_mapping_may_be_of_names_in_the_base_or_in_the_file(tmp_path, mapping):
    class Plain(New):
        _checkpoint_conversion_mapping = None

    get_peft_model(Old(), LoraConfig(target_modules=["proj"], init_lora_weights=False)).save_pretrained(tmp_path)
    new = PeftModel.from_pretrained(Plain(), tmp_path, key_mapping=mapping)
    assert new.base_model.model.model["language_model"]["proj"].lora_B["default"].weight.any()


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**VISION, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
PICTURE = {**VISION, "image_size": 8, "patch_size": 4}


def llava():
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**PICTURE)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=PICTURE, mm_tokens_per_image=4, image_token_index=63
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma():
    text, vision = (
        {**TEXT, "model_type": "gemma"},
        {**PICTURE, "model_type": "siglip_vision_model", "projection_dim": 16},
    )
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=16, image_token_index=63
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def clip_text():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**VISION, vocab_size=64))


def siglip_text():
    return transformers.SiglipTextModel(transformers.SiglipTextConfig(**VISION, vocab_size=64))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**PICTURE))


def deit():
    return transformers.DeiTModel(transformers.DeiTConfig(**PICTURE))


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**PICTURE))


RENAMED = (llava, gemma3, paligemma, clip_text, siglip_text, vit, deit, dinov2)


def name_before(model, key):
    """What transformers called a module in older checkpoints, by its own tables read backwards."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    name = f"{key}.weight"
    for transform in reversed(get_model_conversion_mapping(model)):
        if not hasattr(transform, "operations"):
            name = transform.reverse_transform().rename_source_key(name)[0]
    return name.removesuffix(".weight")


@pytest.mark.parametrize("make", RENAMED, ids=lambda make: make.__name__)
def test_files_and_configs_with_names_of_older_versions(tmp_path, make):
    base = make()
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    moved = {name: old for name in linear if (old := name_before(base, name)) != name}
    assert moved, "transformers has renamed nothing here: take it off the list"
    place, old = sorted(moved.items())[0]
    model = shaken(get_peft_model(base, LoraConfig(target_modules=[place], r=2)))
    state = get_peft_model_state_dict(model)
    for targets in ([old], old.replace(".", r"\.")):
        before = {name.replace(place, old): t for name, t in state.items()}
        write(tmp_path, before, peft_type="LORA", r=2, lora_alpha=8, target_modules=targets)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UnusedEntryWarning)  # of a head that is tied to the embedding
            loaded = PeftModel.from_pretrained(make(), tmp_path)
        found = get_peft_model_state_dict(loaded)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def qwen2_vl():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 1}
    tokens = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


BEFORE_4_52 = {llava: "language_model.model", gemma3: "language_model.model", paligemma: "language_model.model",
               qwen2_vl: "model"}  # fmt: skip
"""Models -> what their language model was called; today it is `model.language_model` in all of them."""


@pytest.mark.parametrize("way", ["names", "regex", "pattern", "copies", "state dict"])
@pytest.mark.parametrize("make", BEFORE_4_52, ids=lambda make: make.__name__)
def test_names_from_before_the_language_model_moved(tmp_path, make, way):
    def base():
        torch.manual_seed(0)
        return make()

    now, before = "model.language_model", BEFORE_4_52[make]
    names = [f"layers.{i}.self_attn.{part}_proj" for i in range(TEXT["num_hidden_layers"]) for part in "qv"]
    ranks = {f"{now}.{names[0]}": 3} if way == "pattern" else {}
    also = {"modules_to_save": [f"{now}.layers.0.mlp.up_proj"]} if way == "copies" else {}
    config = LoraConfig(target_modules=[f"{now}.{name}" for name in names], r=2, rank_pattern=ranks, **also)
    model = shaken(get_peft_model(base(), config))
    state = get_peft_model_state_dict(model)
    old = {name.replace(now, before): tensor for name, tensor in state.items()}
    targets = [f"{before}.{name}" for name in names]
    if way == "regex":
        targets = re.escape(before) + r"\.layers\.\d+\.self_attn\.(q|v)_proj"
    if way == "state dict":
        loaded = inject_adapter_in_model(LoraConfig(target_modules=["x"], r=2), base(), state_dict=old)
        assert not set_peft_model_state_dict(loaded, old).missing_keys
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    else:
        also = {key: [name.replace(now, before) for name in value] for key, value in also.items()}
        ranks = {key.replace(now, before): rank for key, rank in ranks.items()}
        write(tmp_path, old, peft_type="LORA", r=2, target_modules=targets, rank_pattern=ranks, **also)
        loaded = PeftModel.from_pretrained(base(), tmp_path)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


# --- tensors without values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj"]), IA3Config(target_modules=["k_proj"], feedforward_modules=[])]
)
def test_no_call_with_tensors_on_meta(config):
    model = tiny_llama()
    state = get_peft_model_state_dict(inject_adapter_in_model(config, tiny_llama()))
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    some = dict(list(state.items())[:1])
    with pytest.warns(UserWarning, match="no values yet"):
        result = set_peft_model_state_dict(model, some, low_cpu_mem_usage=True)
    assert len(result.missing_keys) == len(state) - 1
    with pytest.raises(ValueError, match="no values"):
        model(IDS)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert model(IDS).logits.isfinite().all()
    assert not model._forward_pre_hooks or "_peft_unfilled" not in vars(model)


def test_no_merge_with_tensors_on_meta():
    for lacking in ("lora_A", "lora_B", "lora_magnitude_vector"):
        config = LoraConfig(target_modules=["lin0"], r=2, use_dora=True)
        state = get_peft_model_state_dict(inject_adapter_in_model(config, Mlp()))
        model = inject_adapter_in_model(config, Mlp(), low_cpu_mem_usage=True)
        before = model.lin0.base_layer.weight.clone()
        with pytest.warns(UserWarning, match="no values yet"):
            set_peft_model_state_dict(
                model, {k: t for k, t in state.items() if lacking not in k}, low_cpu_mem_usage=True
            )
        with pytest.raises(ValueError, match="no values"):
            model.lin0.merge()
        assert torch.equal(model.lin0.base_layer.weight, before) and not model.lin0.merged


TIED = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 6]}},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "pairs": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("what", TIED)
def test_what_tied_modules_share_is_loaded_into_both(tmp_path, what, low):
    model = shaken(get_peft_model(tiny_llama(tie=True), LoraConfig(r=2, **TIED[what])))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(tie=True), tmp_path, low_cpu_mem_usage=low, is_trainable=True).eval()
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-6)
    assert len(trained(loaded)) == len(trained(model))  # one tensor, not one for each end


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_on_meta_ends_in_the_same_dtypes(tmp_path, widen, dtype):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    dtypes = []
    for low in (False, True):
        base = tiny_llama().to(dtype)
        model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=widen)
        dtypes.append({name: p.dtype for name, p in model.named_parameters()})
        model(IDS)
    assert dtypes[0] == dtypes[1]


# --- clients and cards ----------------------------------------------------------------------------------------


def test_a_client_finds_the_config_of_what_failed():
    model = inject_adapter_in_model(LoraConfig(target_modules=["lin0"], r=2), Mlp(), "first")
    with pytest.raises(ValueError):
        inject_adapter_in_model(LoraConfig(target_modules=["no_such"], r=2), model, "second")
    assert model.peft_config.pop("second").target_modules == {"no_such"}
    assert list(model.peft_config) == ["first"]


def test_tags_of_the_base_are_in_the_card(tmp_path):
    base = tiny_llama()
    base.add_model_tags(["trl", "sft"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert {"trl", "sft", "lora", "transformers"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_a_model_without_a_config_has_none():
    assert not hasattr(get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"])), "config")
    assert get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).config.model_type == "llama"


CHOICES = {
    "lora": LoraConfig(target_modules=["q_proj"], r=2),
    "tokens": LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[5]),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "copy": LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tie", [True, False])
def test_a_resized_vocabulary_is_saved(tmp_path, choice, tie):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**TEXT, "vocab_size": 32}, tie_word_embeddings=tie)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def base():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(40)
        return model

    model = base()
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.data[32:].normal_()
    model = shaken(get_peft_model(model, CHOICES[choice]))
    ids = torch.tensor([[5, 33, 39, 3]])
    with pytest.warns(UserWarning, match="vocabulary has 40 tokens, and 32"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
