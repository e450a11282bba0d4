"""Extraction from full models, other ranks, negation, serving checks, LoRAs by energy, merging of many."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_formats import IDS, loaded, lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Mlp, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from peft import (
    AdaLoraConfig,
    DyLoraConfig,
    GraloraConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraXsConfig,
    MixLoraConfig,
    PeftModel,
    PolyConfig,
    get_peft_model,
    save_as_lora,
)
from peft.convert import (
    check_serving,
    convert_adapter,
    extract_adapter,
    negate_adapter,
    rebase_adapter,
    resize_adapter,
)
from peft.convert.held import Held
from peft.convert.products import METHODS, WHY_NOT, products_of
from peft.kernels.decompositions import leading_svd, randomized_svd, shared_ranks
from peft.testing.cells import perturb
from peft.tuners.lora.config import KasaConfig
from peft.utils import merge_utils
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


def tuned_by_lora(tmp_path: Path, r: int = 3) -> tuple[nn.Module, nn.Module]:
    """A base model and one fine-tuned by a LoRA of rank r, and in a norm; both are saved, the base in shards."""
    base, model = lora(tmp_path / "lora", r=r, target_modules=["q_proj", "down_proj", "embed_tokens"])
    full = model.merge_and_unload()
    with torch.no_grad():
        full.model.norm.weight.mul_(1.5)
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    full.save_pretrained(tmp_path / "tuned")
    assert len([*(tmp_path / "base").glob("*.safetensors")]) > 2
    return base, full


def test_extraction_gives_back_the_update_of_a_lora(tmp_path: Path) -> None:
    base, full = tuned_by_lora(tmp_path)
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    assert found.saved == ["model.norm"] and len(found.ranks) == 5 and not found.biases
    assert max(found.errors.values()) < 1e-5 and found.kept == pytest.approx(1)
    back = loaded(base, tmp_path / "out")
    for name in found.ranks:
        layer = back.base_model.model.get_submodule(name)
        change = full.get_submodule(name).weight - base.get_submodule(name).weight
        change = change.T if isinstance(layer.get_base_layer(), nn.Embedding) else change
        made = layer.adapters["default"].delta_weight()
        assert (made - change).norm() < 1e-5 * max(1.0, change.norm())
    torch.testing.assert_close(back(IDS).logits, full(IDS).logits, atol=1e-5, rtol=1e-4)


def test_extraction_keeps_the_energy_that_it_is_asked_for(tmp_path: Path) -> None:
    base, full = tuned_by_lora(tmp_path)
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", energy=0.9)
    changes = {n: full.get_submodule(n).weight - base.get_submodule(n).weight for n in found.ranks}
    values = {name: torch.linalg.svdvals(change.detach().double()) for name, change in changes.items()}
    left = sum(float(values[name][:r].square().sum()) for name, r in found.ranks.items())
    total = sum(float(value.square().sum()) for value in values.values())
    assert left / total >= 0.9 and left / total == pytest.approx(found.kept, abs=1e-5)
    for name, error in found.errors.items():
        rest = values[name][found.ranks[name] :].norm() / values[name].norm()
        assert error == pytest.approx(float(rest), abs=1e-5)


def test_extraction_of_transposed_weights_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    full = copy.deepcopy(base)
    with torch.no_grad():
        full.transformer.h[0].attn.c_attn.weight += torch.outer(torch.randn(8), torch.randn(24))
        full.transformer.h[0].attn.c_attn.bias += torch.randn(24)
        full.transformer.h[0].mlp.c_proj.bias += torch.randn(8)
        full.transformer.wte.weight += torch.outer(torch.randn(20), torch.randn(8))  # tied: the head changes, too
    base.save_pretrained(tmp_path / "base")
    full.save_pretrained(tmp_path / "tuned")
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
    assert found.biases and set(found.ranks) == {"transformer.h.0.attn.c_attn", "transformer.wte"}
    torch.testing.assert_close(loaded(base, tmp_path / "out")(IDS).logits, full(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_extracted(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="equal"):
        extract_adapter(tmp_path / "base", tmp_path / "base", tmp_path / "out", rank=1)
    with pytest.raises(ValueError, match="rank=16, or energy"):
        extract_adapter(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    base.resize_token_embeddings(40)
    base.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[30, 16\] .* resize"):
        extract_adapter(tmp_path / "base", tmp_path / "larger", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


class Peak(TorchDispatchMode):
    """The most bytes that tensors seen by operations held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [*args, *(result if isinstance(result, tuple | list) else [result])]
        self.seen += [weakref.ref(t) for t in flat if isinstance(t, torch.Tensor)]
        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for r in self.seen
            if (t := r()) is not None and not t.is_meta
        }
        self.most = max(self.most, sum(alive.values()))
        return result


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.99}], ids=str)
def test_extraction_and_resizing_hold_one_layer_at_a_time(size: dict, tmp_path: Path) -> None:
    """Eight layers; the peak is counted in matrices of one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(192, 192, bias=False) for _ in range(8)))
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file(dict(model.state_dict()), tmp_path / name / "model.safetensors")
        with torch.no_grad():
            for layer in model:
                layer.weight += torch.randn(192, 2) @ torch.randn(2, 192) * 0.1
    with Peak() as peak:
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", model=model.to("meta"), **size)
    # The two matrices, the second of which becomes the difference; for energy also 16 vectors of each of 8 layers, on
    # both sides, which wait until ranks are shared out: 8 * 2 * 16 / 192 = 1.3.
    assert peak.most / (192 * 192 * 4) < (2.5 if "rank" in size else 3.8)
    with Peak() as peak:
        resize_adapter(tmp_path / "out", tmp_path / "small", **(size if "energy" in size else {"rank": 1}))
    assert peak.most / (192 * 192 * 4) < 1  # the products are never formed


def test_resizing_gives_the_best_product_of_a_rank(tmp_path: Path) -> None:
    base, model = lora(tmp_path / "lora", r=4, rank_pattern={"k_proj": 2}, use_rslora=True)
    found = resize_adapter(tmp_path / "lora", tmp_path / "small", rank=2)
    back, names = loaded(base, tmp_path / "small"), [*found.ranks]
    for name in names:
        old, new = (
            m.requires_grad_(False).base_model.model.get_submodule(name).adapters["default"] for m in (model, back)
        )
        u, s, vh = torch.linalg.svd(old.delta_weight())
        torch.testing.assert_close(new.delta_weight(), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)
        assert found.errors[name] == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-5)
        if "k_proj" in name:  # it fits already
            assert torch.equal(new.lora_A.weight, old.lora_A.weight) and found.errors[name] == 0
    few = resize_adapter(tmp_path / "lora", tmp_path / "few", energy=0.7)
    assert few.kept >= 0.7 and sum(few.ranks.values()) < sum(found.ranks.values()) + 4
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        resize_adapter(tmp_path / "lora", tmp_path / "x", energy=2.0)


def test_resizing_other_products_and_what_is_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, config in (("hira", HiraConfig), ("loha", LoHaConfig)):
        torch.manual_seed(0)
        model = get_peft_model(Mlp(), config(r=3, target_modules=["lin0"], init_weights=False))
        model.save_pretrained(tmp_path / name)
        if name == "hira":
            product = model.base_model.model.lin0.adapters["default"].product()
    resize_adapter(tmp_path / "hira", tmp_path / "small", rank=1)
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lin0.hira_{part}"] for part in "AB")
    u, s, vh = torch.linalg.svd(product)
    torch.testing.assert_close(b @ a, s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="LOHA are no product.*entry by entry.*save_as_lora"):
        resize_adapter(tmp_path / "loha", tmp_path / "x", rank=1)


def test_each_method_with_a_rank_is_resized_or_refused_by_a_reason() -> None:
    known = {str(getattr(key, "value", key)): config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
             if key in PEFT_TYPE_TO_TUNER_MAPPING}  # fmt: skip
    ranked = {
        name
        for name, config in known.items()
        if any(field.name in ("r", "r1") for field in dataclasses.fields(config))
    }
    blocks = {"BONE", "OFT", "HRA"}  # whose r counts blocks or reflections
    assert ranked - blocks - METHODS.keys() - WHY_NOT.keys() == set()
    assert METHODS.keys() & WHY_NOT.keys() == set() and WHY_NOT.keys() <= known.keys()


ONE_RANK = {
    "dylora": DyLoraConfig(r=6, rank=5, min_r=3, alpha=3, init_weights=False),
    "lora_xs": LoraXsConfig(r=5, alpha=3),
    "mix_lora": MixLoraConfig(r=5, num_experts=3, top_k=3, alpha=3, init_weights=False),
    "poly": PolyConfig(r=5, n_skills=3, n_splits=2, n_tasks=4, init_weights=False),
}


@pytest.mark.parametrize("name", ONE_RANK)
def test_resizing_of_methods_with_one_rank_for_all_layers(name: str, tmp_path: Path) -> None:
    """A rank that loses nothing gives the same outputs; a lower one, each product's best."""
    torch.manual_seed(0)
    config, base = (
        copy.deepcopy(ONE_RANK[name]),
        nn.ModuleDict({"first": nn.Linear(16, 14), "second": nn.Linear(20, 18)}),
    )
    config.target_modules = {"first", "second"}
    model = get_peft_model(copy.deepcopy(base), config).eval().requires_grad_(False)
    for module in ("first", "second"):  # of rank 2, whatever the form says
        adapter = model.base_model.model[module].adapters["default"]
        for part in ("dylora_B", "xs_R", "mix_B", "poly_lora_B"):
            if (tensor := getattr(adapter, part, None)) is not None:
                axis = 2 if name == "poly" else 1
                tensor.copy_(torch.randn_like(tensor))
                blocks = tensor.unflatten(1, (3, -1)).transpose(1, 2) if name == "mix_lora" else tensor
                blocks.narrow(axis, 2, blocks.shape[axis] - 2).zero_()
                if name == "dylora":
                    tensor[:, 5] = 9.0  # of a rank that is not in use
    model.save_pretrained(tmp_path / "whole")
    found = resize_adapter(tmp_path / "whole", tmp_path / "small", rank=2)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small").eval()
    assert set(found.ranks.values()) == {2} and back.peft_config["default"].r == 2
    assert max(found.errors.values()) < 1e-6 and found.kept == pytest.approx(1)
    tasks = {"task_ids": torch.arange(4)} if name == "poly" else {}
    for module, size in (("first", 16), ("second", 20)):
        x = torch.randn(4, 3, size)
        outputs = [call(m, module, x, **tasks) for m in (model, back)]
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
        assert (outputs[0] - base[module](x)).abs().max() > 0.01
    few = resize_adapter(tmp_path / "whole", tmp_path / "few", energy=0.5)
    assert few.kept >= 0.5 and set(few.ranks.values()) <= {1, 2}
    one = resize_adapter(tmp_path / "whole", tmp_path / "one", rank=1)
    products = products_of(Held.read(tmp_path / "whole"))[1], products_of(Held.read(tmp_path / "one"))[1]
    for old, new in zip(*products):
        rest = whole = 0.0
        for (a, b), (c, d) in zip(old.blocks, new.blocks):
            u, s, vh = torch.linalg.svd(b @ a * old.scale)
            torch.testing.assert_close(d @ c * new.scale, s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=1e-4)
            rest, whole = rest + float(s[1:].square().sum()), whole + float(s.square().sum())
        assert one.errors[old.module] == pytest.approx((rest / whole) ** 0.5, abs=1e-5)


def call(model: PeftModel, module: str, x: torch.Tensor, **task: torch.Tensor) -> torch.Tensor:
    """The output of one layer."""
    layer = model.base_model.model[module]
    if not task:
        return layer(x)
    layer.context.task_ids = task["task_ids"]
    return layer(x)


PRODUCTS = {
    "adalora": AdaLoraConfig(init_r=5, target_r=4, lora_alpha=3, inference_mode=True, init_lora_weights=False),
    "gralora": GraloraConfig(r=6, gralora_k=2, alpha=3, init_weights=False),
    "gralora_hybrid": GraloraConfig(r=6, gralora_k=2, hybrid_r=2, alpha=3, init_weights=False),
    "lokr": LoKrConfig(r=3, alpha=5, decompose_factor=2, init_weights=False),
    "lora_variants": LoraConfig(r=5, use_rslora=True, rank_pattern={"second": 4}, init_lora_weights=False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_resizing_by_method(name: str, tmp_path: Path) -> None:
    """What is loaded is the best of the new rank: of the matrix, of each block, of W2 in a Kronecker product."""
    config, base = (
        copy.deepcopy(PRODUCTS[name]),
        nn.ModuleDict({"first": nn.Linear(16, 14), "second": nn.Linear(20, 18)}),
    )
    config.target_modules = {"first", "second"}
    torch.manual_seed(2)
    model = get_peft_model(copy.deepcopy(base), config).requires_grad_(False)
    model.save_pretrained(tmp_path / "whole")
    found = resize_adapter(tmp_path / "whole", tmp_path / "small", rank=2)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    assert set(found.ranks.values()) == {2}
    for module in ("first", "second"):
        old, new = (m.base_model.model[module].adapters["default"] for m in (model, back))
        whole, cut = old.delta_weight(), new.delta_weight()
        if name == "lokr":
            second, other = old.second(), new.second() * float(new.scaling / old.scaling)
            u, s, vh = torch.linalg.svd(second, full_matrices=False)
            torch.testing.assert_close(other, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)
        elif "gralora" in name:
            if old.gralora_A_general is not None:
                extra = [a.gralora_B_general.weight @ a.gralora_A_general.weight * a.scaling for a in (old, new)]
                torch.testing.assert_close(*extra)
                whole, cut = whole - extra[0], cut - extra[1]
            for rows, others in zip(whole.chunk(2), cut.chunk(2)):
                for block, other in zip(rows.chunk(2, 1), others.chunk(2, 1)):
                    u, s, vh = torch.linalg.svd(block)
                    torch.testing.assert_close(other, s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=1e-4)
        else:
            u, s, vh = torch.linalg.svd(whole)
            torch.testing.assert_close(cut, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)
        error = float((whole - cut).norm() / whole.norm())
        assert found.errors[module] == pytest.approx(error, abs=1e-5)
    few = resize_adapter(tmp_path / "whole", tmp_path / "few", energy=0.6)
    kept = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "few")
    if name != "gralora_hybrid":
        pairs = [[m.base_model.model[n].adapters["default"].delta_weight() for m in (model, kept)] for n in base]
        lost, all_ = (sum(float(t.square().sum()) for t in ts) for ts in zip(*[(a - b, a) for a, b in pairs]))
        assert 1 - lost / all_ == pytest.approx(few.kept, abs=1e-4)
    assert few.kept >= 0.6 and max(few.ranks.values()) < max(PRODUCTS[name].r or 0, 5)


def test_variants_of_a_fixed_rank_are_not_resized(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["lin0"], kasa_config=KasaConfig())
    get_peft_model(Mlp(), config).save_pretrained(tmp_path / "kasa")
    with pytest.raises(ValueError, match="the adapter is Kasa"):
        resize_adapter(tmp_path / "kasa", tmp_path / "x", rank=2)


def test_negation_and_rebasing(tmp_path: Path) -> None:
    base, model = lora(tmp_path / "one")
    negate_adapter(tmp_path / "one", tmp_path / "minus")
    torch.manual_seed(9)
    other = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    other.save_pretrained(tmp_path / "two", save_embedding_layers=False)
    baked = copy.deepcopy(loaded(base, tmp_path / "one").merge_and_unload())
    gone = loaded(baked, tmp_path / "minus")
    torch.testing.assert_close(gone(IDS).logits, base(IDS).logits, atol=1e-5, rtol=1e-4)
    rebase_adapter(tmp_path / "two", tmp_path / "one", tmp_path / "rebased")
    wanted = loaded(base, tmp_path / "two")(IDS).logits
    torch.testing.assert_close(loaded(baked, tmp_path / "rebased")(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    lora(tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        negate_adapter(tmp_path / "dora", tmp_path / "x")
    lora(tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'pissa' has changed the base model"):
        negate_adapter(tmp_path / "pissa", tmp_path / "x")
    with pytest.raises(ValueError, match="pissa is more than its A and B"):
        rebase_adapter(tmp_path / "pissa", tmp_path / "one", tmp_path / "x")


SERVED = [
    ({"r": 8, "lora_alpha": 16}, {"vllm", "sglang", "tgi", "lorax", "llama.cpp"}, ""),
    ({"r": 8, "use_dora": True}, set(), "DoRA"),
    ({"r": 8, "modules_to_save": ["lm_head"]}, set(), "modules_to_save"),
    ({"r": 8, "rank_pattern": {"q_proj": 4}}, {"llama.cpp"}, "scales every layer"),
    ({"r": 8, "bias": "all"}, set(), "biases"),
    ({"r": 8, "layers_to_transform": [1]}, {"vllm", "sglang", "llama.cpp"}, "not every layer"),
    ({"r": 600}, {"sglang", "tgi", "lorax", "llama.cpp"}, "largest rank is 512"),
    ({"r": 8, "use_rslora": True}, {"vllm", "tgi", "lorax", "llama.cpp"}, "use_rslora=False and lora_alpha=22.6274"),
    ({"r": 8, "alpha_pattern": {"q_proj": 4}}, {"llama.cpp"}, "scales every layer"),
    ({"r": 8, "trainable_token_indices": [1, 3]}, set(), "trained token vectors"),
    ({"r": 8, "lora_bias": True}, set(), "bias of B"),
    ({"r": 8, "target_modules": ["embed_tokens", "q_proj"]}, {"vllm", "sglang", "llama.cpp"}, "embed"),
    ({"r": 8, "target_modules": "all-linear"}, {"vllm", "sglang", "tgi", "lorax", "llama.cpp"}, ""),
    ({"r": 8, "init_lora_weights": "pissa"}, set(), "the start 'pissa' has changed the base"),
]


@pytest.mark.parametrize(("fields", "serve", "why"), SERVED, ids=[str(fields) for fields, *_ in SERVED])
def test_who_serves_an_adapter(fields: dict, serve: set[str], why: str, tmp_path: Path) -> None:
    lora(tmp_path, **{"lora_alpha": 8, **fields})
    found = check_serving(tmp_path)
    assert {name for name, one in found.items() if one.loads} == serve
    assert all(why in " ".join(one.problems) for one in found.values() if not one.loads)


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "mica": {"init_lora_weights": "mica"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
    "bdlora": {"use_bdlora": {"target_modules_bd_b": [".*"], "nblocks": 2}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {"num_groups": 2, "init_type": "random"}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "alora": {"alora_invocation_tokens": [9]},
    "gated": {"use_gating": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_served_is_what_a_plain_lora_of_the_file_s_a_and_b_does(name: str, tmp_path: Path) -> None:
    """A server that passes over what it does not know computes this; where it is something else, it is refused."""
    base, model = lora(tmp_path / "own", **{"r": 4, "target_modules": ["q_proj", "o_proj"], **VARIANTS[name]})
    perturb(model, "default", 3)
    model.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    top, outputs = model.peft_config["default"], None
    scale = top.lora_alpha / (top.r**0.5 if top.use_rslora else top.r)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                module = plain.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                b = tensors[key.replace("lora_A", "lora_B")]
                fits = b.shape[1] == len(a) and a.shape[1] == module.in_features and len(b) == module.out_features
                module.weight += scale * b @ a if fits else torch.inf
        outputs = plain(IDS).logits, model.eval()(IDS).logits
    same = torch.allclose(*outputs, atol=1e-5, rtol=1e-4)
    assert check_serving(tmp_path / "own")["vllm"].loads == same, (outputs[0] - outputs[1]).abs().max()
    if not same and name != "dora":  # nor is it written as such for others
        with pytest.raises(ValueError, match="cannot be carried over|gates"):
            convert_adapter(tmp_path / "own", "mlx", tmp_path / "mlx")


def test_serving_needs_and_other_methods(tmp_path: Path) -> None:
    lora(tmp_path / "wide", r=40)
    assert "--max-lora-rank 64" in " ".join(check_serving(tmp_path / "wide")["vllm"].needs)
    get_peft_model(Mlp(), LoHaConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "loha")
    found = check_serving(tmp_path / "loha")
    assert not any(one.loads for one in found.values()) and "save_as_lora" in found["tgi"].problems[0]


def test_ranks_are_shared_out_by_the_largest_singular_values() -> None:
    values = {"a": torch.tensor([5.0, 4.0, 0.1]), "b": torch.tensor([3.0, 0.2]), "c": torch.tensor([0.1])}
    assert shared_ranks(values, 0.8) == {"a": 2, "b": 1, "c": 1}
    assert shared_ranks(values, 1.0) == {"a": 3, "b": 2, "c": 1}


def test_randomised_decompositions_are_those_of_the_matrix() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(90, 5) @ torch.randn(5, 120)
    u, s, vh = randomized_svd(matrix, 5)
    torch.testing.assert_close((u * s) @ vh, matrix, atol=1e-3, rtol=1e-4)
    matrix = torch.randn(90, 120)
    u, s, vh = leading_svd(matrix, 0.9)
    assert s.square().sum() >= 0.9 * matrix.square().sum()
    torch.testing.assert_close(u.T @ u, torch.eye(len(s)), atol=1e-4, rtol=0)


def test_save_as_lora_shares_ranks_and_says_the_errors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoHaConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False))
    with torch.no_grad():
        model.base_model.model.lin1.hada_w1_a["default"].mul_(0.1)
    changes = {
        n: model.get_submodule(f"base_model.model.{n}").get_delta_weight("default").detach() for n in ("lin0", "lin1")
    }
    errors = save_as_lora(tmp_path, model, 0.9, across_layers=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    total, left = sum(float(change.square().sum()) for change in changes.values()), 0.0
    for name, change in changes.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        left += float((change - b @ a).square().sum())
        assert errors[name] == pytest.approx(float((change - b @ a).norm() / change.norm()), abs=1e-5)
    assert left <= 0.1 * total and len(tensors["base_model.model.lin1.lora_A.weight"]) == 1


def test_a_product_is_converted_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoraConfig(r=2, lora_alpha=4, target_modules=["lin0"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="LoRA already"):
        errors = save_as_lora(tmp_path, model, 1.0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    own = model.base_model.model.lin0
    assert torch.equal(tensors["base_model.model.lin0.lora_A.weight"], own.lora_A["default"].weight)
    assert torch.equal(tensors["base_model.model.lin0.lora_B.weight"], 2 * own.lora_B["default"].weight)
    assert errors == {"lin0": 0.0}
    assert isinstance(PeftModel.from_pretrained(Mlp(), tmp_path).peft_config["default"], LoraConfig)


# ---- Merging, beside an independent computation in numpy -----------------------------------------------------------


def updates(count: int = 2) -> list[torch.Tensor]:
    """Matrices of several tasks."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_breadcrumbs_leave_out_both_ends() -> None:
    first, second = updates()
    wanted = 0.0
    for weight, update in ((0.5, first), (2.0, second)):
        flat = update.numpy().ravel()
        order = np.argsort(-np.abs(flat))
        kept = np.zeros_like(flat)
        kept[order[6:36]] = flat[order[6:36]]  # of 60: the 10 % largest out, 50 % in
        wanted = wanted + weight * kept.reshape(6, 10)
    merged = merge_utils.breadcrumbs([first, second], torch.tensor([0.5, 2.0], dtype=torch.float64), 0.5, 0.1)
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=1e-12)


def test_della_drops_small_entries_more_often_and_keeps_the_mean() -> None:
    row = torch.tensor([[0.1, -0.2, 0.3, -0.4]]).double()
    torch.manual_seed(0)
    draws = torch.stack([merge_utils.magnitude_sampled_pruning(row, 0.6, 0.4) for _ in range(4000)])
    kept = (draws != 0).double().mean(0)[0]
    # p_i = 0.4 + 0.2 - i 0.1 is the probability to be dropped
    torch.testing.assert_close(kept, torch.tensor([0.4, 0.5, 0.6, 0.7]).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(draws.mean(0), row, atol=0.02, rtol=0.05)
    with pytest.raises(ValueError, match="window"):
        merge_utils.magnitude_sampled_pruning(row, 0.9, 0.5)


def test_knots_merges_in_the_common_basis() -> None:
    tasks = updates(3)
    weights = np.array([1.0, 0.5, 2.0])
    u, s, vh = np.linalg.svd(np.concatenate([t.numpy() for t in tasks], 1), full_matrices=False)
    parts = np.split(vh, 3, axis=1)
    trimmed = []
    for part in parts:
        cut = np.sort(np.abs(part).ravel())[-int(0.4 * part.size)]
        trimmed.append(np.where(np.abs(part) >= cut, part, 0))
    sign = np.where(sum(trimmed) >= 0, 1, -1)
    agree = [np.sign(part) == sign for part in trimmed]
    total = sum(np.where(ok, w * part, 0) for ok, w, part in zip(agree, weights, trimmed))
    wanted = (u * s) @ (total / np.maximum(sum(ok.astype(int) for ok in agree), 1))
    merged = merge_utils.knots(tasks, torch.from_numpy(weights), 0.4)
    np.testing.assert_allclose(merged.numpy(), wanted, atol=1e-10)


def test_greedy_soup_keeps_what_helps() -> None:
    points = {"a": 1.0, "b": 3.0, "c": -4.0}
    tried: list[list[str]] = []

    def metric(names: list[str]) -> float:
        tried.append(list(names))
        return -abs(sum(points[name] for name in names) / len(names) - 2.2)

    assert merge_utils.greedy_soup(["a", "b", "c"], metric) == ["b", "a"]
    assert tried[3:] == [["b", "a"], ["b", "a", "c"]]
