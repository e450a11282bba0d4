"""What a config means in a model: which modules, under which name, what is told of it, what takes another's place."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import laws
import pytest
import torch
from torch import nn
from toys import Mlp, tiny_llama

from peft import (
    AdaLoraConfig,
    AdamssConfig,
    BottleneckConfig,
    CPTConfig,
    DeftConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PsoftConfig,
    ReftConfig,
    ShiraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.config import PeftConfig
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.operations import adapters_of
from peft.core.model.walk import layers_of
from peft.helpers import rescale_adapter_scale
from peft.testing.cells import Method, base_weights, perturb
from peft.testing.places import Chain
from peft.utils.error import UndeclaredBiasError
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from peft.utils.warning import UnusedEntryWarning


X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.tensor([[3, 1, 4, 1, 5]])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PLAIN = [m for m in laws.methods() if "[" not in m.name and m.has("target_modules")]
every_method = pytest.mark.parametrize("method", PLAIN, ids=lambda m: m.name)


def base() -> Chain:
    torch.manual_seed(1)
    return Chain(nn.Linear(8, 8), nn.Linear(8, 8)).eval()


def config_of(method: Method, **fields) -> PeftConfig:
    return method.config_cls(**{"target_modules": ["layer"], **method.given, **fields})


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if isinstance(w.message, UnusedEntryWarning)]


def adapted(model: nn.Module) -> list[str]:
    return [layer.key for _, layer in layers_of(model)]


class Shared(nn.Module):
    """One layer called a, b and by.0; another called c and twice in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.by = nn.ModuleDict({"0": self.a})
        self.c = nn.Linear(8, 8)
        self.list = nn.ModuleList([self.c, self.c])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.by["0"](torch.tanh(self.b(torch.tanh(self.a(x)))))
        for layer in self.list:
            x = layer(torch.tanh(x))
        return self.c(x)


class TestSharedModules:
    @pytest.mark.parametrize("name", ["a", "b", "by.0", "list.1"])
    def test_a_parameter_of_one_by_any_of_its_names(self, name):
        config = LoraConfig(target_modules=[], target_parameters=[f"{name}.weight"], init_lora_weights=False)
        model = get_peft_model(Shared(), config).eval()
        expected = model(X)
        assert adapted(model) == ["c" if name == "list.1" else "a"]
        torch.testing.assert_close(model.merge_and_unload()(X), expected, **CLOSE)

    @every_method
    @pytest.mark.parametrize("targets", [["a"], ["b"], ["by.0", "list.1"]], ids=str)
    def test_a_module_of_several_names_is_adapted_once_and_acts_under_all(self, method, targets, tmp_path):
        plain = Shared().eval()(X)
        model = get_peft_model(Shared(), config_of(method, target_modules=targets)).eval()
        perturb(model, "default", 3)
        first = model.base_model.model.a
        assert isinstance(first, BaseTunerLayer)
        assert first is model.base_model.model.b is model.base_model.model.by["0"]
        expected = model(X).detach()
        reference = Shared().eval()  # the same adapter, folded by hand into every use
        get_peft_model(reference, config_of(method, target_modules=targets), "default")
        with model.disable_adapter():
            torch.testing.assert_close(model(X), plain)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Shared(), tmp_path)
        torch.testing.assert_close(again(X), expected, **CLOSE)
        unloaded = copy.deepcopy(model).unload()
        torch.testing.assert_close(unloaded(X), plain, **CLOSE)
        assert unloaded.a is unloaded.b is unloaded.by["0"]
        if any(layer.adapters["default"].unmergeable() for _, layer in layers_of(model)):
            return
        model.merge_adapter()
        torch.testing.assert_close(model(X), expected, **CLOSE)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), expected, **CLOSE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(X), expected, **CLOSE)
        assert merged.a is merged.b is merged.by["0"]
        assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())

    def test_deleting_takes_the_layer_away_everywhere(self):
        model = get_peft_model(Shared(), LoraConfig(target_modules=["b"]))
        model.add_adapter("other", LoraConfig(target_modules=["c"]))
        model.delete_adapter("default")
        root = model.base_model.model
        assert type(root.a) is nn.Linear
        assert root.a is root.b is root.by["0"]
        assert root.c is root.list[0] is root.list[1]

    @pytest.mark.parametrize("whole", ["a", "b", "by.0"])
    def test_trained_whole(self, whole, tmp_path):
        model = get_peft_model(Shared(), LoraConfig(target_modules=["c"], modules_to_save=[whole])).eval()
        root = model.base_model.model
        assert isinstance(root.a, ModulesToSaveWrapper)
        assert root.a is root.b is root.by["0"]
        root.a.modules_to_save["default"].weight.data.mul_(2)
        expected = model(X).detach()
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(Shared(), tmp_path)(X), expected, **CLOSE)
        torch.testing.assert_close(model.merge_and_unload()(X), expected, **CLOSE)

    def test_injection_by_the_other_name(self):
        state = {
            f"b.{k}": v for k, v in {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}.items()
        }
        model = inject_adapter_in_model(LoraConfig(r=2), Shared(), state_dict=state)
        assert adapted(model) == ["a"]


PATTERNS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern", "block_size_pattern", "lambda_pattern")
PATTERN_FIELDS = [
    (m, f.name) for m in PLAIN for f in dataclasses.fields(m.config_cls)
    if f.name in PATTERNS and m.name != "adalora"
]  # fmt: skip


class TestUnusedEntries:
    @pytest.mark.parametrize(("method", "field"), PATTERN_FIELDS, ids=lambda c: getattr(c, "name", c))
    def test_a_pattern_that_matches_nothing(self, method, field):
        config = config_of(method, **{field: {"blocks.0.layer": 2, "blocks.0.layr": 2, "^layer": 2}})
        with pytest.warns(UnusedEntryWarning) as caught:
            get_peft_model(base(), config)
        assert len(told(caught)) == 1
        message = told(caught)[0]
        assert method.config_cls.__name__ in message
        assert f"{field}: 'blocks.0.layr' (nearest: 'blocks.0.layer'), '^layer'" in message

    def test_a_pattern_hidden_by_an_earlier_one(self):
        with pytest.warns(UnusedEntryWarning, match=r"rank_pattern: 'blocks.0.layer'"):
            get_peft_model(
                base(), LoraConfig(target_modules=["layer"], rank_pattern={"layer": 2, "blocks.0.layer": 3})
            )

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"target_modules": ["q_proj", "q_prj"]}, "target_modules: 'q_prj' (nearest: 'q_proj')"),
            ({"exclude_modules": ["k_prj"]}, "exclude_modules: 'k_prj' (nearest: 'k_proj')"),
            ({"exclude_modules": r".*\.7\..*"}, r"exclude_modules: '.*\\.7\\..*'"),
            ({"layers_to_transform": [0, 5]}, "layers_to_transform: 5"),
            ({"layers_to_transform": [0], "layers_pattern": ["layers", "h"]}, "layers_pattern: 'h'"),
            (
                {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
                "layers_to_transform: 1",
            ),
            (
                {"use_bdlora": {"target_modules_bd_b": ["q_proj", "q_prj"], "nblocks": 2}},
                "use_bdlora.target_modules_bd_b: 'q_prj' (nearest: 'q_proj')",
            ),
            (
                {"target_parameters": ["up_proj.wight"]},
                "target_parameters: 'up_proj.wight' (nearest: 'up_proj.weight')",
            ),
            ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' (nearest: 'lm_head')"),
            (
                {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "up_proj"]},
                "'up_proj' (there, but no such thing as this field names, or left out",
            ),
            ({"ensure_weight_tying": True}, "ensure_weight_tying=True does nothing"),
            ({"bias": "all"}, "bias='all' does nothing"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out=True does nothing"),
            ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "ensure_weight_tying=True does nothing"),
        ],
        ids=str,
    )
    def test_any_field(self, fields, says):
        config = LoraConfig(**{"target_modules": ["q_proj"], **fields})
        with pytest.warns(UnusedEntryWarning) as caught:
            get_peft_model(tiny_llama(), config)
        assert len(told(caught)) == 1
        assert says in told(caught)[0]

    def test_several_mistakes_are_one_warning(self):
        config = LoraConfig(target_modules=["q_proj", "x"], rank_pattern={"y": 2}, modules_to_save=["z"])
        with pytest.warns(UnusedEntryWarning) as caught:
            get_peft_model(tiny_llama(), config)
        assert len(told(caught)) == 1
        assert all(entry in told(caught)[0] for entry in ("'x'", "'y'", "'z'"))

    @pytest.mark.parametrize(
        "fields",
        [
            {"exclude_modules": ["lm_head"]},
            {"layers_to_transform": 1, "layers_pattern": "layers"},
            {"layers_to_transform": []},
            {"rank_pattern": {r"^model\.layers\.0\..*": 2}, "alpha_pattern": {".*v_proj": 2, "q_proj": 3}},
            {"target_parameters": ["up_proj.weight"]},
            {"task_type": "SEQ_CLS"},
        ],
        ids=str,
    )
    def test_nothing_is_said_of_what_happens(self, fields):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnusedEntryWarning)
            get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], **fields))

    def test_patterns_of_an_adapter_that_is_swapped_in(self, tmp_path):
        config = LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True, bias="all")
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            model = get_peft_model(tiny_llama(), config)
        model.save_pretrained(tmp_path)
        other = dataclasses.replace(PeftConfig.from_pretrained(tmp_path), rank_pattern={"q_prj": 2})
        with pytest.warns(UnusedEntryWarning, match="q_proj") as caught:
            hotswap_adapter_from_state_dict(model, load_peft_weights(tmp_path), "default", other)
        assert told(caught) == [m for m in told(caught) if "rank_pattern: 'q_prj'" in m and "bias" not in m]
        assert len(told(caught)) == 1

    def test_prompts_that_train_modules_whole(self):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["lm_haed"])
        with pytest.warns(UnusedEntryWarning, match="'lm_haed' \\(nearest: 'lm_head'\\)"):
            get_peft_model(tiny_llama(), config)

    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    @pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
    def test_half_of_a_tie(self, target, field):
        fields = {"target_modules": ["q_proj"], field: ["q_proj", target] if field == "target_modules" else [target]}
        with pytest.warns(UnusedEntryWarning, match="shares its weight with .* ensure_weight_tying=True"):
            get_peft_model(tiny_llama(tie=True), LoraConfig(**fields))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            get_peft_model(tiny_llama(tie=True), LoraConfig(**fields, ensure_weight_tying=True))

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: AdaLoraConfig(total_step=9, r=10), "r=10 does nothing: the ranks are init_r"),
            (lambda: PsoftConfig(num_cayley_neumann_terms=9), "counts only with use_cayley_neumann"),
            (lambda: PsoftConfig(cayley_neumann_eps=0.5), "counts only with use_cayley_neumann"),
            (lambda: LoraConfig(loftq_config={"loftq_bits": 8}), "counts only with init_lora_weights='loftq'"),
            (lambda: LoraConfig(megatron_core="core"), "counts only with megatron_config"),
            (lambda: OFTConfig(eps=0.1), "counts only with coft"),
            (lambda: LoraConfig(lora_alpha=0), "lora_alpha=0 does nothing: with it the adapter changes nothing"),
            (lambda: VeraConfig(d_initial=0.0), "d_initial=0.0 does nothing: with it the adapter changes nothing"),
            (lambda: VeraConfig(d_initial=0.0, init_weights=False), "counts only with init_weights"),
            (lambda: PromptTuningConfig(prompt_tuning_init_text="Say"), "counts only with prompt_tuning_init='TEXT'"),
            (lambda: PromptEncoderConfig(encoder_num_layers=3), "encoder_reparameterization_type='LSTM'"),
            (lambda: PsoftConfig(random_seed=1), "counts only with psoft_svd='lowrank'"),
            (lambda: AdamssConfig(mask_interval=9), "counts only with use_asa"),
            (lambda: AdamssConfig(svd_threshold=0.2), "counts only with use_dynamic_rank"),
            (lambda: DeftConfig(init_scale=2.0), "counts only with init_weights=False"),
            (lambda: TinyLoraConfig(init_v_bound=0.1), "counts only with init_weights='uniform' or False"),
            (lambda: ReftConfig(tied_weights=True), "counts only with suffix_positions"),
            (lambda: CPTConfig(cpt_token_ids=[1], opt_loss_decay_factor=0.5), "opt_weighted_loss_type='decay'"),
            (
                lambda: CPTConfig(cpt_token_ids=[1, 2], num_virtual_tokens=5),
                "num_virtual_tokens=5 does nothing: it is 2",
            ),
            (lambda: PromptTuningConfig(tokenizer_name_or_path="a"), "counts only with prompt_tuning_init='TEXT'"),
            (lambda: MultitaskPromptTuningConfig(prompt_tuning_init_task=1), "prompt_tuning_init='EXACT_SOURCE_TASK'"),
            (lambda: PrefixTuningConfig(encoder_hidden_size=7), "counts only with prefix_projection"),
            (lambda: PrefixTuningConfig(shared_gating=False), "counts only with use_gating"),
            (lambda: LoraConfig(use_gating=True, lora_alpha=9), "use_gating=True has a gate in the place"),
            (lambda: BottleneckConfig(adapter_residual_before_ln=True), "counts only with ln_after"),
            (lambda: BottleneckConfig(preset="parallel", original_ln_after=False), "only with is_parallel=False"),
            (lambda: BottleneckConfig(preset="houlsby", residual_before_ln=False), "only with original_ln_before"),
        ],
    )
    def test_fields_that_need_another(self, make, says):
        with pytest.warns(UserWarning, match=says) as caught:
            make()
        assert len(caught) == 1

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (
                LoHaConfig(target_modules=["q_proj"], use_effective_conv2d=True),
                "use_effective_conv2d=True does nothing",
            ),
            (LoKrConfig(target_modules=["q_proj"], decompose_both=True), "decompose_both=True does nothing"),
            (
                AdaLoraConfig(target_modules=["q_proj"], total_step=9, rank_pattern={"q_prj": 2}),
                "rank_pattern: 'q_prj'",
            ),
            (BottleneckConfig(cross_adapter=True), "no block that gets adapters attends to an encoder"),
            (BottleneckConfig(leave_out=[0, 77]), "leave_out: 77"),
            (BottleneckConfig(reduction_factor={"default": 4, "77": 2}), "reduction_factor: '77'"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_fields_that_count_nowhere(self, config, says):
        with pytest.warns(UnusedEntryWarning, match=says) as caught:
            get_peft_model(tiny_llama(), config)
        assert len(told(caught)) == 1

    @pytest.mark.parametrize("cls", [LoHaConfig, LoKrConfig])
    def test_fields_that_count_somewhere(self, cls):
        more = {"decompose_both": True} if cls is LoKrConfig else {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = Chain(nn.Conv2d(32, 32, 3), nn.Linear(8, 8))
            get_peft_model(model, cls(r=1, target_modules=["layer"], use_effective_conv2d=True, **more))

    @pytest.mark.parametrize("cls", sorted(set(PEFT_TYPE_TO_CONFIG_MAPPING.values()), key=lambda c: c.__name__))
    def test_fields_that_need_another_name_one_that_there_is(self, cls):
        names = {f.name for f in dataclasses.fields(cls)}
        needs = [f.metadata["needs"] for f in dataclasses.fields(cls) if "needs" in f.metadata]
        assert {need if isinstance(need, str) else need[0] for need in needs} <= names

    def test_a_state_dict_against_the_config(self):
        state = get_peft_model_state_dict(get_peft_model(base(), LoraConfig(target_modules=["layer"])))
        config = LoraConfig(target_modules=["layer"], exclude_modules=["blocks.0.layer"])
        with pytest.warns(UnusedEntryWarning, match="does not mean: blocks.0.layer"):
            model = inject_adapter_in_model(config, base(), state_dict=state)
        assert adapted(model) == ["blocks.0.layer", "blocks.1.layer"]
        del (
            state["base_model.model.blocks.0.layer.lora_A.weight"],
            state["base_model.model.blocks.0.layer.lora_B.weight"],
        )
        with pytest.warns(UnusedEntryWarning, match="no tensors for modules that the config means: blocks.0.layer"):
            inject_adapter_in_model(LoraConfig(target_modules=["layer"]), base(), state_dict=state)

    def test_misspelt_keywords(self, tmp_path):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"]))
        with pytest.warns(UserWarning, match="save_pretrained has no keyword 'selected_adapter'.*'selected_adapters'"):
            model.save_pretrained(tmp_path, selected_adapter=["default"])
        with pytest.warns(UserWarning, match="load_adapter has no keyword 'is_trainble'.* 'is_trainable'"):
            model.load_adapter(tmp_path, "other", is_trainble=True)
        with pytest.warns(UserWarning, match="from_pretrained has no keyword 'ignore_mismatched_size'"):
            PeftModel.from_pretrained(base(), tmp_path, ignore_mismatched_size=True)
        with warnings.catch_warnings():  # what clients pass, and no mistake
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="5GB", push_to_hub=False)
            PeftModel.from_pretrained(base(), tmp_path, torch_dtype="auto", device_map=None, use_safetensors=True)


class Ends(nn.Module):
    """A module at the root whose name ends that of others."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"out": nn.Linear(8, 8), "pre_out": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner["out"](self.inner["pre_out"](x)))


class TestStateDicts:
    @pytest.mark.parametrize("names", [["out"], ["inner.out"], ["out", "inner.pre_out"], ["inner.pre_out"]], ids=str)
    @pytest.mark.parametrize("low", [False, True])
    def test_exactly_the_modules_that_the_file_names(self, names, low, tmp_path):
        parts = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
        state = {f"{name}.{part}": tensor for name in names for part, tensor in parts.items()}
        config = LoraConfig(r=2, target_modules=names)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = inject_adapter_in_model(config, Ends(), state_dict=state, low_cpu_mem_usage=low)
        assert sorted(adapted(model)) == sorted(names)
        config.save_pretrained(tmp_path)
        again = inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path), Ends())
        assert sorted(adapted(again)) == sorted(names)


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "pattern", "wanted"), [([], None, 4), ([1], "layers", 2), ([0], ["layers"], 2)]
    )
    def test_lists_in_lists_count_by_the_outer_one(self, layers, pattern, wanted):
        def inner() -> nn.ModuleDict:
            return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(2, 2)}) for _ in range(2))})

        net = nn.ModuleDict({"enc": nn.ModuleDict({"layers": nn.ModuleList([inner(), inner()])})})
        config = LoraConfig(target_modules=["lin"], layers_to_transform=layers, layers_pattern=pattern)
        found = adapted(get_peft_model(net, config))
        assert len(found) == wanted
        if layers:
            assert all(key.startswith(f"enc.layers.{layers[0]}.") for key in found)


class TestModulesToSave:
    @pytest.mark.parametrize(
        ("entry", "found"), [("out", ["out", "inner.out", "inner.pre_out"]), ("pre_out", ["inner.pre_out"])]
    )
    def test_an_entry_means_the_end_of_a_name(self, entry, found):
        net = nn.ModuleDict({"body": nn.Linear(8, 8), "ends": Ends()})
        model = get_peft_model(net, LoraConfig(target_modules=["body"], modules_to_save=[entry]))
        whole = [n for n, m in model.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        assert whole == [f"ends.{name}" for name in found]

    @pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
    def test_containers_are_refused_by_name(self, container):
        net = Mlp()
        inside = [nn.Linear(4, 4)]
        net.heads = container(inside if container is nn.ModuleList else {"0": inside[0]})
        before = [name for name, _ in net.named_modules()]
        with pytest.raises(TypeError, match="'heads'.*Name its entries: heads.0"):
            get_peft_model(net, LoraConfig(target_modules=["lin0"], modules_to_save=["heads"]))
        assert [name for name, _ in net.named_modules()] == before

    def test_a_sequential_is_indexed(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(4, 4)
                self.heads = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                assert len(self.heads) == 2
                return self.heads[0](self.lin(x)) + sum(part(x) for part in self.heads)

        model = get_peft_model(Net(), LoraConfig(target_modules=["lin"], modules_to_save=["heads"]))
        own = model.base_model.model.heads.modules_to_save["default"]
        model(torch.ones(2, 4)).sum().backward()
        assert own[0].weight.grad is not None
        with pytest.raises(ValueError, match="name the parts in modules_to_save"):
            model(torch.ones(2, 4), adapter_names=["default", "__base__"])

    def test_with_trained_tokens_on_the_same_embedding(self):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], trainable_token_indices=[1])
        with pytest.raises(
            ValueError, match="'model.embed_tokens' is named in modules_to_save.*trainable_token_indices"
        ):
            get_peft_model(tiny_llama(), config)

    def test_active_adapters_lists_what_a_wrapper_holds(self):
        model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"]))
        model.add_adapter("headed", LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
        head = model.base_model.model.lin1
        assert head.active_adapters == []
        model.set_adapter("headed")
        assert head.active_adapters == ["headed"]


class TestTheNameAnew:
    @every_method
    def test_loaded_onto_the_base_that_was_trained(self, method, tmp_path):
        net = base()
        trained = get_peft_model(net, config_of(method)).eval()
        perturb(trained, "default", 5)
        expected = trained(X).detach()
        trained.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="has an adapter called 'default'") as caught:
            again = PeftModel.from_pretrained(net, tmp_path)
        assert sum("has an adapter called" in str(w.message) for w in caught) == 1
        torch.testing.assert_close(again(X), expected, **CLOSE)
        with again.disable_adapter():
            torch.testing.assert_close(again(X), base()(X))

    def test_a_cell_run_twice(self):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"], init_lora_weights=False))
        with pytest.warns(UserWarning, match="has an adapter called 'default'") as caught:
            model = get_peft_model(model, LoraConfig(target_modules=["blocks.0.layer"], r=2))
        assert len(caught) == 1
        assert isinstance(model.get_base_model(), Chain)
        assert adapted(model.get_base_model()) == ["blocks.0.layer"]
        assert model.get_base_model().blocks[0]["layer"].r == {"default": 2}
        torch.testing.assert_close(model(X), base()(X))

    @pytest.mark.parametrize("inner", ["the PeftModel", "its tuner"])
    def test_injection_into_a_managed_model(self, inner):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"]))
        at = model if inner == "the PeftModel" else model.base_model
        with pytest.warns(UserWarning, match="has an adapter called 'default'"):
            assert inject_adapter_in_model(LoraConfig(target_modules=["layer"], r=3), at) is at
        inject_adapter_in_model(LoraConfig(target_modules=["layer"], r=5), at, "other")
        assert [model.peft_config[name].r for name in ("default", "other")] == [3, 5]
        assert model.active_adapters == ["other"]

    def test_add_adapter_alone_refuses(self):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"]))
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter("default", LoraConfig(target_modules=["layer"]))

    def test_merged_and_of_another_method(self):
        net = base()
        model = get_peft_model(net, LoraConfig(target_modules=["layer"], init_lora_weights=False))
        model.merge_adapter()
        with pytest.warns(UserWarning, match="has an adapter called 'default'"):
            other = get_peft_model(net, config_of(next(m for m in PLAIN if m.name == "ia3"), feedforward_modules=[]))
        torch.testing.assert_close(other(X), base()(X), **CLOSE)

    @every_method
    def test_one_that_fails_leaves_the_old_one(self, method, monkeypatch):
        net = base()
        fields = {"bias": "all"} if method.has("bias") else {}
        model = get_peft_model(net, config_of(method, **fields)).eval()
        perturb(model, "default", 7)
        expected, weights, names = model(X).detach(), base_weights(model), [n for n, _ in net.named_modules()]

        def fail(*args: object) -> None:
            raise KeyboardInterrupt  # a user who does not want to wait; any error is no other

        monkeypatch.setattr("peft.core.model.tuner.add_auxiliary", fail)
        with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
            warnings.simplefilter("ignore")
            get_peft_model(net, LoraConfig(target_modules=["blocks.0.layer"], bias="all"))
        with pytest.raises(KeyboardInterrupt):
            model.add_adapter("second", config_of(method, **fields))
        assert [n for n, _ in net.named_modules()] == names and list(model.peft_config) == ["default"]
        torch.testing.assert_close(model(X), expected)
        for name, weight in base_weights(model).items():
            torch.testing.assert_close(weight, weights[name])
        fresh = base()
        with pytest.raises(KeyboardInterrupt):
            get_peft_model(fresh, config_of(method, **fields))
        assert [n for n, _ in fresh.named_modules()] == [n for n, _ in base().named_modules()]
        assert not fresh._forward_pre_hooks and "_peft_record" not in fresh.__dict__

    @pytest.mark.parametrize(
        "fields", [{}, {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2], [0, 2]]}], ids=str
    )
    @pytest.mark.parametrize("way", ["adapter", "prompt", "file", "file of another name"])
    def test_one_that_fails_leaves_what_the_old_one_stood_on(self, fields, way, tmp_path):
        net, ids = tiny_llama(), torch.arange(6).view(2, 3)
        start = net(ids).logits.detach()
        fields = {"init_lora_weights": False, **fields}
        model = get_peft_model(net, LoraConfig(target_modules=["q_proj"], **fields)).eval()
        rows = ["default", "default" if "pissa" in fields.values() else "__base__"]
        alone, mixed = model(ids).logits.detach(), model(ids, adapter_names=rows).logits.detach()
        trains = [p.requires_grad for p in model.parameters()]
        config = LoraConfig(target_modules=["nothing"])
        if way == "prompt":
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["layers"])
        if way.startswith("file"):
            get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=3)).save_pretrained(tmp_path)
            LoraConfig(target_modules=["q_proj"], r=2).save_pretrained(tmp_path)  # beside weights of another rank
        with pytest.warns(UserWarning, match="in it"), pytest.raises((ValueError, TypeError)):
            if way.startswith("file"):
                PeftModel.from_pretrained(net, tmp_path, "other" if "other" in way else "default")
            else:
                get_peft_model(net, config)
        assert [p.requires_grad for p in model.parameters()] == trains
        assert torch.equal(model(ids).logits, alone)
        assert torch.equal(model(ids, adapter_names=rows).logits, mixed)
        plain = model.unload()
        torch.testing.assert_close(plain(ids).logits, start, **CLOSE)
        assert not plain._forward_pre_hooks and plain.config.num_hidden_layers == len(plain.model.layers) == 2

    def test_a_prompt_takes_the_name(self):
        net, ids = tiny_llama(), torch.arange(6).view(2, 3)
        start = net(ids).logits.detach()
        get_peft_model(net, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        with pytest.warns(UserWarning, match="has an adapter called 'default'"):
            model = get_peft_model(net, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        assert not adapted(net)
        torch.testing.assert_close(model.unload()(ids).logits, start, **CLOSE)

    def test_layers_replicated_otherwise(self):
        net = tiny_llama()
        for layer_map, depth in (([[0, 2], [0, 2]], 4), ([[0, 2], [1, 2]], 3), (None, 2)):
            config = LoraConfig(target_modules=["q_proj"], layer_replication=layer_map)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(net, config)
            assert net.config.num_hidden_layers == len(net.model.layers) == len(list(layers_of(model))) == depth


class TestMerged:
    @every_method
    def test_one_that_is_merged_is_not_deleted(self, method):
        model = get_peft_model(base(), config_of(method), "first").eval()
        model.add_adapter("second", config_of(method))
        model.set_adapter("second")
        perturb(model, "second", 9)
        if any(layer.adapters["second"].unmergeable() for _, layer in layers_of(model)):
            pytest.skip("cannot be merged")
        alone = model(X).detach()
        model.merge_adapter()
        merged = model(X).detach()
        for delete in (model.delete_adapter, model.base_model.delete_adapter):
            with pytest.raises(ValueError, match="Unmerge first"):
                delete("second")
        assert list(model.peft_config) == adapters_of(model.get_base_model()) == ["first", "second"]
        assert torch.equal(model(X), merged)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), alone, **CLOSE)
        with pytest.warns(UserWarning, match="was active"):
            model.delete_adapter("second")
        assert adapters_of(model.get_base_model()) == ["first"]

    @pytest.mark.parametrize(
        "config",
        [
            lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5]),
            lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 5]),
            lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            lambda: LoraConfig(target_modules=["q_proj", "o_proj"], bias="all"),
        ],
    )
    def test_those_that_cannot_be_active_together_are_not_merged_together(self, config):
        model = get_peft_model(tiny_llama(), config())
        model.add_adapter("other", config())
        before = base_weights(model)
        with pytest.raises(ValueError, match="default.*other"):
            model.merge_adapter(["default", "other"])
        with pytest.raises(ValueError, match="default.*other"):
            model.merge_and_unload(adapter_names=["default", "other"])
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match="default.*other"):
            model.merge_adapter(["other"])
        model.unmerge_adapter()
        for name, weight in base_weights(model).items():
            torch.testing.assert_close(weight, before[name])


class TestStart:
    @every_method
    def test_an_adapter_that_starts_at_random_can_train(self, method):
        flags = {f.name: False for f in dataclasses.fields(method.config_cls) if f.name.startswith("init_")
                 and isinstance(f.default, bool)}  # fmt: skip
        model = get_peft_model(base(), config_of(method, **flags))
        model(X).square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert any(g.abs().max() > 0 for g in gradients)

    def test_injection_keeps_sixteen_bits_unless_asked(self):
        config = LoraConfig(target_modules=["layer"])
        plain = inject_adapter_in_model(config, base().to(torch.bfloat16))
        managed = get_peft_model(base().to(torch.bfloat16), config)
        assert {p.dtype for n, p in plain.named_parameters() if "lora_" in n} == {torch.bfloat16}
        assert {p.dtype for n, p in managed.named_parameters() if "lora_" in n} == {torch.float32}

    def test_layers_come_out_of_a_context_as_they_were(self):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"]))
        layers = [layer for _, layer in layers_of(model)]
        layers[0].enable_adapters(False)
        with pytest.warns(UserWarning, match="some off"), model.disable_adapter():
            assert all(layer.disable_adapters for layer in layers)
        assert [layer.disable_adapters for layer in layers] == [True, False]


class TestBiasesThatMergingMakes:
    """LoRA's B with a bias, on layers without: the merged model computes the same once it is saved and loaded."""

    def adapted(self, targets: list[str], model: nn.Module | None = None) -> PeftModel:
        net = tiny_llama() if model is None else model
        adapter = get_peft_model(
            net, LoraConfig(target_modules=targets, lora_bias=True, init_lora_weights=False)
        ).eval()
        for _, layer in layers_of(adapter.get_base_model()):
            layer.lora_B["default"].bias.data.normal_()
        return adapter

    @pytest.mark.parametrize(
        ("targets", "switches"),
        [
            (["q_proj"], {"attention_bias"}),
            (["up_proj"], {"mlp_bias"}),
            (["o_proj", "gate_proj"], {"attention_bias", "mlp_bias"}),
        ],
        ids=["attention", "mlp", "both"],  # the order in which a set is printed differs between processes
    )
    def test_the_config_declares_it(self, targets, switches, tmp_path):
        model = self.adapted(targets)
        expected = model(IDS).logits.detach()
        merged = model.merge_and_unload()
        assert {name for name in ("attention_bias", "mlp_bias") if getattr(merged.config, name)} == switches
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, expected, **CLOSE)

    def test_one_that_no_config_declares(self):
        model = self.adapted(["lm_head", "q_proj"])
        before = base_weights(model)
        with pytest.raises(
            UndeclaredBiasError, match="lm_head a bias .* LlamaForCausalLM does not have.*undeclared_biases=True"
        ):
            model.merge_and_unload()
        for name, weight in base_weights(model).items():
            assert torch.equal(weight, before[name])
        expected = model(IDS).logits.detach()
        torch.testing.assert_close(model.merge_and_unload(undeclared_biases=True)(IDS).logits, expected, **CLOSE)

    def test_a_model_of_ones_own(self):
        model = self.adapted(["layer"], Chain(nn.Linear(8, 8, bias=False)).eval())
        expected = model(X).detach()
        torch.testing.assert_close(model.merge_and_unload()(X), expected, **CLOSE)


class TestValues:
    """Values out of range are refused; exceptions are of the types that scripts catch."""

    @pytest.mark.parametrize(
        ("make", "error"),
        [
            (lambda: AdaLoraConfig(total_step=9, orth_reg_weight=-0.5), ValueError),
            (lambda: PsoftConfig(use_cayley_neumann=True, cayley_neumann_eps=0.0), ValueError),
            (lambda: UniLoraConfig(init_theta_d_bound=0), ValueError),
            (lambda: LoraConfig(target_parameters="experts.weight"), TypeError),
            (lambda: LoraConfig(target_parameters=[1]), TypeError),
            (lambda: LoraConfig(target_modules=5), TypeError),
            (lambda: LoraConfig(rank_pattern=[5]), TypeError),
        ],
    )
    def test_refused(self, make, error):
        with pytest.raises(error) as caught:
            make()
        assert isinstance(caught.value, ValueError)

    def test_prompts_have_no_layers(self):
        model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        for ask in (model.get_layer_status, model.get_model_status, lambda: convert_to_lora(model, rank=2)):
            for error in (TypeError, ValueError):
                with pytest.raises(error):
                    ask()

    def test_adamss_starts_at_random(self):
        config = AdamssConfig(target_modules=["layer"], r=4, num_subspaces=2, init_weights=False)
        assert not torch.equal(get_peft_model(base(), config)(X), base()(X))

    def test_osf_without_targets_takes_all_linear_layers(self):
        assert get_peft_model(Mlp(), OSFConfig(effective_rank=2)).peft_config["default"].target_modules == {
            "lin0",
            "lin1",
        }

    def test_shira_with_a_mask_of_ones_own(self, tmp_path):
        config = ShiraConfig(r=1, mask_type="in my own way", target_modules=["layer"], init_weights=False)
        with pytest.raises(ValueError, match="set config.mask_fn"):
            get_peft_model(base(), config)
        config.mask_fn = lambda layer, r, **kwargs: (torch.arange(64) < 16 * r).view(8, 8).float()
        model = get_peft_model(base(), config).eval()
        expected = model(X).detach()
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), expected)

    def test_a_lora_made_a_lora(self):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"], init_lora_weights=False))
        with pytest.warns(UserWarning, match="a LoRA already"):
            convert_to_lora(model, rank=2)

    def test_a_remembered_scale_stays(self):
        model = get_peft_model(base(), LoraConfig(target_modules=["layer"]))
        layer = model.base_model.model.blocks[0]["layer"]
        before = layer.scaling
        with rescale_adapter_scale(model, 0.5):
            assert (before, layer.scaling) == ({"default": 1.0}, {"default": 0.5})
        assert layer.scaling is before

    def test_what_is_targeted(self):
        model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin1"], target_parameters=["lin0.weight"]))
        assert model.targeted_module_names == ["lin1"]
        assert model.targeted_parameter_names == ["lin0.weight"]

    def test_rows_of_a_module_that_gives_a_tuple(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin, self.gru = nn.Linear(4, 4), nn.GRU(4, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.gru(self.lin(x))[0]

        config = LoraConfig(target_modules=["lin"], modules_to_save=["gru"])
        model = get_peft_model(Net(), config, "first").eval()
        model.add_adapter("second", config)
        with pytest.raises(TypeError, match="GRU gives no single tensor"):
            model(torch.ones(2, 4), adapter_names=["first", "second"])
