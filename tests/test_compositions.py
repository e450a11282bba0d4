"""Compositions of adapters: what each expression means, on layers of every method, with rows, files and training.

`data/fusion.*` were recorded from adapters 1.3.0 by `data/make_fusion.py`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
import transformers as tf
from architectures import build, inputs
from in_blocks import differs, gives, logits, refused, stir
from laws import cells, over
from safetensors.torch import load_file
from torch import nn

from peft import (
    AdaptionPromptConfig,
    Average,
    BatchSplit,
    BottleneckConfig,
    CompacterConfig,
    CompositionConfig,
    Fuse,
    IA3Config,
    InvertibleConfig,
    LoraConfig,
    Parallel,
    PeftModel,
    PromptTuningConfig,
    ReftConfig,
    Split,
    Stack,
    check_training,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.composition.expressions import from_dict
from peft.composition.layers import Fused
from peft.testing.cells import Cell, gradient, layers, parameters_of
from peft.utils.error import ConfigError


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model cards take most of the time of a save, and are tested elsewhere."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


def even(model: nn.Module, name: str) -> None:
    """Give a fusion uniform attention, and V = I."""
    with torch.no_grad():
        for _, layer in layers(model):
            fused = layer.adapters.get(name)
            for attention in fused.fusion.values() if isinstance(fused, Fused) else ():
                attention.query.weight.zero_()
                attention.query.bias.zero_()
                if attention.value is not None:
                    attention.value.weight.copy_(torch.eye(len(attention.value.weight)))


# --- laws of weights, over the registry ---------------------------------------------------------------------------

EVERY = 1 if os.environ.get("LAWS") == "all" else 15
CELLS = cells("several", "mixed", precisions=("float32", "bfloat16"), each_layer=False)


def whole(cell: Cell) -> bool:
    """Whether its adapters take the place of a module, of which one can act."""
    return cell.method.layer_cls.adapter_cls.any_module


@over(CELLS[::EVERY])
def test_the_laws_of_compositions(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    alone = {"one": cell.run(model)}
    model.set_adapter("two")
    alone["two"] = cell.run(model)
    model.set_adapter(["one", "two"])
    both = cell.run(model)
    with model.disable_adapter():
        base = alone["__base__"] = cell.run(model)

    def run(expression: Any) -> torch.Tensor:
        model.set_adapter(expression)
        return cell.run(model)

    cell.near(run(Stack()), base, "an empty stack is the base")
    cell.near(run(Stack("one", "two")), both, "a stack of weights is the list")
    cell.near(run(Stack("one", Stack("two"))), both, "a stack in a stack")
    rows = run(BatchSplit("two", Stack("one", "two"), "__base__", batch_sizes=[1, 3, 2]))
    cell.near(rows[:1], alone["two"][:1], "a row is what it is alone")
    cell.near(rows[1:4], both[1:4], "a row of a stack", factor=2)
    cell.near(rows[4:], base[4:], "a row of the base")
    parts = Parallel("one", Stack("one", "two"), "__base__")
    for found, wanted in zip(parts.apart(run(parts)), (alone["one"], both, base)):
        cell.near(found, wanted, "a member of a Parallel", factor=2)
    if whole(cell):
        with pytest.raises(ValueError, match="copies of the whole module"):
            model.set_adapter(Average("one", "two"))
        return
    cell.near(run(Average("one")), alone["one"], "an average of one is that one")
    cell.near(run(Average("one", "two", weights=[1, 0])), alone["one"], "a weight of 1")
    if cell.place.affine and not cell.place.deep:
        mean = 0.75 * alone["one"] + 0.25 * alone["two"]
        cell.near(run(Average("one", "two", weights=[3, 1])), mean, "an average of outputs", factor=2)
    average = run(Average("one", "two"))
    if not cell.unmergeable:
        model.merge_adapter()
        cell.near(cell.run(model), average, "merged", factor=3)
        model.unmerge_adapter()
        cell.near(cell.run(model), average, "unmerged")
    try:
        model.add_composition("fused", Fuse("one", "two"), autocast_adapter_dtype=cell.autocast)
    except ValueError as error:
        assert "read by another computation" in str(error)
        return
    even(model, "fused")
    cell.near(run("fused"), average, "a fusion with uniform attention is the mean", factor=3)
    cell.near(run(Parallel("two", "fused"))[len(average) :], average, "in rows", factor=3)
    model.set_adapter("fused")
    with pytest.raises(ValueError, match="depends on the sample"):
        model.merge_adapter()


@over([cell for cell in CELLS if cell.precision == "float32" and not whole(cell)][4 % EVERY :: EVERY])
def test_rows_of_compositions_have_the_gradients_that_they_have_alone(cell: Cell) -> None:
    model = cell.adapted("one", "two")
    model.train(not any(type(layer.adapters["one"]).random_in_training for _, layer in layers(model)))
    mean = Average("one", "two", weights=[3, 1])
    found = {}
    for what in (Parallel("two", mean), "two", mean):
        model.set_adapter(what)
        model.set_requires_grad(["one", "two"], True)
        model.zero_grad()
        cell.loss(model).backward() if not isinstance(what, Parallel) else _twice(cell, model).backward()
        found[what] = [gradient(p).clone() for name in ("one", "two") for p in parameters_of(model, name)]
    together, *apart = found.values()
    for grad, first, second in zip(together, *apart):
        cell.near(grad, first + second, "gradient", factor=3)


def _twice(cell: Cell, model: nn.Module) -> torch.Tensor:
    """The loss of :meth:`Cell.loss` for each half of the rows."""
    output = model(*cell.inputs())
    half = len(output) // 2
    weight = torch.randn(output[:half].shape, generator=torch.Generator().manual_seed(5))
    return sum((part.float() * weight).flatten(1).mean(1).sum() for part in (output[:half], output[half:]))


# --- of the whole model -------------------------------------------------------------------------------------------


def two(name: str = "llama", **fields: Any) -> PeftModel:
    """A model with two adapters far from their start, on layers of which some have both."""
    base = build(name)
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **fields), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["v_proj", "up_proj"], **fields))
    stir(model, "a")
    stir(model, "b", seed=5)
    return model


def of(model: PeftModel, what: Any, name: str = "llama") -> torch.Tensor:
    model.set_adapter(what)
    return logits(model, name)


class TestTheModel:
    def test_an_expression_is_there_while_it_is_active(self):
        model = two()
        model.set_adapter(Stack("a", "b"))
        assert model.active_adapters == ["stack_a_b"] and model.active_composition == Stack("a", "b")
        assert all(p.requires_grad for name in ("a", "b") for p in parameters_of(model, name))
        model.set_adapter(Average("a", "b"), inference_mode=True)
        assert list(model.peft_config) == ["a", "b", "average_a_b"]
        assert not any(p.requires_grad for p in model.parameters())
        model.set_adapter("b")
        assert list(model.peft_config) == ["a", "b"] and model.active_composition is None
        assert {p.requires_grad for p in parameters_of(model, "a")} == {False}
        assert model.get_base_model()._peft_record.context.compositions == {}

    def test_a_fusion_trains_and_its_members_do_not(self):
        model = two()
        with pytest.warns(UserWarning, match="new, and has to be trained"):
            model.set_adapter(Stack("a", Fuse("a", "b")))
        assert list(model.peft_config) == ["a", "b", "fuse_a_b", "stack_a_fuse_a_b"]
        trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad and "fusion" in name}
        assert trained == {"fuse_a_b"}
        model.set_adapter("fuse_a_b")
        assert not any(p.requires_grad for name in ("a", "b") for p in parameters_of(model, name))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.Adam(parameters, lr=0.02), []
        model.train()
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(**inputs("llama")).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        assert losses[-1] < losses[0] and all(p.grad is not None for p in parameters)
        model.set_requires_grad("b", True)
        model(**inputs("llama")).loss.backward()
        assert all(p.grad is not None for p in parameters_of(model, "b"))

    def test_the_loss_has_the_term_of_the_fusion(self):
        model = two()
        model.add_composition("free", Fuse("a", "b", regularization=0.0))
        model.add_composition("bound", Fuse("a", "b", regularization=0.5))
        stir(model, "free", seed=7, size=0.1)
        for bound, free in zip(parameters_of(model, "bound"), parameters_of(model, "free")):
            bound.data.copy_(free)
        losses = {}
        for name in ("free", "bound"):
            model.set_adapter(name)
            losses[name] = model.train()(**inputs("llama")).loss
        term = 0.0
        for _, layer in layers(model):
            for attention in layer.adapters["bound"].fusion.values() if "bound" in layer else ():
                term += 0.5 * (attention.value.weight - torch.eye(len(attention.value.weight))).square().sum()
        torch.testing.assert_close(losses["bound"], losses["free"] + term)

    def test_it_is_saved_and_loaded(self, tmp_path):
        model = two()
        model.add_composition("fused", Fuse("a", "b", kind="static"))
        model.add_composition("both", Stack("a", Average("b", "fused", weights=[3, 1])))
        stir(model, "fused", seed=7)
        wanted = of(model, "both")
        model.save_pretrained(str(tmp_path))
        assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["peft_type"] == "COMPOSITION"
        again = PeftModel.from_pretrained(build("llama"), str(tmp_path / "a"), adapter_name="a")
        for name in ("b", "fused", "both"):
            result = again.load_adapter(str(tmp_path / name), adapter_name=name)
            assert result.missing_keys == [] and result.unexpected_keys == []
        gives(of(again, "both"), wanted)
        with refused(again, "the file is of Fuse"):
            again.load_adapter(str(tmp_path / "fused"), adapter_name="both")

    def test_what_it_is_made_of_is_loaded_with_it(self, tmp_path):
        model = two()
        model.add_composition("fused", Fuse("a", "b"))
        model.add_composition("both", Stack("a", "fused"))
        stir(model, "fused", seed=7)
        wanted = of(model, "both")
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(build("llama"), str(tmp_path / "both"), adapter_name="mine")
        assert list(again.peft_config) == ["a", "b", "fused", "mine"] and again.active_adapters == ["mine"]
        gives(logits(again, "llama"), wanted)
        assert not any(p.requires_grad for p in again.parameters())
        model = PeftModel.from_pretrained(build("llama"), str(tmp_path), subfolder="fused", is_trainable=True)
        assert all(p.requires_grad for p in parameters_of(model, "default"))
        shutil.rmtree(tmp_path / "b")
        model = PeftModel.from_pretrained(build("llama"), str(tmp_path / "a"), adapter_name="a")
        with refused(model, "made of 'b', which is no adapter"):
            model.load_adapter(str(tmp_path / "fused"), adapter_name="fused")
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(ValueError, match="has no folder beside it"):
            PeftModel.from_pretrained(build("llama"), str(tmp_path / "fused"))

    def test_what_a_composition_needs_is_not_deleted(self):
        model = two()
        model.add_composition("both", Stack("a", "b"))
        with refused(model, "part of the composition 'both'"):
            model.delete_adapter("b")
        model.set_adapter("both")
        model.delete_adapter("both")
        assert model.active_adapters == ["a"] and list(model.peft_config) == ["a", "b"]
        assert not any(p.requires_grad for p in parameters_of(model, "b"))
        model.delete_adapter("b")

    def test_switched_off_it_is_the_base(self):
        model, base = two(), logits(build("llama"), "llama")
        for what in (Stack("a", "b"), Average("a", "b"), Parallel("a", "b")):
            model.set_adapter(what)
            with model.disable_adapter():
                gives(logits(model, "llama"), base)
            assert logits(model, "llama").shape[0] == (8 if isinstance(what, Parallel) else 4)
        gives(logits(model.unload(), "llama"), base)

    def test_generation_goes_on_for_each_member(self):
        model, ids = two(), inputs("llama")["input_ids"]
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
        alone = []
        for what in ("a", Stack("a", "b")):
            model.set_adapter(what)
            alone.append(model.generate(input_ids=ids, **options))
        both = Parallel("a", Stack("a", "b"))
        model.set_adapter(both)
        for found, wanted in zip(both.apart(model.generate(input_ids=ids, **options)), alone):
            assert torch.equal(found, wanted)

    def test_parallel_takes_inputs_of_every_form(self):
        model = two()
        both = Parallel(BatchSplit("a", "b", batch_sizes=[1, 3]), "b")
        given = inputs("llama")
        mask = torch.ones_like(given["input_ids"])
        alone = [of(model, name) for name in ("a", "b")]
        model.set_adapter(both)
        with torch.no_grad():
            output = model(**given, attention_mask=mask, position_ids=torch.arange(6)[None])
        gives(output.logits, torch.cat([alone[0][:1], alone[1][1:], alone[1]]))
        with pytest.raises(ValueError, match=r"batches of 4 rows, and this one has 2"):
            model(given["input_ids"][:2])
        with pytest.raises(ValueError, match="Call the PeftModel itself"):
            model.get_base_model()(given["input_ids"])

    def test_checkpointed_blocks_give_the_same_gradients(self):
        found = []
        for checkpointed in (False, True):
            model = two()
            model.add_composition("fused", Fuse("a", "b"))
            model.set_adapter(Parallel("a", Stack("a", "fused")))
            if checkpointed:
                model.gradient_checkpointing_enable()
            model.train()(**inputs("llama")).loss.backward()
            found.append([gradient(p) for name in ("a", "fused") for p in parameters_of(model, name)])
        for one, other in zip(*found):
            gives(one, other)

    def test_heads_of_members(self):
        model = get_peft_model(build("bert"), LoraConfig(r=2, modules_to_save=["classifier"]), "a")
        model.add_adapter("b", LoraConfig(r=2, modules_to_save=["classifier"]))
        model.add_adapter("plain", LoraConfig(r=2))
        for seed, name in enumerate(("a", "b", "plain")):
            stir(model, name, seed=seed)
        for name in ("a", "b"):
            torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
        model.set_adapter(["plain", "a"])
        gives(of(model, Stack("plain", "a"), "bert"), logits(model, "bert"))
        both = Parallel("a", Stack("plain", "b"))
        alone = [of(model, what, "bert") for what in both.members]
        gives(of(model, both, "bert"), torch.cat(alone))
        for what in (Average("a", "b"), Parallel("plain", Average("a", "b"))):
            with refused(model, "copy of the same module"):
                model.set_adapter(what)
        model.set_adapter(Stack("b", "a"))
        head = model.base_model.model.classifier
        assert head._module() is head.modules_to_save["a"]
        model.add_composition("fused", Fuse("a", "b"), modules_to_save=["classifier"])
        model.set_adapter("fused")
        assert head._module() is head.modules_to_save["fused"] and head._module().weight.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Average(), "has no member"),
        (lambda: Average("a", "b", weights=[1]), "2 members, but 1 weights"),
        (lambda: Average("a", "b", weights=[1, -1]), "normalize_weights=False"),
        (lambda: Average("a", Parallel("b")), r"outside: Parallel\(Average\('b'"),
        (lambda: Stack("a", 3), "names of adapters, or expressions"),
        (lambda: Stack(Parallel("a", "b"), Parallel("c", "d")), "divides the rows of a batch more than once"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1, 0]), "whole numbers from 1"),
        (lambda: BatchSplit(Parallel("a"), batch_sizes=[1]).members and BatchSplit(Parallel("a", "b"), batch_sizes=2),
         "Put Parallel outside"),
        (lambda: Parallel("a", Parallel("b", "c")), "name all of its members in one"),
        (lambda: Fuse("a", kind="other"), "'dynamic' or 'static'"),
        (lambda: CompositionConfig(expression={"type": "Stak", "members": []}), "Did you mean 'Stack'"),
        (lambda: CompositionConfig(expression={"type": "Stack", "members": ["a"], "x": 1}), "has no 'x'"),
    ],
)  # fmt: skip
def test_expressions_without_meaning_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "expression",
    [
        Stack(),
        Stack("a", Average("b", Stack("c", "d"), weights=[1, 1], normalize_weights=False)),
        Fuse("a", "b", kind="static"),
        Parallel("a", BatchSplit("a", "b", batch_sizes=[1, 2])),
    ],
    ids=str,
)
def test_an_expression_in_a_file_is_the_same(expression):
    assert from_dict(json.loads(json.dumps(expression.to_dict()))) == expression
    assert copy.deepcopy(expression) == expression and eval(repr(expression)) == expression


# --- what adapters computes ---------------------------------------------------------------------------------------

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "fusion.json").read_text(encoding="utf-8"))
BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
SETUPS = {"fuse": Fuse("a", "b", "c"), "stack": Stack("c", "a"), "parallel": Parallel("a", "c")}


@functools.cache
def recorded() -> dict[str, torch.Tensor]:
    return load_file(DATA / "fusion.safetensors")


def as_recorded(case: str) -> PeftModel:
    """The model of a recorded case, with its tensors; the composition is active."""
    facts = RECORDED[case]
    made = tf.BertModel(tf.BertConfig(**BERT)) if facts["model"] == "bert" else tf.GPT2Model(tf.GPT2Config(**GPT2))
    base = {key.split("|base.")[1]: t for key, t in recorded().items() if key.startswith(f"{facts['model']}|base.")}
    made.load_state_dict(base)
    model = get_peft_model(made.eval(), BottleneckConfig(preset=facts["preset"], reduction_factor=4), "a")
    for name in ("b", "c"):
        model.add_adapter(name, BottleneckConfig(preset=facts["preset"], reduction_factor=4))
    setup = SETUPS[facts["setup"]]
    setup = Fuse(*setup.members, kind=facts["kind"]) if facts["kind"] else setup
    model.add_composition("composed", setup)
    own = {key.split("|")[1]: t for key, t in recorded().items() if key.startswith(f"{case}|")}
    for number, (_, layer) in enumerate(layers(model)):
        for name in ("a", "b", "c"):
            for role in ("attention", "feedforward"):
                if (network := layer.adapters[name].at(role)) is not None:
                    network.load_state_dict(parts_of(own, f"{name}.{number}.{role}."))
        if facts["kind"]:
            for role, attention in layer.adapters["composed"].fusion.items():
                attention.load_state_dict(parts_of(own, f"fuse.{number}.{role}."))
    model.set_adapter("composed")
    return model


def parts_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("case", RECORDED)
def test_compositions_are_those_of_adapters(case):
    model, ids = as_recorded(case), recorded()[f"{RECORDED[case]['model']}|ids"]
    with torch.no_grad():
        found = model(ids).last_hidden_state
    torch.testing.assert_close(found, recorded()[f"{case}|out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_fusion_is_its_formula(kind):
    """Written out by hand for one linear layer with two LoRA."""
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 5), torch.randn(3, 4, 6)
    y = linear(x).detach()
    model = get_peft_model(nn.Sequential(linear), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    model.add_composition("f", Fuse("a", "b", kind=kind))
    for seed, name in enumerate("abf"):
        stir(model, name, seed=seed)
    layer = model.base_model.model[0]
    made = layer.adapters["f"].fusion["output"]
    u = [layer.scaling[n] * x @ layer.lora_A[n].weight.T @ layer.lora_B[n].weight.T for n in "ab"]
    q = y @ made.query.weight.T + made.query.bias
    scores = torch.stack([(q * (part @ made.key.weight.T + made.key.bias)).sum(-1) for part in u])
    p = scores.exp() / scores.exp().sum(0)
    mixed = p[0, ..., None] * u[0] + p[1, ..., None] * u[1]
    wanted = y + (mixed if kind == "static" else mixed @ made.value.weight.T)
    model.set_adapter("f")
    torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-4, atol=1e-4)


# --- methods in blocks, on other storages, by other tools ---------------------------------------------------------

IN_BLOCKS = {
    "bottleneck": lambda: BottleneckConfig(preset="houlsby", reduction_factor=4),
    "compacter": lambda: CompacterConfig(preset="compacter++", reduction_factor=4),
    "reft": lambda: ReftConfig(r=2, dropout=0.0),
}


@pytest.mark.parametrize("method", IN_BLOCKS)
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "wav2vec2"])
def test_the_laws_in_blocks(name, method, tmp_path):
    model = get_peft_model(build(name), IN_BLOCKS[method](), "a")
    model.add_adapter("b", IN_BLOCKS[method]())
    stir(model, "a", size=0.3)
    stir(model, "b", seed=5, size=0.3)
    base = logits(build(name), name)
    a, b, both = of(model, "a", name), of(model, "b", name), of(model, ["a", "b"], name)
    gives(of(model, Stack(), name), base)
    gives(of(model, Average("a"), name), a)
    gives(of(model, Average("a", "b", weights=[1, 1], normalize_weights=False), name), both)
    stacked, mean = of(model, Stack("a", "b"), name), of(model, Average("a", "b"), name)
    differs(stacked, both)  # the second reads what the first has made
    model.add_composition("fused", Fuse("a", "b"))
    even(model, "fused")
    gives(of(model, "fused", name), mean)
    stir(model, "fused", seed=7, size=0.1)
    fused = of(model, "fused", name)
    wanted = (a, base, stacked, fused)
    parts = Parallel("a", "__base__", Stack("a", "b"), "fused")
    for found, alone in zip(parts.apart(of(model, parts, name)), wanted):
        gives(found, alone)
    rows = of(model, BatchSplit("fused", "__base__", Stack("a", "b"), batch_sizes=[1, 1, 2]), name)
    gives(rows, torch.cat([fused[:1], base[1:2], stacked[2:]]))
    gives(logits(model, name, adapter_names=["b", "fused", "a", "__base__"])[:2], torch.cat([b[:1], fused[1:2]]))
    model.set_adapter("fused")
    model.train()(**inputs(name)).loss.backward()
    trained = parameters_of(model, "fused")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained) and trained
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(name), str(tmp_path / "a"), adapter_name="a")
    again.load_adapter(str(tmp_path / "b"), adapter_name="b")
    again.load_adapter(str(tmp_path / "fused"), adapter_name="fused")
    gives(of(again, "fused", name), fused)


@pytest.mark.parametrize("config", [InvertibleConfig(), AdaptionPromptConfig(adapter_layers=2, adapter_len=3)])
def test_methods_that_cannot_be_put_together_are_stacked_and_used_by_row(config):
    model = get_peft_model(build("llama"), copy.deepcopy(config), "a")
    model.add_adapter("b", copy.deepcopy(config))
    stir(model, "a", size=0.3)
    stir(model, "b", seed=5, size=0.3)
    both = of(model, ["a", "b"])
    gives(of(model, Stack("a", "b")), both)
    parts = Parallel("a", Stack("a", "b"))
    for found, wanted in zip(parts.apart(of(model, parts)), (of(model, "a"), both)):
        gives(found, wanted)
    with refused(model, "can be stacked, and used row by row"):
        model.set_adapter(Fuse("a", "b"))
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("storage", ["plain", "nf4"])
def test_compositions_on_a_quantised_base(storage):
    base = quantised.plain() if storage == "plain" else quantised._bnb4(quant_type="nf4")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["0", "2"]))
    stir(model, "a", size=0.1)
    stir(model, "b", seed=5, size=0.1)
    x = torch.randn(4, quantised.IN)
    model.add_composition("fused", Fuse("a", "b"))
    model.set_adapter("fused")
    model.train()(x).square().mean().backward()  # before the weights are packed anew, for inference
    assert all(p.grad is not None for p in parameters_of(model, "fused"))

    def run(what: Any) -> torch.Tensor:
        model.set_adapter(what)
        with torch.no_grad():
            return model.eval()(x)

    both, mean = run(["a", "b"]), run(Average("a", "b"))
    gives(run(Stack("a", "b")), both)
    even(model, "fused")
    gives(run("fused"), mean)
    parts = Parallel(Average("a", "b"), "fused", "a")
    for found, wanted in zip(parts.apart(run(parts)), (mean, mean, run("a"))):
        gives(found, wanted)


def test_compositions_of_different_methods():
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]), "a", mixed=True)
    model.add_adapter("b", IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]))
    model.add_adapter("c", BottleneckConfig(reduction_factor=4))
    for seed, name in enumerate("abc"):
        stir(model, name, seed=seed)
    three = of(model, ["a", "b", "c"])
    gives(of(model, Stack("a", "b", "c")), three)
    parts = Parallel(Stack("a", "c"), "b", Average("a", "c", weights=[1, 1], normalize_weights=False))
    alone = [of(model, ["a", "c"]), of(model, "b"), of(model, ["a", "c"])]
    for found, wanted in zip(parts.apart(of(model, parts)), alone):
        gives(found, wanted)
    model.add_composition("fused", Fuse("a", "b", "c"))
    model.set_adapter("fused")
    model.train()(**inputs("llama")).loss.backward()
    model.delete_adapter("fused")
    gives(of(model, ["a", "b", "c"]), three)


def test_a_compiled_model_computes_the_same():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    model.add_composition("fused", Fuse("a", "b"))
    for seed, name in enumerate(("a", "b", "fused")):
        stir(model, name, seed=seed)
    model.set_adapter(Stack("a", Average("b", "fused")))
    x = torch.randn(3, 5, 6)
    gives(torch.compile(model, backend="eager")(x), model(x))


def test_trainer_trains_and_resumes_a_fusion(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs("llama", 8)["input_ids"]]

    def trainer(steps: int) -> tf.Trainer:
        model = two()
        model.add_composition("fused", Fuse("a", "b"))
        model.set_adapter("fused")
        options: dict[str, Any] = {"save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
        args = tf.TrainingArguments(str(tmp_path), max_steps=steps, per_device_train_batch_size=4, **options)
        return tf.Trainer(model, args, train_dataset=rows)

    first = trainer(4)
    start = [p.clone() for p in parameters_of(first.model, "fused")]
    first.train()
    trained = parameters_of(first.model, "fused")
    assert any((p - old).abs().max() > 0 for p, old in zip(trained, start))
    again = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.model.active_adapters == ["fused"]
    for found, wanted in zip(parameters_of(again.model, "fused"), trained):
        torch.testing.assert_close(found, wanted)


# --- ranges of tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "bottleneck", "reft"])
def test_a_split_gives_each_range_of_tokens_its_member(method):
    make = {
        "lora": lambda: LoraConfig(r=2, target_modules=["up_proj", "down_proj"]),
        "bottleneck": IN_BLOCKS["bottleneck"],
        "reft": lambda: ReftConfig(r=2, dropout=0.0, prefix_positions=5),
    }[method]
    model = get_peft_model(build("llama"), make(), "a")
    model.add_adapter("b", make())
    stir(model, "a", size=0.3)
    stir(model, "b", seed=5, size=0.3)
    ids = inputs("llama")["input_ids"]

    def run(what: Any, text: torch.Tensor, **more: Any) -> torch.Tensor:
        model.set_adapter(what)
        with torch.no_grad():
            return model.eval()(text, **more).logits

    split = Split("a", Stack("b", "a"), splits=[3])
    whole = run(split, ids)
    gives(whole[:, :3], run("a", ids)[:, :3])  # causal: the first tokens see none of the others
    differs(whole[:, 3:], run("a", ids)[:, 3:])
    gives(run(Split("a", "b", splits=[6, 1]), ids), run("a", ids))
    gives(run(Split("a", splits=[2]), ids)[:, :2], whole[:, :2])
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :2]), torch.ones_like(ids)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    both = torch.cat([padded[:1], torch.cat([ids, ids[:, :2]], 1)[1:]])  # a row is what it is alone
    masks = torch.cat([mask[:1], torch.ones_like(mask)[1:]])
    found = run(split, both, attention_mask=masks, position_ids=torch.cat([places[:1], torch.arange(8).expand(3, 8)]))
    gives(found[0, 2:], whole[0])
    gives(run(Parallel("a", split), ids)[4:], whole)
    model.set_adapter(split)
    first = model(ids[:, :4], use_cache=True)
    gives(model(ids[:, 4:], past_key_values=first.past_key_values).logits.detach(), whole[:, 4:])
    with pytest.raises(ValueError, match="depends on the token|acts on what a whole module"):
        model.merge_adapter()


def test_a_split_needs_tokens_that_can_be_counted():
    model = get_peft_model(build("bart"), LoraConfig(r=2, target_modules=["q_proj"]), "a")
    with refused(model, "reads the tokens of the encoder too"):
        model.set_adapter(Split("a", splits=[2]))
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["lm_head"]), "a")
    with refused(model, "is in no transformer block"):
        model.set_adapter(Split("a", splits=[2]))
    with pytest.raises(ConfigError, match="2 members, but 3 splits"):
        Split("a", "b", splits=[1, 2, 3])


# --- beside the other tools ---------------------------------------------------------------------------------------


def test_what_other_tools_make_of_a_composition():
    model = two()
    model.add_composition("mean", Average("a", "b"))
    model.add_composition("parallel", Parallel("a", "b"))
    wanted = of(model, "mean")
    config, tensors = convert_to_lora(model, 1.0, adapter_name="mean")
    lora = get_peft_model(build("llama"), config)
    set_peft_model_state_dict(lora, tensors)
    gives(logits(lora, "llama"), wanted)
    assert [finding for finding in check_training(model) if finding.code == "adapter_inactive"] == []
    assert model.get_model_status().peft_types["mean"] == "COMPOSITION"
    with pytest.raises(ValueError, match="made of other adapters, and has no tensors"):
        model.add_weighted_adapter(["a", "mean"], [1, 1], "sum")
    with pytest.raises(ValueError, match="divides the rows of a batch itself"):
        model(inputs("llama")["input_ids"], adapter_names=["parallel", "a", "b", "a"])
    with pytest.raises(ValueError, match="so it is active alone"):
        model.set_adapter(["parallel", "a"])
    gives(logits(copy.deepcopy(model), "llama"), wanted)
    plain = model.merge_and_unload()
    gives(logits(plain, "llama"), wanted)
    again = get_peft_model(plain, LoraConfig(r=2), "mean")  # the name means nothing any more
    assert again.active_composition is None and parameters_of(again, "mean")
    prompts = get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "a")
    with refused(prompts, "has virtual tokens"):
        prompts.set_adapter(Stack("a"))
