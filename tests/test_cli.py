"""The command line, on tiny random models: every command, its exit status, and what a run leaves behind."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft


pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from peft.cli import main  # noqa: E402
from peft.cli.run import COMMANDS, command  # noqa: E402
from peft.tools.merging import merge_files  # noqa: E402
from peft.utils import merge_utils  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, with a template for chats."""
    words = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    made = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.chat_template = CHAT
    return found


def make_model(folder: Path, **more: Any) -> Path:
    """A random llama with its tokenizer, saved."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    words = tokenizer()
    config = LlamaConfig(
        **{**sizes, "vocab_size": len(words), "pad_token_id": 2, "max_position_embeddings": 256, **more}
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=more.get("shards", "5GB"))
    words.save_pretrained(folder)
    return folder


ROWS = [{"text": f"film {i} of {i % 7}", "label": ["bad", "good"][i % 2]} for i in range(32)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model and data of all kinds."""
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "base")
    kinds = {
        "rows": ROWS,
        "texts": [{"text": row["text"]} for row in ROWS],
        "pairs": [{"prompt": row["text"], "completion": " " + row["label"]} for row in ROWS],
        "chats": [
            {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
            for r in ROWS
        ],
        "preferences": [{"prompt": r["text"], "chosen": " " + r["label"], "rejected": " no"} for r in ROWS],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder


@pytest.fixture
def peft_(home, monkeypatch, capsys):
    """Run a command in the folder, as JSON; returns its status and what it printed."""
    monkeypatch.chdir(home)

    def call(*words: Any) -> tuple[int, Any]:
        status = main([*map(str, words), "--json"])
        printed = capsys.readouterr().out
        return status, json.loads(printed) if printed else None

    return call


QUICK = ["--model=base", "--trainer.device=cpu", "--trainer.steps=2", "--trainer.batch_size=4",
         "--trainer.max_length=64", "--trainer.log_every=1", "--trainer.save_every=2"]  # fmt: skip


def trained(peft_, output: Path, *words: Any) -> dict[str, Any]:
    """A training that has to succeed."""
    status, found = peft_("train", *QUICK, f"--output={output}", *words)
    assert status == 0, found
    return found


class TestTrain:
    @pytest.mark.parametrize(
        "words",
        [
            ["--data=texts.jsonl"],
            ["--data=texts.jsonl", "--trainer.packing=true"],
            ["--data=pairs.jsonl", "--data.held_out=4"],
            ["--data=chats.jsonl"],
            ["--data=rows.csv", "--data.prompt={text}", "--data.completion= {label}"],
            ["--data=rows.parquet", "--data.text={text} is {label}"],
            ["--data=preferences.jsonl", "--task=dpo"],
            ["--data=rows.jsonl", "--task=classify", "--data.held_out=8"],
        ],
        ids=lambda words: "-".join(word.strip("-") for word in words),
    )
    def test_every_task_and_form_of_data(self, peft_, tmp_path, words):
        found = trained(peft_, tmp_path, *words)
        assert found["metrics"]["steps"] == 2 and found["metrics"]["train_loss"] > 0
        if "--task=classify" in words:
            assert 0 <= found["metrics"]["eval_accuracy"] <= 1
        adapter = tmp_path / "adapter"
        assert (adapter / "adapter_model.safetensors").is_file()
        assert "| train_loss |" in (adapter / "README.md").read_text()
        assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["trainer"]["learning_rate"] != "auto"

    def test_a_killed_run_goes_on_and_ends_at_the_same_losses(self, peft_, tmp_path, capsys):
        """Killed by the system while it trains, with dropout; what was half written then does not count."""
        words = [*QUICK, "--data=pairs.jsonl", "--adapter.lora_dropout=0.2", "--trainer.steps=6",
                 "--trainer.save_every=2", "--trainer.learning_rate=0.01"]  # fmt: skip
        status, found = peft_("train", *words, f"--output={tmp_path / 'whole'}")
        assert status == 0, found
        killed = tmp_path / "killed"
        child = os.fork()
        if child == 0:
            try:
                main(["train", *words, f"--output={killed}", "--json"])
            finally:
                os._exit(3)  # it ran to its end: the test below sees a finished run
        deadline = time.monotonic() + 200
        while not (killed / "checkpoints" / "checkpoint-4").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the run ended before it was killed"
        assert not (killed / "metrics.json").exists()
        status, found = peft_("train", *words, f"--output={killed}")
        assert status == 0 and found["metrics"]["steps"] == 6
        assert losses(killed) == losses(tmp_path / "whole") and len(losses(killed)) == 6
        status, found = peft_("train", *words, f"--output={killed}")
        assert status == 1 and "finished" in found["error"]
        status, found = peft_("train", *words, f"--output={killed}", "--trainer.steps=9")
        assert status == 1 and "trainer.steps 6 -> 9" in found["error"]

    def test_two_processes_give_the_losses_of_one_with_twice_the_batch(self, peft_, home, tmp_path):
        """By accelerate, with the recipe for that; on the CPU the two work together, each with the whole base."""
        recipe = [str(ROOT / "recipes" / "sharded.yaml"), *QUICK, "--data.train=rows.jsonl", "--data.held_out=0",
                  "--trainer.learning_rate=0.05", "--trainer.steps=3"]  # fmt: skip
        two = ["train", *recipe, f"--output={tmp_path / 'two'}", "--json"]
        launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "examples" / "distributed" / "ddp.yaml")]
        command = [sys.executable, "-m", *launch, "--main_process_port=0", "-m", "peft"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(peft.__file__).parents[1]), *sys.path])}
        done = subprocess.run([*command, *two], cwd=home, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        remarks = json.loads(done.stdout[done.stdout.index("{") :])["remarks"]
        assert any("trainer.shard does nothing on CPUs" in remark for remark in remarks)
        one = ["train", *recipe, "--set", "trainer.batch_size=8", f"--output={tmp_path / 'one'}"]
        status, found = peft_(*one)
        assert status == 0, found
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)

    def test_what_is_wrong_is_said_before_the_first_step(self, peft_, tmp_path):
        """A rate for all weights, and answers that are cut off."""
        found = trained(
            peft_, tmp_path, "--data=pairs.jsonl", "--trainer.learning_rate=1e-6", "--trainer.max_length=12"
        )
        codes = {remark.partition(":")[0] for remark in found["remarks"]}
        assert "low_learning_rate" in codes and any("samples have no answer" in r for r in found["remarks"]), found
        status, found = peft_("train", *QUICK, f"--output={tmp_path}", "--data=pairs.jsonl", "--trainer.max_length=4")
        assert status == 1 and "trainer.max_length=4" in found["error"]

    def test_the_rate_of_every_method_is_known(self):
        from peft.tools.catalogue import methods
        from peft.tools.learning_rates import LEARNING_RATES, learning_rate_of

        assert {method.key for method in methods()} == set(LEARNING_RATES)
        lora = peft.LoraConfig()
        assert (
            learning_rate_of(lora, "dpo").value
            < learning_rate_of(lora).value
            < learning_rate_of(peft.IA3Config()).value
        )


def losses(folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OF_RECIPE = {"instruct_lora": "chats", "dpo": "preferences"}


@pytest.mark.parametrize("recipe", [file for file in RECIPES if file.stem != "sharded"], ids=lambda file: file.stem)
def test_every_recipe_runs(peft_, tmp_path, recipe):
    """On a tiny model and few rows, with nothing else changed; `sharded` runs above, in two processes."""
    if "quantization" in yaml.safe_load(recipe.read_text())["model"]:
        pytest.importorskip("bitsandbytes")
    data = OF_RECIPE.get(recipe.stem, "rows")
    words = [*QUICK, f"--data.train={data}.jsonl", f"--output={tmp_path}"]
    words += ["--data.eval", f"{data}.jsonl"] if data != "rows" else ["--data.held_out=8"]
    status, found = peft_("train", recipe, *words)
    assert status == 0, found
    assert found["metrics"]["steps"] == 2
    head = recipe.read_text().split("\ntask:")[0]
    assert "Needs:" in head and ("Takes:" in head or "Not timed." in head) and f"recipes/{recipe.name}" in head


def test_every_recipe_has_a_run():
    assert {file.stem for file in RECIPES} >= {
        "sentiment", "instruct_lora", "qlora_nf4", "dora", "classify_ia3", "prompt_tuning", "dpo", "two_adapters",
        "sharded",
    }  # fmt: skip


@pytest.fixture(scope="module")
def adapters(home) -> dict[str, str]:
    """Adapters of several methods on the model, with values that show, saved; and one of classes."""
    base = LlamaForCausalLM.from_pretrained(home / "base")
    made = {
        "one": peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
        "two": peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["k_proj"], task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                              task_type="CAUSAL_LM"),
        "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        "head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }  # fmt: skip
    torch.manual_seed(1)
    for name, config in made.items():
        model = peft.get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(home / name)
        base = model.unload()
    return {name: name for name in made}


def logits(model: Any) -> torch.Tensor:
    """What a model says to a few tokens."""
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


class TestMerge:
    @pytest.mark.parametrize("name", ["one", "dora", "ia3", "oft", "norms", "head"])
    def test_the_files_are_those_of_merging_in_memory(self, peft_, adapters, tmp_path, name):
        status, found = peft_("merge", "base", name, "-o", tmp_path)
        assert status == 0 and found["in_memory"] is None and found["changed"] > 0
        wanted = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), name).merge_and_unload()
        merged = LlamaForCausalLM.from_pretrained(tmp_path)
        for key, value in wanted.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[key], value, rtol=0, atol=1e-6, msg=key)
        assert (tmp_path / "chat_template.jinja").read_text() == CHAT
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("ab") == tokenizer().encode("ab")

    def test_what_is_said_of_a_combination_arrives(self, peft_, adapters, tmp_path):
        flags = ["--weights=[0.7,-0.4]", "--combination=ties_svd", "--density=0.6", "--rank=2", "--clamp=0.9",
                 "--majority_sign_method=frequency", "-o", tmp_path]  # fmt: skip
        assert peft_("merge", "base", "one", "two", *flags)[0] == 0
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "one", adapter_name="a")
        model.load_adapter("two", "b")
        given = {"density": 0.6, "svd_rank": 2, "svd_clamp": 0.9, "majority_sign_method": "frequency"}
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", combination_type="ties_svd", **given)
        model.set_adapter("sum")
        wanted = logits(model.eval())
        torch.testing.assert_close(
            logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), wanted, atol=1e-4, rtol=1e-4
        )
        status, found = peft_("merge", "base", "one", "two", "--density=0.5", "-o", tmp_path / "out")
        assert status == 1 and "density=0.5 has no effect on 'cat'" in found["error"]

    @pytest.mark.parametrize("way", ["linear", "ties", "knots_svd"])
    def test_adapters_that_are_no_lora_are_combined_by_their_weights(self, peft_, adapters, tmp_path, way):
        density = [] if way == "linear" else ["--density=0.6"]
        status, found = peft_("merge", "base", "ia3", "again=ia3", "--weights=[0.7,-0.4]", f"--combination={way}",
                              *density, "-o", tmp_path)  # fmt: skip
        assert status == 0 and found["in_memory"] is None, found
        base, merged = LlamaForCausalLM.from_pretrained("base"), LlamaForCausalLM.from_pretrained(tmp_path)
        whole = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "ia3").merge_and_unload()
        define = getattr(merge_utils, {"linear": "task_arithmetic"}.get(way, way.removesuffix("_svd")))
        for (name, plain), changed, found in zip(base.named_parameters(), whole.parameters(), merged.parameters()):
            update = [changed.data - plain.data] * 2
            arguments = {} if way == "linear" else {"density": 0.6}
            wanted = plain.data + define(update, torch.tensor([0.7, -0.4]), **arguments) if update[0].any() else plain
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=name)

    def test_the_dtype_asked_for(self, peft_, adapters, tmp_path):
        assert peft_("merge", "base", "one", "-o", tmp_path, "--dtype=bfloat16")[0] == 0
        merged = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        wanted = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "one").merge_and_unload()
        assert torch.equal(merged.lm_head.weight, wanted.lm_head.weight.bfloat16())

    def test_a_tied_head_is_merged_in_memory(self, peft_, tmp_path):
        make_model(tmp_path / "tied", tie_word_embeddings=True)
        base = LlamaForCausalLM.from_pretrained(tmp_path / "tied")
        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config).eval()
        wanted = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        status, found = peft_("merge", tmp_path / "tied", tmp_path / "adapter", "-o", tmp_path / "out")
        assert status == 0 and "tied embedding" in found["in_memory"]
        torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()), wanted)

    def test_what_cannot_be_merged_leaves_nothing_behind(self, peft_, adapters, tmp_path):
        status, found = peft_("merge", "base", "prompt", "-o", tmp_path / "out")
        assert status == 1 and "no weight equals" in found["error"] and not (tmp_path / "out").exists()
        status, found = peft_("merge", "base", "one", "-o", "base")
        assert status == 1 and "folder of the base" in found["error"]

    def test_peak_memory_is_that_of_a_shard_and_not_of_the_model(self, tmp_path):
        """Eight shards of 20 MB; the peak above what the process held before. A model that is read shows."""
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 16, "vocab_size": 99}
        base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
        base.save_pretrained(tmp_path / "base", max_shard_size="21MB")
        peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
        del base
        shards = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
        assert len(shards) >= 8
        merged = peak(lambda: merge_files(tmp_path / "base", {"a": str(tmp_path / "adapter")}, tmp_path / "out"))
        loaded = peak(lambda: [p + 0 for p in LlamaForCausalLM.from_pretrained(tmp_path / "base").parameters()])
        assert merged < 3.5 * max(shards) < 0.5 * loaded
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(shards)


def peak(call: Any) -> int:
    """Bytes that a call holds at most, above what the process held before."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator holds free would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("this system does not tell the peak of a process")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


class TestOtherCommands:
    def test_inspect_tells_sizes_updates_and_broken_tensors(self, peft_, adapters, tmp_path):
        status, found = peft_("inspect", "one", "--base=base", f"--plot={tmp_path}")
        assert found["servers"]["vllm"]["problems"] == []
        assert not peft_("inspect", "ia3")[1]["servers"]["vllm"]["loads"]
        assert status == 0 and found["fits"] and found["method"] == "LORA" and found["settings"]["r"] == 3
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "one")
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
        change = layer.get_delta_weight("default")
        (seen,) = [each for each in found["layers"] if each["name"] == "model.layers.1.mlp.down_proj"]
        assert seen["relative"] == pytest.approx(float(change.norm() / layer.weight.norm()), rel=1e-4)
        values = torch.linalg.svdvals(change)[:3]
        assert seen["spectrum"] == pytest.approx(values.tolist(), rel=1e-3)
        shares = values / values.sum()
        assert seen["effective_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-3)
        assert (tmp_path / "updates.png").stat().st_size > 1000 and (tmp_path / "spectra.png").is_file()

        for name, value in model.named_parameters():
            if "layers.0.self_attn.q_proj.lora_A" in name:
                value.data[0, 0] = float("nan")
            if "layers.0.self_attn.v_proj.lora_B" in name:
                value.data.zero_()
        model.save_pretrained(tmp_path / "broken")
        status, found = peft_("inspect", tmp_path / "broken")
        assert status == 1 and [name for name in found["broken"] if "q_proj" in name] == found["broken"] != []
        assert len(found["zero"]) == 1 and "v_proj" in found["zero"][0]

    def test_inspect_tells_that_a_base_does_not_fit(self, peft_, adapters, tmp_path):
        make_model(tmp_path / "wide", hidden_size=128)
        status, found = peft_("inspect", "one", "--base", tmp_path / "wide")
        assert status == 1 and found["fits"] is False and found["why_not"]

    def test_generate_answers_each_prompt_by_its_adapter(self, peft_, adapters, tmp_path):
        rows = [
            {"prompt": "ab", "adapter": "one"},
            {"prompt": "abcde", "adapter": "b"},
            {"prompt": "x", "adapter": "base"},
        ]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        call = ["generate", "one", "b=two", "--max_new_tokens=5"]
        status, found = peft_(*call, "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "answers.jsonl")
        assert status == 0 and len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
        for row, name in zip(rows, ("one", "two", None)):
            words = [
                "generate",
                *([name] if name else ["--base=base"]),
                "--max_new_tokens=5",
                "--prompt",
                row["prompt"],
            ]
            (alone,) = peft_(*words)[1]["answers"]
            assert alone["answer"] == next(a for a in found["answers"] if a["prompt"] == row["prompt"])["answer"]
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "adapter": "onne"}')
        status, found = peft_(*call, "--prompts", tmp_path / "prompts.jsonl")
        assert status == 1 and "line 1" in found["error"] and "'one'" in found["error"]

    def test_eval_sets_the_base_and_adapters_side_by_side(self, peft_, adapters):
        status, found = peft_("eval", "one", "two", "--data=pairs.jsonl", "--trainer.device=cpu")
        assert status == 0 and list(found["results"]) == ["base", "one", "two"]
        words = tokenizer()
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "two")
        total = count = 0
        for row in ROWS:
            prompt, answer = words.encode(row["text"]), words.encode(f" {row['label']}</s>")
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            count += len(answer)
        assert found["results"]["two"]["loss"] == pytest.approx(total / count, rel=1e-3)
        assert found["results"]["base"]["loss"] != found["results"]["two"]["loss"]

    def test_estimate_gives_settings_side_by_side_and_the_largest_batch(self, peft_, home, tmp_path):
        words = ["estimate", "base", "--method=lora,dora", "--batch=1,4", "--length=32", "--memory=2MB"]
        status, found = peft_(*words, "--adapter={r: 2, target_modules: all-linear}", f"--plot={tmp_path / 'm.png'}")
        rows = found["settings"]
        assert status == 0 and len(rows) == 4 and (tmp_path / "m.png").is_file()
        base = LlamaForCausalLM.from_pretrained("base")
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")

        def total(batch: int) -> int:
            return peft.estimate_memory(base.config, config, batch, 32, device="cuda").total

        assert rows[1]["total"] == total(4)
        largest = rows[0]["largest_batch"]
        assert total(largest) <= 2e6 < total(largest + 1)
        assert peft_("estimate", "base", "--memory=2parsecs")[0] == 1

    def test_compare_trains_each_once_and_goes_on(self, peft_, tmp_path):
        words = ["compare", *QUICK, "--data=pairs.jsonl", "--data.held_out=4", f"--output={tmp_path}"]
        status, first = peft_(*words, "--methods=[lora]")
        assert status == 0
        status, found = peft_(*words, "--methods", "lora,ia3")
        assert status == 0 and [run["name"] for run in found["runs"]] == ["lora", "ia3"]
        assert found["runs"][0] == first["runs"][0], "the first was trained again"
        assert found["runs"][1]["trainable"] < found["runs"][0]["trainable"]
        assert {"comparison.json", "comparison.png", "loss.svg"} <= set(found["files"])

    def test_a_list_of_one_needs_no_brackets(self, peft_, adapters, tmp_path):
        status, _ = peft_("merge", "base", "one", "--weights", "0", "-o", tmp_path / "none")
        merged, base = (
            LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "none", "base")
        )
        assert status == 0 and all(torch.equal(merged[name], base[name]) for name in base)

    def test_convert_extract_and_resize(self, peft_, adapters, tmp_path):
        assert peft_("merge", "base", "one", "-o", tmp_path / "tuned")[0] == 0
        status, found = peft_("extract", "base", tmp_path / "tuned", "--rank=3", "-o", tmp_path / "lora")
        assert status == 0 and found["kept"] == pytest.approx(1, abs=1e-4)
        for words in (["extract", "base", tmp_path / "tuned"], ["resize", tmp_path / "lora"]):
            status, found = peft_(*words, "-o", tmp_path / "none")
            assert status == 1 and "say it with --rank 16, or --energy 0.95" in found["error"]
        status, found = peft_("resize", tmp_path / "lora", "--rank=1", "-o", tmp_path / "small")
        assert status == 0 and set(found["ranks"].values()) == {1} and found["kept"] < 0.99
        status, found = peft_("convert", tmp_path / "small", "--to=mlx", "-o", tmp_path / "mlx")
        assert status == 0 and found["source_format"] == "peft" and any((tmp_path / "mlx").iterdir())
        status, found = peft_("convert", tmp_path / "small", "--to=mlxx", "-o", tmp_path / "mlxx")
        assert status == 1 and "'mlx'" in found["error"]

    def test_methods_lists_all_and_tells_all_of_one(self, peft_):
        from peft.tools.catalogue import methods

        status, found = peft_("methods")
        assert status == 0 and {row["method"] for row in found["methods"]} == {method.key for method in methods()}
        status, found = peft_("methods", "dora")
        assert found["set"] == {"use_dora": True}
        helps = {field["field"]: field["help"] for field in found["fields"]}
        assert helps["r"] == peft.LoraConfig.__dataclass_fields__["r"].metadata["help"]

    def test_doctor_sees_what_is_wrong_with_a_run(self, peft_, tmp_path):
        assert peft_("doctor")[1]["libraries"]
        words = ["--data=pairs.jsonl", "--trainer.learning_rate=1e-7", "--trainer.steps=6"]
        trained(peft_, tmp_path, *words)
        status, found = peft_("doctor", tmp_path, "--step=false")
        text = " ".join(found["findings"])
        assert status == 1 and "the loss stays" in text and "is small for lora" in text
        history = json.loads((tmp_path / "history.json").read_text())
        history[1]["loss"] = float("nan")
        (tmp_path / "history.json").write_text(json.dumps(history))
        assert "not finite" in " ".join(peft_("doctor", tmp_path, "--step=false")[1]["findings"])


class TestUse:
    @pytest.mark.parametrize(
        "words, told",
        [
            ([], ""),
            (["trian"], "Did you mean 'train'"),
            (["train", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
            (["train", "--method=lroa"], "Did you mean 'lora'"),
            (["train", "--set", "trainer.stps=3"], "Did you mean '--trainer.steps'"),
            (["train", "--adapter.rr=3"], "Did you mean '--adapter.r'"),
            (["train", "--sets", "trainer.steps=3"], "Did you mean '--set'"),
            (["train", "rows.jsnl"], "no recipe 'rows.jsnl'. Did you mean 'rows.jsonl'"),
            (["train", "--trainer.steps=many"], "--trainer.steps takes int, not 'many'"),
            (["train", "--trainer.steps=0"], "at least 1"),
            (["train", "--adapter.r=0"], "at least 1"),
            (["train", "--task=sftt"], "Did you mean 'sft'"),
            (["train", "--adapter.rank=3"], "Did you mean '--adapter.r'"),
            (["generate", "--adapter=one"], "give adapters without a flag"),
            (["merge", "base"], "required: adapters"),
            (["methods", "lorra"], "Did you mean 'lora'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_used_wrongly(self, home, monkeypatch, capsys, words, told):
        """Exit status 2, the nearest name, no traceback."""
        monkeypatch.chdir(home)
        assert main(words) == 2
        printed = capsys.readouterr()
        assert told in printed.err and "Traceback" not in printed.err + printed.out

    @pytest.mark.parametrize(
        "words, told",
        [
            (["train", "--data=rows.jsonl"], "model.name is missing"),
            (["train", "--model=base", "--data=nowhere.csv"], "no file 'nowhere.csv'"),
            (["train", "--model=base", "--data=row.jsonl"], "no file 'row.jsonl'. Did you mean 'rows.jsonl'"),
            (["train", "--model=base", "--data=rows.jsonl", "--task=dpo"], "chosen, rejected"),
            (["train", "--model=base", "--data=rows.jsonl", "--data.prompt={txt}", "--data.completion=a"], "'text'"),
            (["train", "--model=nowhere", "--data=texts.jsonl"], "'nowhere' cannot be loaded"),
            (["inspect", "nowhere"], "nowhere"),
            (["generate", "--base=base"], "--prompt"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_is_asked_about_is_wrong(self, peft_, capsys, tmp_path, words, told):
        """Exit status 1, the thing named."""
        more = [f"--output={tmp_path}"] if words[0] == "train" else []
        status, found = peft_(*words, *more)
        assert status == 1 and told in found["error"]

    def test_debug_shows_where_an_error_came_from(self, home, monkeypatch):
        monkeypatch.chdir(home)
        with pytest.raises(ValueError, match="nowhere"):
            main(["inspect", "nowhere", "--debug"])

    @pytest.mark.parametrize("name", list(COMMANDS))
    def test_help_has_an_example_and_the_fields_own_words(self, name, capsys):
        assert main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"example:\n  peft {name}" in printed and "--json" in printed and "--debug" in printed
        words = " ".join(printed.split())
        for field in dataclasses.fields(command(name).options):
            if "nested" not in field.metadata and field.name != "adapter":
                assert " ".join(field.metadata["help"].split())[:40] in words, field.name

    def test_the_general_help_lists_the_commands(self, capsys):
        assert main(["--help"]) == 0
        printed = capsys.readouterr().out
        assert all(f"  {name}" in printed for name in COMMANDS)

    def test_the_library_does_not_need_it(self):
        """Neither jsonargparse nor rich is imported by the library; without them, the command says what to install."""
        code = (
            "import sys; sys.modules.update(jsonargparse=None, rich=None); import peft.mapping_func, importlib.util\n"
            "found = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *a: None if name in ('jsonargparse', 'rich') else found(name)\n"
            "from peft.cli import main; sys.exit(main(['methods']))"
        )
        env = {**os.environ, "PYTHONPATH": str(Path(peft.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "pip install 'peft[cli]'" in done.stderr, done.stderr


def test_the_tour_of_the_readme(home, tmp_path, monkeypatch, capsys):
    """Line by line, with a tiny model where the demo leaves its own, and fewer steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Without writing Python", 1)[1].split("\n## ", 1)[0]
    lines = [line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    calls = [shlex.split(line, comments=True) for line in lines if line.startswith("peft ")]
    assert {call[1] for call in calls} >= {"train", "inspect", "merge", "generate", "compare"}
    for name in ("recipes", "examples/data"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(home / "base", tmp_path / "examples/.cache/SmolLM2-135M-Instruct")
    monkeypatch.chdir(tmp_path)
    for call in calls:
        few = [
            "--set",
            "trainer.steps=1",
            "--set",
            "data.rows=8",
            "--set",
            "data.held_out=4",
            "--set",
            "trainer.device=cpu",
        ]
        assert main([*call[1:], *(few if call[1] in ("train", "compare") else [])]) == 0, " ".join(call)
    assert LlamaForCausalLM.from_pretrained("merged") is not None
