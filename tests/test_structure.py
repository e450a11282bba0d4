"""The rules that keep the tree readable: sizes of files and functions, what core may know, what is documented."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import statistics
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

import peft
import peft.tuners  # noqa: F401  (registers the methods)
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


ROOT = Path(peft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHODS = sorted((ROOT / "tuners").glob("*.py"))
CORE = sorted((ROOT / "core").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
CONFIGS = sorted(PEFT_TYPE_TO_CONFIG_MAPPING.values(), key=lambda cls: cls.__name__)

# Words in core that look like a method's name or prefix, and why they may stand there.
TOKENS = "trainable tokens are also trained beside any method, by core's own auxiliary wrapper"
ALLOWED = {
    "trainable_tokens": TOKENS,
    "trainable_tokens_": TOKENS,
    "supports_lora_conversion": "a public name of the API: whether any method's updates can be factored into a pair",
}


def short(path: Path) -> str:
    """The path below the package."""
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of a file with their names, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{short(path)}:{node.name}", node


def test_the_tree_is_there():
    names = {short(path) for path in FILES}
    outside = ("__init__", "compat/__init__", "config", "mapping", "mapping_func", "auto", "mixed_model", "functional")
    core = ("base/kinds", "base/storage/plain", "layer/layer", "model/tuner", "model/targeting", "model/walk")
    wanted = {f"{name}.py" for name in (*outside, "helpers", "import_utils", "peft_model", "tuners/tuners_utils")}
    assert wanted | {f"core/{name}.py" for name in core} <= names
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("path", METHODS, ids=short)
def test_a_method_file_has_at_most_200_lines(path):
    assert len(path.read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_function_has_at_most_60_lines(path):
    long = {name: node.end_lineno - node.lineno + 1 for name, node in functions(path)}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def classes(path: Path) -> dict[str, int]:
    """The classes of a file with their lines."""
    found = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
    return {node.name: node.end_lineno - node.lineno + 1 for node in found}


@pytest.mark.parametrize("path", CORE, ids=short)
def test_core_has_files_of_at_most_450_lines_and_classes_of_at_most_350(path):
    assert len(path.read_text().splitlines()) <= 450
    assert {name: lines for name, lines in classes(path).items() if lines > 350} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "utils").glob("*.py")), ids=short)
def test_utils_holds_names_only(path):
    """Its files are import paths of the ecosystem; what they name stands where it belongs."""
    assert [name for name, _ in functions(path)] == [] == list(classes(path))


def test_core_does_not_grow_back():
    """What one method, one tool or the `PeftModel` alone needs is theirs."""
    assert sum(len(path.read_text().splitlines()) for path in CORE) <= 15_000


def test_the_layer_has_at_most_300_lines():
    assert classes(ROOT / "core" / "layer" / "layer.py")["BaseTunerLayer"] <= 300


def test_the_median_adapter_has_at_most_50_lines():
    """Each method's class of adapters, as its file has it."""
    lines = []
    for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values():
        layer = getattr(tuner, "layer_cls", None)
        if layer is not None:
            lines.append(len(inspect.getsource(layer.adapter_cls).splitlines()))
    assert len(lines) > 35 and statistics.median(lines) <= 50


def imported(path: Path, known: Container[str]) -> set[str]:
    """The modules of the package that a file imports, inside functions too; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    for_types = {id(node) for guard in guarded for statement in guard.body for node in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft"):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {module if module in known else str(node.module) for module in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_modules_import_each_other_in_a_circle():
    """Not by imports inside functions either, which would only hide it."""
    parts = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path in FILES}
    name = {".".join(part).removesuffix(".__init__"): path for path, part in parts.items()}
    graph = {module: (imported(path, name) & set(name)) - {module} for module, path in name.items()}
    while ready := [module for module, needs in graph.items() if not needs]:
        for module in ready:
            del graph[module]
        graph = {module: needs - set(ready) for module, needs in graph.items()}
    assert graph == {}


def method_words() -> set[str]:
    """Names, prefixes and tensor names of the registered methods."""
    words = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    words |= set(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    for layer in (getattr(cls, "layer_cls", None) for cls in PEFT_TYPE_TO_TUNER_MAPPING.values()):
        if layer:  # a prompt method has none
            parts = layer.adapter_cls.parts.values()
            words |= {*layer.adapter_cls.common, *(name for part in parts for name in part.names)}
    return words - set(ALLOWED)


@pytest.mark.parametrize("path", CORE, ids=short)
def test_core_names_no_method(path):
    """No identifier and no string but a docstring mentions a registered method or its tensors."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            texts.append(node.value)
        elif isinstance(node, ast.Name):
            texts.append(node.id)
        elif isinstance(node, ast.Attribute):
            texts.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            texts.append(node.module or "")
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            texts.append(node.name)
    snake = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower() for text in texts]
    allowed = [text for text in snake if not any(word.lower() in text for word in ALLOWED)]
    for word in method_words():
        pattern = rf"(?<![a-z]){re.escape(word.lower())}" + ("" if word.endswith("_") else r"(?![a-z])")
        found = [text for text in allowed if re.search(pattern, text)]
        assert not found, f"{short(path)} names {word!r}: {found[:3]}"


@pytest.mark.parametrize("path", [*CORE, *KERNELS], ids=short)
def test_core_imports_no_method_and_a_kernel_neither_core_nor_method(path):
    """Not for type checkers either: a kernel is a function of tensors."""
    above = ("peft.tuners", "peft.core") if path in KERNELS else ("peft.tuners",)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(above) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith(above)


@pytest.mark.parametrize("path", METHODS, ids=short)
def test_a_method_imports_no_other_method(path):
    """Helpers that hold no method may be shared; the relatives of LoRA, and of prompt tuning, may build on it."""
    methods = {cls.__module__ for cls in PEFT_TYPE_TO_TUNER_MAPPING.values()}
    may = ("peft.tuners.lora", "peft.tuners.prompt_tuning")
    if f"peft.tuners.{path.stem}" not in methods:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in methods or node.module.startswith(may)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_field_of_a_config_says_what_it_is_for(cls):
    silent = [field.name for field in dataclasses.fields(cls) if len(field.metadata.get("help", "")) < 4]
    assert silent == []


@pytest.mark.parametrize("path", FILES, ids=short)
def test_public_classes_and_functions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert silent == []


@pytest.mark.parametrize("path", FILES, ids=short)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())) is not None


@pytest.mark.parametrize("path", FILES, ids=short)
def test_public_functions_are_typed(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None]
            assert not bare, f"{short(path)}:{node.name} leaves {bare} untyped"
