"""EVA: A from the principal components of inputs, ranks by what they explain."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

import peft
from peft import (
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
)
from peft.tuners.lora import EvaConfig
from peft.tuners.lora.components import shared_out
from peft.tuners.lora.eva import (
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peft.utils.warning import PeftWarning


RECORDED = Path(__file__).parent / "starts"
DATA = load_file(RECORDED / "eva.safetensors")
CASES = json.loads((RECORDED / "eva.json").read_text())
X = DATA["x"]
BATCHES = [X[i : i + 40] for i in range(0, 400, 40)]
PLAIN = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None,
         "show_progress_bar": False}  # fmt: skip


class Net(nn.Module):
    """Two layers with one input, one behind them, and one whose inputs have one direction."""

    def __init__(self):
        super().__init__()
        self.l1, self.l1b, self.l2, self.l3 = nn.Linear(16, 12), nn.Linear(16, 6), nn.Linear(12, 5), nn.Linear(10, 5)

    def forward(self, x):
        x, z = x[:, :16].contiguous(), x[:, 16:].contiguous()
        return torch.cat([self.l2(torch.tanh(self.l1(x))), self.l1b(x), self.l3(z)], 1)


def net():
    torch.manual_seed(0)
    return Net()


def started(**options):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["l1", "l1b", "l2", "l3"], init_lora_weights="eva",
        eva_config=EvaConfig(**options),
    )  # fmt: skip
    return get_peft_model(net(), config)


@pytest.mark.parametrize("case", list(CASES))
def test_vectors_and_ranks_are_those_of_the_reference(case):
    """Recorded with version 0.21.2 of the reference."""
    model = started(**CASES[case]["options"])
    initialize_lora_eva_weights(model, BATCHES, **PLAIN)
    config, state = model.peft_config["default"], model.state_dict()
    assert [config.rank_pattern, config.alpha_pattern] == [CASES[case]["ranks"], CASES[case]["alphas"]]
    for name, then in DATA.items():
        if name.startswith(f"{case}."):
            torch.testing.assert_close(state[name.removeprefix(f"{case}.")].abs(), then.abs(), atol=1e-4, rtol=1e-3)


def test_vectors_are_singular_vectors_of_the_inputs():
    """One batch over and over: the components are those of that batch about its mean."""
    model = started(rho=1.0)
    found = get_eva_state_dict(model, [X], **PLAIN)
    z = X[:, :16] - X[:, :16].mean(0)
    _, _, vt = torch.linalg.svd(z)
    torch.testing.assert_close(found["base_model.model.l1"].abs(), vt[:4].abs(), atol=1e-4, rtol=1e-3)
    assert torch.equal(found["base_model.model.l1"], found["base_model.model.l1b"])
    y, before = model(X).detach(), {n: p for n, p in model.named_parameters() if p.requires_grad}
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert torch.equal(model(X), y)
    assert before.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_training_without_the_start_is_said_once(tmp_path, recwarn):
    def said():
        found = [str(w.message) for w in recwarn if "initialize_lora_eva_weights" in str(w.message)]
        recwarn.clear()
        return len(found)

    warnings.simplefilter("always")
    model = started()
    model.eval()(X), model.train().requires_grad_(False)(X)
    with torch.no_grad():
        model(X)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["l1"]))
    model.set_adapter("plain")
    model(X)
    assert not said()  # nothing of it trains
    model.set_adapter("default")
    model(X), model(X)
    assert said() == 1
    injected = inject_adapter_in_model(LoraConfig(r=2, target_modules=["l1"], init_lora_weights="eva"), net())
    injected(X)
    assert said() == 1
    ready, other = started(), started()
    initialize_lora_eva_weights(ready, BATCHES, **PLAIN)
    ready.save_pretrained(tmp_path)
    ready.load_adapter(tmp_path, "again", is_trainable=True)
    peft.initialize(other, "gaussian")
    for each in (ready, other, PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)):
        each.train()(X)
    assert not said()


def test_ranks_follow_what_components_explain():
    shares = {"a": [0.9, 0.05, 0.01], "b": [0.4, 0.3, 0.2], "c": [0.4, 0.3, 0.2]}
    assert shared_out(shares, 6, {"c": "b"}) == {"a": 1, "b": 3, "c": 2}
    assert shared_out(shares, 1, {}) == {"a": 1, "b": 0, "c": 0}


def test_a_layer_without_rank_leaves_the_adapter_and_files_say_so(tmp_path):
    model = started()
    found = get_eva_state_dict(model, BATCHES, **PLAIN)
    del found["base_model.model.l3"]
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert type(model.base_model.model.l3) is nn.Linear
    nn.init.normal_(model.base_model.model.l1.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X))
    assert loaded.base_model.model.l1.lora_A["default"].weight.shape[0] == len(found["base_model.model.l1"])


def test_a_plain_model_and_a_start_afterwards():
    config = LoraConfig(r=2, target_modules=["l1"], init_lora_weights="eva")
    found = get_eva_state_dict(net(), BATCHES, config, **PLAIN)
    assert list(found) == ["l1"]
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["l1"]))
    peft.initialize(model, "eva", dataloader=BATCHES, **PLAIN)
    torch.testing.assert_close(model.base_model.model.l1.lora_A["default"].weight.abs(), found["l1"].abs())


def test_convolutions_start_from_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 2, stride=2))
    x = torch.randn(20, 3, 8)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    found = get_eva_state_dict(model, [x], config, **PLAIN)["0"]
    patches = x.unfold(2, 2, 2).permute(0, 2, 1, 3).reshape(-1, 6)  # [n, channels, kernel]
    _, _, vt = torch.linalg.svd(patches - patches.mean(0))
    torch.testing.assert_close(found.abs(), vt[:2].abs(), atol=1e-4, rtol=1e-3)
    peft_model = get_peft_model(model, config)
    initialize_lora_eva_weights(peft_model, [x], **PLAIN)
    torch.testing.assert_close(peft_model.base_model.model[0].lora_A["default"].weight.flatten(1), found)


def test_masks_of_padding_and_labels():
    batch = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[-100, 5, 5]])}
    config = LoraConfig(eva_config=EvaConfig())
    mask = prepare_model_inputs_fn_language_modeling(batch, config)
    assert mask.tolist() == [[False, True, False]]
    config.eva_config.use_label_mask = False
    assert prepare_model_inputs_fn_language_modeling(batch, config).tolist() == [[True, True, False]]
    x = torch.arange(6.0).view(1, 3, 2)
    assert prepare_layer_inputs_fn_language_modeling(x, mask, "l").tolist() == [[2.0, 3.0]]
    assert prepare_layer_inputs_fn_language_modeling(x, mask.nonzero(), "l").tolist() == [[2.0, 3.0]]  # as in 0.21.2
    for batch in (torch.tensor([[2, 0, 1]]), {"input_ids": mask}):
        with pytest.raises(ValueError, match="prepare_layer_inputs_fn=None"):
            prepare_layer_inputs_fn_language_modeling(x, batch, "l")
    with pytest.raises(ValueError, match="dict"):
        prepare_model_inputs_fn_language_modeling(x, config)


def test_layers_without_inputs_are_named():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva")
    peft_model = get_peft_model(model, config)
    table = peft_model.base_model.model[0].lora_embedding_A["default"].detach().clone()
    tokens = [torch.randint(20, (30,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with pytest.warns(PeftWarning, match=r"model\.0 \(1 in all\) have none"):
        initialize_lora_eva_weights(peft_model, tokens, **PLAIN)
    assert torch.equal(peft_model.base_model.model[0].lora_embedding_A["default"], table)


def test_what_is_missing_is_named():
    model = started()
    with pytest.raises(ValueError, match="dataloader"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="no batches"):
        get_eva_state_dict(model, [], **PLAIN)
    with pytest.raises(ValueError, match="peft_config"):
        get_eva_state_dict(net(), BATCHES)
    with pytest.raises(ValueError, match="'nowhere'"):
        initialize_lora_eva_weights(model, eva_state_dict={"nowhere": X})
    with pytest.raises(ValueError, match="not 'eva'"):
        initialize_lora_eva_weights(get_peft_model(net(), LoraConfig(target_modules=["l1"])), BATCHES)


def _process(rank, file, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        own = [batch[:25] if rank == 0 else batch[25:] for batch in BATCHES]  # of unequal sizes
        torch.save(get_eva_state_dict(started(), own, **PLAIN), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_see_all_rows(tmp_path):
    mp.start_processes(_process, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = get_eva_state_dict(started(), BATCHES, **PLAIN)
    assert one.keys() == other.keys() == alone.keys()
    for name, vectors in alone.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], vectors, atol=1e-4, rtol=1e-3)
