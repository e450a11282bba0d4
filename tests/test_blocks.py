"""Methods that act in, beside or after the blocks of a transformer, on the architectures that users have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ALL, DECODERS, ENCODER_DECODERS, ENCODERS, build, inputs
from in_blocks import differs, gives, logits, refused, stir, takes_turns, trains, unadapted
from safetensors.torch import load_file
from torch import nn
from toys import Mlp

from peft import AdaptionPromptConfig, BottleneckConfig, LoraConfig, PeftModel, ShadowConfig, get_peft_model
from peft.compat.shadow import DetachedShadowModel
from peft.core.blocks.blocks import ATTENTION, CROSS, FEEDFORWARD, find_blocks
from peft.core.model.walk import layers_of


pytestmark = pytest.mark.filterwarnings("ignore")


def greedy(model: nn.Module, name: str, use_cache: bool) -> torch.Tensor:
    """Three more tokens for four prompts: two of them by what a cache has kept."""
    ids = inputs(name)["input_ids"]
    return model.eval().generate(
        input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=use_cache
    )


def checkpoints(model: PeftModel, name: str) -> None:
    """Gradients are the same with gradient checkpointing as without."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)  # some dropouts are no modules
        model.train()(**inputs(name)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert gradients[0]
    for found, wanted in zip(*reversed(gradients), strict=True):
        gives(found, wanted)


# --- structure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_found_by_their_structure(name):
    blocks = find_blocks(build(name))
    assert [block.index for block in blocks] == list(range(4 if name in ENCODER_DECODERS else 2))
    for block in blocks:
        crossing = name in ENCODER_DECODERS and "decoder" in block.key
        wanted = [ATTENTION, CROSS, FEEDFORWARD] if crossing else [ATTENTION, FEEDFORWARD]
        assert [part.role for part in block.sublayers] == wanted


def test_a_model_without_attention_has_no_blocks():
    assert find_blocks(Mlp()) == []


# --- LLaMA-Adapter ----------------------------------------------------------------------------------------------

PROMPT = {"adapter_len": 3, "adapter_layers": 2}


def prompted(name: str, stirred: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(build(name), AdaptionPromptConfig(**{**PROMPT, "task_type": "CAUSAL_LM", **fields}))
    if stirred:
        stir(model)
    return model


@pytest.mark.parametrize("name", DECODERS)
class TestAdaptionPrompt:
    """Every decoder that computes by transformers' attention functions."""

    def test_starts_as_the_identity_and_trains(self, name):
        model = prompted(name, stirred=False)
        gives(logits(model, name), unadapted(name))
        trains(model, name)

    def test_saves_and_loads(self, name, tmp_path):
        model = prompted(name)
        differs(logits(model, name), unadapted(name))
        wanted = logits(model, name)
        model.save_pretrained(str(tmp_path))
        bare = model.unload()
        gives(logits(bare, name), unadapted(name))
        gives(logits(PeftModel.from_pretrained(bare, str(tmp_path)), name), wanted)

    def test_several_adapters_and_mixed_batches(self, name):
        model = prompted(name)
        model.add_adapter("other", AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"))
        stir(model, "other", seed=5)
        takes_turns(model, name)

    def test_generation_with_a_cache_is_generation_without(self, name):
        model = prompted(name)
        assert torch.equal(greedy(model, name, True), greedy(model, name, False))

    def test_gradient_checkpointing_gives_the_same_gradients(self, name):
        checkpoints(prompted(name), name)


def test_a_prompt_gives_what_its_formula_says():
    """attn' = attn + W_o g softmax(q K_p^T / sqrt(d)) V_p, with the keys of two groups for four heads."""
    model = prompted("llama", adapter_layers=1)
    layer = next(layer for _, layer in layers_of(model))
    attention, seen = layer.base_layer, {}

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen.update(kwargs, output=output[0])

    handle = layer.register_forward_hook(note, with_kwargs=True)
    logits(model, "llama")
    handle.remove()
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]

    def heads(states: torch.Tensor, count: int) -> torch.Tensor:
        return states.view(len(states), -1, count, 4).transpose(1, 2)

    def turned(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, -1)
        return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    with torch.no_grad():
        prompt, gate = layer.adaption_prompt["default"], layer.adaption_gate["default"]
        query = turned(heads(attention.q_proj(x), 4))
        keys, values = (heads(p(prompt), 2).repeat_interleave(2, 1) for p in (attention.k_proj, attention.v_proj))
        scores = torch.softmax(query @ keys.transpose(-1, -2) / 2, -1) @ values
        wanted = attention.o_proj(gate * scores.transpose(1, 2).reshape(x.shape))
        plain = attention(**{**{k: v for k, v in seen.items() if k != "output"}, "cache": None})[0]
    gives(seen["output"], plain + wanted)


def test_eager_attention_gives_the_same_as_sdpa():
    model = prompted("llama")
    wanted = logits(model, "llama")
    model.base_model.model.set_attn_implementation("eager")
    gives(logits(model, "llama"), wanted)


def test_prompts_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="adapter_len and adapter_layers must be set"):
        get_peft_model(build("llama"), AdaptionPromptConfig())
    with pytest.raises(ValueError, match="has 2 self-attentions called 'self_attn'"):
        get_peft_model(build("llama"), AdaptionPromptConfig(adapter_len=3, adapter_layers=5))
    with pytest.raises(ValueError, match="those found are called self_attn"):
        get_peft_model(build("llama"), AdaptionPromptConfig(target_modules="attn", adapter_len=3, adapter_layers=1))
    model = prompted("llama")
    with pytest.raises(ValueError, match="no one weight equals it"):
        model.merge_and_unload()


# --- bottleneck adapters ----------------------------------------------------------------------------------------

NAMED = ("bert", "roberta", "gpt2", "opt", "llama", "qwen2", "mistral", "gemma", "gemma3", "t5", "bart", "vit")
PRESETS = ("pfeiffer", "houlsby", "parallel", "scaled_parallel", "adapter_plus")
EXACT = ("parallel", "scaled_parallel")
"""Presets whose papers start W_up at zero; the others start near the identity."""


def bottlenecked(name: str, preset: str = "houlsby", stirred: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(2)
    kind = "SEQ_CLS" if name in ("bert", "roberta") else "SEQ_2_SEQ_LM" if name in ENCODER_DECODERS else "CAUSAL_LM"
    config = BottleneckConfig(preset=preset, **{"reduction_factor": 4, **fields})
    config.task_type = None if name in ENCODERS else kind
    model = get_peft_model(build(name), config)
    if stirred:
        stir(model, size=0.1)
    return model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMED)
def test_a_bottleneck_starts_near_the_identity_trains_saves_and_loads(name, preset, tmp_path):
    base = unadapted(name)
    model = bottlenecked(name, preset, stirred=False)
    start = (logits(model, name) - base).abs().max()
    assert start < (1e-6 if preset in EXACT else 0.03)
    trains(model, name, rate=0.03)
    trained = logits(model, name)
    differs(trained, base)
    with model.disable_adapter():
        gives(logits(model, name), base)
    model.save_pretrained(str(tmp_path))
    bare = model.unload()
    gives(logits(bare, name), base)
    gives(logits(PeftModel.from_pretrained(bare, str(tmp_path)), name), trained)


@pytest.mark.parametrize("name", NAMED)
class TestBottleneck:
    """What does not depend on the preset, on every architecture."""

    def test_several_adapters_and_mixed_batches(self, name):
        model = bottlenecked(name)
        model.add_adapter("other", BottleneckConfig(preset="adapter+", reduction_factor=2, leave_out=[0]))
        stir(model, "other", seed=5)
        takes_turns(model, name)

    def test_gradient_checkpointing_gives_the_same_gradients(self, name):
        checkpoints(bottlenecked(name), name)

    def test_generation_with_a_cache_is_generation_without(self, name):
        if name in ENCODERS:
            pytest.skip("it does not generate")
        model = bottlenecked(name, cross_adapter=True)
        assert torch.equal(greedy(model, name, True), greedy(model, name, False))


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "t5"])  # one of each order of sums and norms
def test_a_copy_and_a_pickle_act_on_their_own(name, tmp_path):
    model = bottlenecked(name)
    wanted = logits(model, name)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    stir(model, seed=7)
    differs(logits(model, name), wanted)
    gives(logits(twin, name), wanted)
    gives(logits(torch.load(tmp_path / "model.pt", weights_only=False), name), wanted)


def by_the_book(config: BottleneckConfig, u: Any, h: torch.Tensor, x: torch.Tensor, norm: Any) -> torch.Tensor:
    """What a sequential adapter makes of a sub-layer's output h and the stream x, step by step."""
    residual = read = h
    if config.original_ln_before:
        read = norm(h + x)
        residual = {True: h, "post_add": h + x, False: read}[config.residual_before_ln]
    out = u(read, residual) + residual
    return norm(out + x) if config.original_ln_after else out


ORDERS = [
    {"original_ln_before": before, "original_ln_after": after, "residual_before_ln": residual, **own}
    for before in (True, False)
    for after in (True, False)
    for residual in ((True, "post_add", False) if before else (True,))
    for own in ({}, {"ln_before": True, "ln_after": True, "adapter_residual_before_ln": True})
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(str(value) for value in order.values()))
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_order_of_sums_and_norms_is_the_one_asked_for(name, order):
    """BERT normalises the sum, LLaMA what a sub-layer reads: there N is left out."""
    model = bottlenecked(name, "pfeiffer", **order)
    layer = list(layers_of(model))[-1][1]
    block, seen = layer.base_layer, {}
    stream, out = (block.output, block.output.dense) if name == "bert" else (block.post_attention_layernorm, block.mlp)
    handles = [
        stream.register_forward_pre_hook(lambda module, args: seen.update(x=args[-1])),
        layer.register_forward_hook(lambda module, args, output: seen.update(y=output)),
    ]
    logits(model, name)
    for handle in handles:
        handle.remove()
    bottleneck, norm = layer.bottleneck_feedforward["default"], block.output.LayerNorm if name == "bert" else None
    with torch.no_grad():
        x = seen["x"]
        h = out.forward(block.intermediate(x) if name == "bert" else stream.forward(x))
        plain = norm.forward if norm is not None else lambda z: z
        wanted = by_the_book(model.peft_config["default"], bottleneck, h, x, plain)
    y = seen["y"] if isinstance(seen["y"], torch.Tensor) else seen["y"][0]
    gives(y, wanted)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_parallel_adapter_reads_what_the_network_reads(name):
    model = bottlenecked(name, "parallel")
    layer = list(layers_of(model))[-1][1]
    block, seen = layer.base_layer, {}
    first, out = (block.intermediate, block.output.dense) if name == "bert" else (block.mlp, block.mlp)
    logits(model, name)
    first.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    out.register_forward_hook(lambda module, args, output: seen.update(h=output))
    logits(model, name)
    with torch.no_grad():
        h = out.forward(block.intermediate.forward(seen["x"]) if name == "bert" else seen["x"])
        adapter = layer.bottleneck_feedforward["default"]
        u = adapter.up(torch.relu(adapter.down(seen["x"]))) * 4
    gives(seen["h"], h + u)


def test_the_fields_do_what_they_say():
    def of(**fields: Any) -> nn.Module:
        model = bottlenecked("llama", "pfeiffer", **fields)
        return next(layer for _, layer in layers_of(model)).bottleneck_feedforward["default"]

    torch.manual_seed(0)
    h = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert of(reduction_factor=0.5).down.out_features == 32
        assert of(reduction_factor={0: 8, "default": 2}).down.out_features == 2
        plain = of(non_linearity="tanh")
        u = plain.up(torch.tanh(plain.down(h)))
        gives(plain(h, h), u)
        gives(of(non_linearity="tanh", scaling=3.0)(h, h), 3 * u)
        one, channels = of(scaling="learned"), of(scaling="channel")
        assert one.scale.shape == (1,) and channels.scale.shape == (16,)
        gives(channels(h, h), channels.up(torch.relu(channels.down(h))) * channels.scale)
        gated = of(use_gating=True)
        gate = torch.sigmoid(gated.gate(h)).mean(1, keepdim=True)
        gives(gated(h, h), gated.up(torch.relu(gated.down(h))) * gate)
        normed = of(ln_before=True, ln_after=True)
        gives(normed(h, h), normed.norm_after(normed.up(torch.relu(normed.down(normed.norm_before(h))))))
        dropped = of(dropout=0.5).train()(h, h)
        assert 0.2 < (dropped == 0).float().mean() < 0.8
        many = torch.randn(400, 1, 16)
        deep = of(stochastic_depth=0.25)
        rows = deep.train()(many, many)
        left = (rows == 0).all(-1).all(-1)
        assert 0.15 < left.float().mean() < 0.35
        gives(rows[~left], deep.eval()(many, many)[~left] / 0.75)


@pytest.mark.parametrize(("start", "bound"), [("bert", 0.1), ("houlsby", 0.0201), ("mam_adapter", 0.3)])
def test_bottlenecks_start_as_asked(start, bound):
    model = bottlenecked("llama", "pfeiffer", stirred=False, init_weights=start, reduction_factor=1)
    adapter = next(layer for _, layer in layers_of(model)).bottleneck_feedforward["default"]
    assert adapter.down.weight.abs().max() <= bound
    assert bool((adapter.up.weight == 0).all()) == (start == "mam_adapter")
    assert adapter.down.bias.abs().max() == adapter.up.bias.abs().max() == 0


def test_blocks_are_left_out_and_cross_attentions_taken_in():
    model = bottlenecked("t5", "pfeiffer", leave_out=[0, 2], output_adapter=False, cross_adapter=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.partition(".bottleneck_")[0] for name in names} == {"base_model.model.decoder.block.1"}
    assert all(".bottleneck_cross.default." in name for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "pfeifer"}, "pfeiffer"),
        ({"scaling": "chanel"}, "'learned' or 'channel'"),
        ({"reduction_factor": 0}, "should be positive"),
        ({"reduction_factor": {"0": 4}}, "should have a 'default'"),
        ({"non_linearity": "rellu"}, "Did you mean 'relu'"),
        ({"leave_out": [0, 1]}, "leave_out=.0, 1. are left out"),
        ({"output_adapter": False}, "stands at no sub-layer"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    base = build("llama")
    with refused(base, message):
        get_peft_model(base, BottleneckConfig(**fields))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="it has 0 transformer blocks"):
        get_peft_model(Mlp(), BottleneckConfig())


def test_the_saved_config_names_what_the_preset_means(tmp_path):
    model = bottlenecked("llama", "par_bn", scaling=2.0)
    model.save_pretrained(str(tmp_path))
    config = BottleneckConfig.from_pretrained(str(tmp_path))
    assert (config.is_parallel, config.scaling, config.init_weights) == (True, 2.0, "mam_adapter")
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.bottleneck_feedforward.down.weight" in file


TARGETS = {"bert": ["query", "output.dense"], "llama": ["q_proj", "down_proj"]}
"""Of the LoRA that acts beside others; by default where nothing is said."""
TOGETHER = [(name, first) for name in TARGETS for first in ("lora", "bottleneck", "prompt")]
TOGETHER += [(name, "lora") for name in NAMED if name not in TARGETS]


@pytest.mark.parametrize(("name", "first"), TOGETHER)
def test_a_bottleneck_a_lora_and_a_prompt_act_together(name, first):
    """Whichever comes first: the adapter in a block reads what the adapted sub-layers give."""
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=TARGETS.get(name), r=2),
        "bottleneck": BottleneckConfig(preset="houlsby", reduction_factor=4),
    }
    if name in TARGETS:
        configs["prompt"] = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
    order = [first, *(key for key in configs if key != first)]
    torch.manual_seed(0)
    model = get_peft_model(build(name), configs[first], adapter_name=first, mixed=True)
    for key in order[1:]:
        model.add_adapter(key, configs[key])
    for seed, key in enumerate(configs):
        stir(model, key, seed=seed, size=0.2)
    model.set_adapter(order)
    together = logits(model, name)
    assert all(p.requires_grad for _, layer in layers_of(model) for k in order for p in layer.adapter_parameters(k))
    for left_out in configs:
        model.set_adapter([key for key in configs if key != left_out])
        differs(logits(model, name), together)
    parts = {key: {} for key in configs}
    for path, layer in layers_of(model):
        for key in configs:
            for saved, _, tensor in layer.adapter_state(key):
                parts[key][plain_path(path), saved] = tensor
    # LoRA in the weights, then the others
    base = build(name)
    merged = get_peft_model(base, configs["lora"], adapter_name="lora")
    put(merged, "lora", parts["lora"])
    *others, last = [key for key in configs if key != "lora"]
    again = get_peft_model(merged.merge_and_unload(), configs[last], adapter_name=last, mixed=True)
    for key in others:
        again.add_adapter(key, configs[key])
    again.set_adapter([last, *others])
    for key in (last, *others):
        put(again, key, parts[key])
    gives(logits(again, name), together)


def put(model: nn.Module, adapter: str, parts: dict[tuple[str, str], torch.Tensor]) -> None:
    """Fill an adapter with tensors by (layer in the plain model, name in the file)."""
    with torch.no_grad():
        for path, layer in layers_of(model):
            for saved, _, tensor in layer.adapter_state(adapter):
                tensor.copy_(parts[plain_path(path), saved])


def plain_path(path: str) -> str:
    """The name of a layer in the plain model."""
    return path.replace(".base_layer", "").removeprefix("base_model.model.")


# --- Shadow -----------------------------------------------------------------------------------------------------

SHADOWED = ("llama", "mistral", "gemma", "gpt2", "opt")


def shadowed(name: str, stirred: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(build(name), ShadowConfig(r=4, task_type="CAUSAL_LM", **fields))
    if stirred:
        stir(model, size=0.2)
    return model


@pytest.mark.parametrize("name", SHADOWED)
class TestShadow:
    """A shadow network beside decoders."""

    def test_starts_as_the_identity_trains_saves_and_loads(self, name, tmp_path):
        base = unadapted(name)
        model = shadowed(name, stirred=False)
        gives(logits(model, name), base)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
        losses = []
        for _ in range(4):
            loss = model.eval()(**inputs(name)).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        trained = logits(model, name)
        differs(trained, base)
        model.save_pretrained(str(tmp_path))
        gives(logits(PeftModel.from_pretrained(build(name), str(tmp_path)), name), trained)
        with model.disable_adapter():
            gives(logits(model, name), base)
        plain = model.unload()
        gives(logits(plain, name), base)

    def test_generation_with_a_cache_is_generation_without(self, name):
        model = shadowed(name)
        assert torch.equal(greedy(model, name, True), greedy(model, name, False))
        beams = [
            model.generate(
                input_ids=inputs(name)["input_ids"], num_beams=3, do_sample=False, max_new_tokens=5, use_cache=cached
            )
            for cached in (True, False)
        ]
        assert torch.equal(*beams)

    def test_several_adapters_and_mixed_batches(self, name):
        model = shadowed(name)
        model.add_adapter("other", ShadowConfig(r=2, shadow_num_hidden_layers=2, task_type="CAUSAL_LM"))
        stir(model, "other", seed=5, size=0.2)
        takes_turns(model, name)

    def test_gradient_checkpointing_gives_the_same_gradients(self, name):
        checkpoints(shadowed(name, shadow_dropout=0.0), name)

    def test_the_shadow_network_stands_alone(self, name):
        model = shadowed(name)
        alone = model.base_model.unload_shadow(copy=True)
        assert isinstance(alone, DetachedShadowModel)
        labels = inputs(name)["input_ids"]
        logits(model, name)
        with torch.no_grad():
            wanted = model.base_model.shadow_auxiliary_loss(labels)
            gives(alone(input_ids=labels, labels=labels).loss, wanted)
        assert alone.generate(input_ids=labels, max_new_tokens=2, do_sample=False).shape[0] == len(labels)


def test_shadow_gives_what_its_formula_says():
    """h <- h + alpha W_up W_down (h - s), then the block, then s <- (1 - g) s + g T(h)."""
    model = shadowed("llama")
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    held = [layer for _, layer in layers_of(model)]
    for layer in held:
        layer.base_layer.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        logits(model, "llama")
        h = model.get_input_embeddings()(ids)
        s = held[0].shadow_backbone["default"](inputs_embeds=h).last_hidden_state
        for layer, (given, output) in zip(held, calls, strict=True):
            gives(given, h + 0.1 * layer.shadow_up["default"](layer.shadow_down["default"](h - s)))
            h, gate = output, torch.sigmoid(layer.shadow_update_gate["default"](output))
            s = (1 - gate) * s + gate * layer.shadow_update_transform["default"](output)


def test_the_loss_of_the_shadow_network_is_added():
    model = shadowed("llama", auxiliary_loss_weight=0.3)
    given = inputs("llama")
    together = model.eval()(**given).loss
    alone = model.base_model.last_shadow_loss
    with torch.no_grad():
        plain = model(input_ids=given["input_ids"]).logits
        own = nn.functional.cross_entropy(plain[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    gives(together.detach(), own + 0.3 * alone)


def test_shadow_networks_may_be_narrower_and_have_embeddings_of_their_own():
    model = shadowed("llama", shadow_hidden_size=8, shadow_num_attention_heads=2, shadow_intermediate_size=12)
    backbone = model.base_model.shadow_backbone["default"]
    assert backbone.embed_tokens.weight.shape == (40, 8)
    assert model.base_model.shadow_projection["default"].weight.shape == (16, 8)
    assert torch.equal(greedy(model, "llama", True), greedy(model, "llama", False))
    assert shadowed("llama", share_embeddings=False).base_model.shadow_backbone["default"].embed_tokens is not None


def test_a_cache_that_was_filled_without_the_shadow_is_refused():
    model = shadowed("llama")
    ids = inputs("llama")["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="filled without adapter 'default'"):
        model(input_ids=ids[:, :1], cache=cache.cache if "cache" in cache else cache.past_key_values)


def test_shadow_refuses_models_with_two_stacks():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has 2"):
        get_peft_model(build("t5"), ShadowConfig())
    with pytest.raises(ValueError, match=r"name no transformer block; these are model.layers.0, model.layers.1"):
        get_peft_model(build("llama"), ShadowConfig(target_modules=["q_proj"]))


def test_shadows_of_different_blocks_live_side_by_side():
    model = shadowed("llama", target_modules=["layers.0"])
    model.add_adapter("upper", ShadowConfig(r=2, target_modules=["layers.1"], task_type="CAUSAL_LM"))
    stir(model, "upper", seed=5, size=0.2)
    model.set_adapter("upper")
    wanted = logits(model, "llama")
    differs(wanted, unadapted("llama"))
    assert model(**inputs("llama")).loss.isfinite() and model.base_model.last_shadow_loss > 0
    model.delete_adapter("default")
    gives(logits(model, "llama"), wanted)
