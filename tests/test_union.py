"""Unions: one adapter of several methods, through its whole life, on a decoder, an encoder and an encoder-decoder."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from typing import Any
from zlib import crc32

import pytest
import torch
from architectures import ENCODER_DECODERS, build, inputs
from in_blocks import differs, gives, logits, refused, trains, unadapted
from laws import methods
from safetensors.torch import load_file
from torch import nn

from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    MAMConfig,
    MixLoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    ShadowConfig,
    Stack,
    UnionConfig,
    UniPELTConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.core.blocks.blocks import first_output
from peft.core.model.walk import layers_of
from peft.utils.peft_types import PEFT_TYPE_TO_MIXED_MODEL_MAPPING


pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = ("llama", "bert", "t5")
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
PARTS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "query", "q"]),
    "bottleneck": lambda: BottleneckConfig(reduction_factor=4),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=2),
    "ia3": lambda: IA3Config(target_modules=["v_proj", "value", "v"], feedforward_modules=[]),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "query", "q"]),
    "reft": lambda: ReftConfig(r=2),
}


def union(*names: str, **fields: Any) -> UnionConfig:
    return UnionConfig({name: PARTS[name]() for name in names}, **fields)


def stir(model: nn.Module, name: str = "default", seed: int = 0, size: float = 0.4) -> None:
    """Move an adapter's trained tensors away from their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".{name}" in key:
                p.add_(torch.randn(p.shape, generator=draw) * size)


def adapted(name: str, config: Any, adapter: str = "default", size: float = 0.4) -> PeftModel:
    base = build(name)
    torch.manual_seed(0)  # after it: only the first model of an architecture is drawn
    config.task_type = TASKS[name]
    for member in config.members:
        member.task_type = TASKS[name]
    model = get_peft_model(base, config, adapter)
    stir(model, adapter, size=size)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["lora+bottleneck+prefix", "prompt+ia3+bottleneck", "mam", "unipelt"])
def test_it_trains_saves_loads_and_goes(name, kind, tmp_path):
    network = BottleneckConfig(reduction_factor=4, use_gating=True)
    configs = {"mam": MAMConfig(), "unipelt": UniPELTConfig(adapter=network)}
    config = configs[kind] if kind in configs else union(*kind.split("+"))
    model = adapted(name, config, size=0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == model.get_nb_trainable_parameters()[0]
    trains(model, name, rate=0.01)
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    trained, base = logits(model, name), unadapted(name)
    with model.disable_adapter():
        gives(logits(model, name)[:, -6:], base)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    again = PeftModel.from_pretrained(build(name), tmp_path)
    assert type(again) is type(model) and type(again.peft_config["default"]) is UnionConfig
    assert list(again.peft_config["default"].parts) == list(config.parts)
    gives(logits(again, name), trained)
    further = adapted(name, union("lora"), "first")
    further.load_adapter(tmp_path, "second", is_trainable=True)
    further.set_adapter("second")
    gives(logits(further, name), trained)
    gives(logits(model.unload(), name), base)


@pytest.mark.parametrize("order", [("lora", "bottleneck", "prefix"), ("prefix", "bottleneck", "lora")])
def test_each_part_acts_as_it_does_alone(order):
    """With the other parts at rest it is that part alone, with the same tensors under the same names."""
    whole = adapted("llama", union(*order))
    together, held = logits(whole, "llama"), get_peft_model_state_dict(whole)
    words = {"lora": "lora_", "bottleneck": "bottleneck_", "prefix": "prompt_encoder"}
    for part in order:
        alone = adapted("llama", PARTS[part]())
        own = get_peft_model_state_dict(alone).keys()
        set_peft_model_state_dict(alone, {key: tensor for key, tensor in held.items() if key in own})
        resting = copy.deepcopy(whole)
        with torch.no_grad():
            for key, p in resting.named_parameters():
                if ".default" in key and words[part] not in key:
                    p.zero_()
        resting.base_model.prompts.prompts.enable_adapters(part == "prefix")  # the attention sees zeros too
        found = logits(alone, "llama")
        gives(logits(resting, "llama"), found)
        differs(found, together)


def test_a_file_is_those_of_its_parts_side_by_side(tmp_path):
    model = adapted("llama", union("bottleneck", "lora", "prefix"))
    model.save_pretrained(tmp_path / "union")
    held = load_file(tmp_path / "union" / "adapter_model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for part in ("bottleneck", "lora", "prefix"):
        adapted("llama", PARTS[part]()).save_pretrained(tmp_path / part)
        found.update(load_file(tmp_path / part / "adapter_model.safetensors"))
    assert {key: t.shape for key, t in held.items()} == {key: t.shape for key, t in found.items()}
    said = json.loads((tmp_path / "union" / "adapter_config.json").read_text())
    assert said["peft_type"] == "UNION" and said["task_type"] == "CAUSAL_LM"
    assert [part["peft_type"] for part in said["parts"]] == ["BOTTLENECK", "LORA", "PREFIX_TUNING"]
    assert all("task_type" not in part and "base_model_name_or_path" not in part for part in said["parts"])


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_and_other_adapters(name):
    model = adapted(name, union("lora", "bottleneck", "prefix"), "one")
    model.add_adapter("two", UnionConfig([PARTS["ia3"](), PrefixTuningConfig(num_virtual_tokens=2)]))
    model.add_adapter("three", LoraConfig(r=2, target_modules=["q_proj", "query", "q"]))
    for seed, adapter in enumerate(("two", "three")):
        stir(model, adapter, seed)
    alone = {"__base__": unadapted(name)}
    for adapter in ("one", "two", "three"):
        model.set_adapter(adapter)
        assert model.active_adapters == [adapter]
        alone[adapter] = logits(model, name)
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert all(f".{adapter}" in key for key in trained if "classifier" not in key)
    for one in alone:
        for other in alone:
            if one < other:
                differs(alone[one], alone[other])
    rows = ["two", "__base__", "three", "one"]
    gives(logits(model, name, adapter_names=rows), torch.stack([alone[row][i] for i, row in enumerate(rows)]))
    if name != "bert":  # where each has a head of its own
        model.set_adapter(["one", "three"])
        differs(logits(model, name), alone["one"])
    model.set_adapter("two")
    model.delete_adapter("two")
    assert model.active_adapters and "two" not in model.peft_config
    assert not any(".two" in key for key, _ in model.named_modules())
    model.set_adapter("one")
    gives(logits(model, name), alone["one"])
    model.set_adapter("three")
    gives(logits(model, name), alone["three"])


def test_prefixes_and_prompts_of_one_model():
    """Each is right alone, one batch cannot have both, and only one can be active."""
    model = adapted("llama", union("lora", "prefix"), "one")
    model.add_adapter("two", union("prompt", "ia3"))
    stir(model, "two", 1)
    first = logits(model, "llama")
    model.set_adapter("two")
    alone = get_peft_model(build("llama"), union("prompt", "ia3"))
    alone.load_state_dict({k.replace(".two", ".default"): v for k, v in model.state_dict().items()}, strict=False)
    gives(logits(model, "llama"), logits(alone, "llama"))
    with pytest.raises(ValueError, match="prefixes and virtual tokens before the text"):
        logits(model, "llama", adapter_names=["one", "two", "one", "two"])
    with pytest.raises(ValueError, match="only one prompt can be active"):
        model.set_adapter(["one", "two"])
    assert model.active_adapters == ["two"]
    model.set_adapter("one")
    gives(logits(model, "llama"), first)


def test_generation_with_a_cache_is_generation_without():
    for kind in (("lora", "bottleneck", "prefix"), ("lora", "prompt")):
        model, ids = adapted("llama", union(*kind)).eval(), inputs("llama")["input_ids"]
        said = [
            model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        assert torch.equal(*said)
        with model.disable_adapter():
            plain = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(plain, build("llama").generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False))
        model.set_adapter("default")


def test_checkpoints_give_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        model = adapted("llama", UniPELTConfig())
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**inputs("llama")).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        gives(one, other)


def test_weights_are_merged_as_far_as_they_can_be():
    model = adapted("llama", union("lora", "ia3"))
    wanted = logits(model, "llama")
    gives(logits(copy.deepcopy(model).merge_and_unload(), "llama"), wanted)
    model = adapted("llama", union("lora", "bottleneck", "prefix"))
    wanted = logits(model, "llama")
    with refused(model, r"bottleneck \(it acts on.*prefix_tuning \(.*merge_adapter\(\) merges its lora"):
        model.merge_and_unload()
    with pytest.warns(UserWarning, match="not merged, and go on acting: bottleneck.*prefix_tuning"):
        model.merge_adapter()
    merged = {type(layer).__module__.rpartition(".")[2] for _, layer in layers_of(model) if layer.merged}
    assert merged == {"layer"}
    gives(logits(model, "llama"), wanted)
    assert not model.supports_lora_conversion()
    model.unmerge_adapter()
    gives(logits(model, "llama"), wanted)
    model = adapted("llama", union("bottleneck", "prefix"))
    with refused(model, "nothing of adapter 'default' can be merged"):
        model.merge_adapter()


def test_what_is_outside_a_part_that_stays_is_not_merged():
    """An outer scale acts on what the gated LoRA within gives, so it is no factor of the weight alone."""
    parts = [
        LoraConfig(r=4, target_modules=["v_proj"], use_gating=True),
        IA3Config(target_modules=["v_proj", "q_proj"], feedforward_modules=[]),
    ]
    model = adapted("llama", UnionConfig(parts))
    wanted = logits(model, "llama")
    model.merge_adapter()
    assert {path.rpartition(".")[2] for path, layer in layers_of(model) if layer.merged} == {"q_proj"}
    gives(logits(model, "llama"), wanted)


def test_a_mixed_model_holds_unions_too(tmp_path):
    model = get_peft_model(build("llama"), PARTS["lora"](), "lora", mixed=True)
    assert type(model) is PeftMixedModel
    model.add_adapter("union", union("bottleneck", "prefix"))
    stir(model, "union")
    model.set_adapter(["lora", "union"])
    both = logits(model, "llama")
    model.save_pretrained(tmp_path)
    again = PeftMixedModel.from_pretrained(build("llama"), tmp_path / "lora", "lora")
    again.load_adapter(tmp_path / "union", "union")
    again.set_adapter(["lora", "union"])
    gives(logits(again, "llama"), both)
    with pytest.raises(ValueError, match="cannot be mixed.*UnionConfig"):
        model.add_adapter("prompt", PARTS["prompt"]())


def test_it_is_put_into_a_plain_model():
    model = inject_adapter_in_model(union("lora", "vera", "bottleneck"), build("llama"))
    names = {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(any(word in key for key in names) for word in ("lora_A", "vera_lambda_b", "bottleneck_feedforward"))
    assert any("vera_A" in key for key, _ in model.named_buffers())
    with pytest.raises(ValueError, match="PrefixTuningConfig cannot be injected"):
        inject_adapter_in_model(union("lora", "prefix"), build("llama"))


def test_a_task_head_and_whole_modules(tmp_path):
    config = UnionConfig([LoraConfig(modules_to_save=["pooler"]), PARTS["bottleneck"]()], task_type="SEQ_CLS")
    model = get_peft_model(build("bert"), config)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in key for key in trained)
    assert any("pooler.modules_to_save" in key or "modules_to_save.default.dense" in key for key in trained)
    stir(model)
    model.save_pretrained(tmp_path)
    gives(logits(PeftModel.from_pretrained(build("bert"), tmp_path), "bert"), logits(model, "bert"))


def test_the_base_model_is_found_by_the_config(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, UniPELTConfig(task_type="CAUSAL_LM"))
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    gives(logits(again, "llama"), logits(model, "llama"))


def test_the_state_of_a_union():
    model = adapted("llama", union("lora", "bottleneck", "prefix"))
    status = model.get_model_status()
    assert (status.peft_types, status.active_adapters, status.enabled) == ({"default": "UNION"}, ["default"], True)
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    kinds = {layer.module_type for layer in model.get_layer_status()}
    assert kinds == {"lora.Linear", "bottleneck.BottleneckLayer"}
    assert model.get_prompt_embedding_to_save("default").shape == (3, 32)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("low", [False, True])
def test_loading_leaves_nothing_that_is_not_filled(low, tmp_path):
    model = adapted("llama", UniPELTConfig())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=low)
    assert not any(p.is_meta for p in again.parameters())
    gives(logits(again, "llama"), logits(model, "llama"))


def test_a_part_that_does_not_fit_leaves_the_model_as_it_was():
    model = build("llama")
    with refused(model, "UnionConfig, part 'ia3'.*no_such"):
        get_peft_model(model, UnionConfig([PARTS["lora"](), IA3Config(target_modules=["no_such"])]))
    gives(logits(model, "llama"), unadapted("llama"))
    model = adapted("llama", union("lora", "prefix"))
    wanted = logits(model, "llama")
    with refused(model, "part 'ia3'"):
        model.add_adapter("other", UnionConfig([PARTS["prompt"](), IA3Config(target_modules=["no_such"])]))
    assert list(model.peft_config) == ["default"] and list(model.base_model.prompt_encoder) == ["default"]
    gives(logits(model, "llama"), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: union("prefix", "prompt"), "prefix, prompt train virtual tokens; one part can"),
        (lambda: UnionConfig([LoraConfig(), LoraConfig(r=2)]), "two parts are LORA"),
        (lambda: UnionConfig([union("lora")]), "is a union itself: give its parts"),
        (lambda: UnionConfig([ShadowConfig()]), "'shadow' is SHADOW, which runs the model in a way of its own"),
        (lambda: UnionConfig([LoraConfig(task_type="SEQ_CLS")], task_type="CAUSAL_LM"), "task_type differs"),
        (lambda: UnionConfig(lora={"r": 2}), "has no field 'lora'.*given as its config"),
        (lambda: UnionConfig(LoraConfig()), "a list of configs"),
        (lambda: get_peft_model(build("llama"), UnionConfig()), "has no parts"),
    ],
)
def test_what_is_no_union_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_parts_have_names():
    config = UnionConfig(low_rank=LoraConfig(r=2), prefix=PARTS["prefix"](), task_type="CAUSAL_LM")
    assert list(config.parts) == ["low_rank", "prefix"] and config.parts["prefix"].task_type == "CAUSAL_LM"
    assert list(UnionConfig([LoraConfig(), PARTS["prefix"]()]).parts) == ["lora", "prefix_tuning"]
    assert copy.deepcopy(config) == config != UnionConfig(low_rank=LoraConfig(r=3), prefix=PARTS["prefix"]())


def test_a_config_is_read_as_it_was_written(tmp_path):
    for config in (MAMConfig(task_type="CAUSAL_LM"), UniPELTConfig(lora=LoraConfig(r=3, use_gating=True))):
        config.save_pretrained(tmp_path)
        again = PeftConfig.from_pretrained(tmp_path)
        assert type(again) is UnionConfig and again.parts == config.parts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"peft_type": "LORA", "r": "many"}], "LoraConfig: r='many'"),
        ([{"peft_type": "LORA", "name": 5}], "is no part"),
        ([{"r": 5}], "is no part: its peft_type"),
        ([{"peft_type": "UNION", "parts": []}], "is no part"),
        ([{"peft_type": "LORAX"}], "LORAX"),
        ([5], "should be a config, and is a int"),
        ("LORA", "a list of configs"),
        ({"a": {"peft_type": "LORA"}}, "should be a config"),
    ],
)
def test_a_damaged_config_is_refused(parts, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "UNION", "cls": 1, "parts": parts}))
    with pytest.raises(ValueError, match=message):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [name for name in MODELS if name in ENCODER_DECODERS or name == "llama"])
def test_copies_act_on_their_own(name, tmp_path):
    model = adapted(name, UniPELTConfig())
    wanted = logits(model, name)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        gives(logits(twin, name), wanted)
        stir(twin, seed=5)
        differs(logits(twin, name), wanted)
        gives(logits(model, name), wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("front", ["prefix", "prompt"])
def test_interventions_count_from_the_text_not_from_virtual_tokens(name, front):
    """The first and last positions of padded texts are edited, each once, whatever stands before them."""
    model = adapted(name, UnionConfig([PARTS[front](), ReftConfig(r=2, prefix_positions=1, suffix_positions=1)]))
    first = name == "bert"  # padded behind, or in front
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, slice(4, 6) if first else slice(2)] = 0
    given = {key: value for key, value in inputs(name).items() if key != "labels"}
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    edited: dict[str, Any] = {}
    for path, layer in layers_of(model):

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            inner, outer = edited.pop(path), first_output(output)
            edited[path] = (inner - outer).abs().amax(-1) > 1e-6

        layer.base_layer.register_forward_hook(lambda m, a, out, path=path: edited.update({path: first_output(out)}))
        layer.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model.eval()(**given, attention_mask=mask)
    assert len(edited) == sum(1 for _ in layers_of(model)) > 0
    for path, found in edited.items():
        decoder = "decoder" in path
        virtual = 2 if front == "prompt" and not decoder else 0
        text = torch.ones(4, 6, dtype=torch.long) if decoder else mask
        assert found.shape[1] == 6 + virtual
        for row in range(4):
            at = found[row].nonzero().flatten().tolist()
            columns = (text[row].nonzero().flatten() + virtual).tolist()
            wanted = [columns[0]] if decoder else [columns[0], columns[-1]]
            assert at == wanted, (path, row)


def mixable() -> list[Any]:
    """Methods of weights that can be beside others: a third of them, or all with LAWS=all in the environment."""
    found = [m for m in methods() if "[" not in m.name and m.config_cls.METHOD in PEFT_TYPE_TO_MIXED_MODEL_MAPPING]
    some = [m for m in found if os.environ.get("LAWS") == "all" or not crc32(m.name.encode()) % 3]
    return [pytest.param(method, id=method.name) for method in some if method.has("target_modules")]


@pytest.mark.parametrize("method", mixable())
def test_a_union_is_its_parts_active_together(method, tmp_path):
    """Law: under one name or two, with the same tensors, which files name alike; merged, saved and loaded."""
    targets = ["embed_tokens"] if method.name == "trainable_tokens" else ["q_proj", "v_proj"]

    def own() -> Any:
        return method.config_cls(**copy.deepcopy(method.given), target_modules=targets)

    torch.manual_seed(0)
    model = get_peft_model(build("llama"), UnionConfig([own(), PARTS["bottleneck"]()]))
    stir(model, size=0.2)
    held, wanted = get_peft_model_state_dict(model), logits(model, "llama")
    differs(wanted, unadapted("llama"))
    torch.manual_seed(0)
    apart = get_peft_model(build("llama"), own(), "one", mixed=True)
    apart.add_adapter("two", PARTS["bottleneck"]())
    for name in ("one", "two"):
        mine = get_peft_model_state_dict(apart, adapter_name=name).keys()
        set_peft_model_state_dict(apart, {key: held[key] for key in mine}, name)
    apart.set_adapter(["one", "two"])
    gives(logits(apart, "llama"), wanted)
    model.save_pretrained(tmp_path)
    gives(logits(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), wanted)
    with contextlib.suppress(ValueError):  # what no weight equals, which the laws of the methods look at
        model.merge_adapter()
    gives(logits(model, "llama"), wanted)


TERMS = {
    "adalora": lambda weight: AdaLoraConfig(total_step=9, orth_reg_weight=weight, target_modules=["q_proj"]),
    "mix_lora": lambda weight: MixLoraConfig(r=2, balance=weight, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", TERMS)
def test_what_a_method_adds_to_the_loss_it_adds_in_every_company(method):
    """Alone, in a model of several methods, as a part of a union and as a member of a composition."""

    def term(make: Any, active: Any = None) -> torch.Tensor:
        """The difference that the weight of the term makes, with the same tensors."""
        losses = []
        for weight in (0.0, 0.5):
            torch.manual_seed(0)
            model = make(TERMS[method](weight))
            draw = torch.Generator().manual_seed(5)
            for name, parameter in model.named_parameters():
                if ".default" in name and name.rpartition(".default")[0].endswith(("_A", "_B", "_E", "_router")):
                    parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / 2)
            if active is not None:
                model.set_adapter(active)
            losses.append(model.train()(**inputs("llama")).loss)
        return losses[1] - losses[0]

    def mixed(config: Any) -> PeftMixedModel:
        model = get_peft_model(build("llama"), config, mixed=True)
        model.add_adapter("other", PARTS["lora"]())
        return model

    wanted = term(lambda config: get_peft_model(build("llama"), config))
    assert wanted > 0.01
    ways = {
        "beside another": term(mixed, ["default", "other"]),
        "in a union": term(lambda config: get_peft_model(build("llama"), UnionConfig([config, PARTS["ia3"]()]))),
        "in a stack": term(mixed, Stack("default", "other")),
    }
    for way, found in ways.items():
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5, msg=lambda text, way=way: f"{way}: {text}")
