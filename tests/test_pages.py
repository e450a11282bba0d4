"""Every Python block of the documents and of the README runs, or says why not.

The blocks of a page run in their order, in one namespace and an empty folder. Models of the hub are stood in for by a
small one with the same module names. Two kinds of comments, which no reader sees, stand in the pages:

    <!-- run first            what the page leaves to the reader, such as a batch
    ...
    -->
    <!-- not run: reason -->  right before a block
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^<!-- run first\n(?P<first>.*?)^-->$"
    r"|(?P<skip>^<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
STOOD_IN = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
HUB = "HuggingFaceTB/"


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, code) of what runs of a page, in its order."""
    for found in BLOCK.finditer(text):
        if not found["skip"]:
            part = "first" if found["first"] else "code"
            yield text[: found.start(part)].count("\n"), found[part]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of two layers and a tokenizer of bytes."""
    folder = str(tmp_path_factory.mktemp("small"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page.read_text("utf-8")))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_blocks_of_a_page_run(
    page: Path, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.name == "pictures.md":
        pytest.importorskip("matplotlib")
    for name in STOOD_IN:
        cls = getattr(transformers, name)

        def from_pretrained(model: str, *args: Any, real: Any = cls.from_pretrained, **kwargs: Any) -> Any:
            return real(small if model.startswith(HUB) else model, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, code in blocks(page.read_text("utf-8")):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_blocks_that_do_not_run_say_why() -> None:
    reasons = [found["reason"] for page in PAGES for found in BLOCK.finditer(page.read_text("utf-8")) if found["skip"]]
    assert all(len(reason.split()) > 3 for reason in reasons)
    assert len(reasons) < 6, "a page whose code does not run is a page that nobody tried"


def test_links_of_the_documents_lead_somewhere() -> None:
    """Those between files; `make docs` looks at the headings as well."""
    made = ("pictures/", "cli.md")  # by the build of the site
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link and not link.startswith(made) and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
