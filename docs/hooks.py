"""What `mkdocs` does beside building pages: pages made of files at the root, the command line's page, the pictures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SHIM = "https://unpkg.com/iframe-worker/shim"


def has_command_line() -> bool:
    """Whether the command line is part of the package and can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("peft.cli", "jsonargparse", "rich"))


def on_config(config: Any) -> Any:
    """Give the pages of methods, and the command line's, their places in the navigation."""
    sys.path[:0] = [str(DOCS), str(ROOT / "src")]
    pages = re.findall(r"\(methods/(\w+)\.md\)", (DOCS / "methods.md").read_text(encoding="utf-8"))
    for entry in config.nav:
        if entry == {"Methods": "methods.md"}:
            entry["Methods"] = ["methods.md", *(f"methods/{page}.md" for page in pages)]
        elif "Guides" in entry and has_command_line():
            entry["Guides"].append("cli.md")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is not kept below `docs`."""
    import pictures

    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        text = re.sub(r"\]\(([A-Z]+)\.md\)", lambda link: link[0].lower(), text)
        files.append(File.generated(config, name.lower(), content=text))
    for name, content in pictures.draw().items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    if has_command_line():
        files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Take the roles of docstrings away: ``:class:`` and its like say nothing to a reader."""
    return re.sub(r":(?:attr|class|data|exc|func|meth|mod):(?=<code)", "", html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take the script with which the search works from files from this site, where the theme asks another host."""
    return output.replace(SHIM, "../" * page.url.count("/") + "javascripts/worker.js")


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same of pages that have no source."""
    return output_content.replace(SHIM, "/javascripts/worker.js")


def command_line() -> str:
    """The help of each command."""
    from peft.cli.command import parser_of
    from peft.cli.run import COMMANDS, command

    lines = ["# Command line", "", "`peft COMMAND --help` prints what stands here.", ""]
    for name in COMMANDS:
        lines += [f"## peft {name}", "", "```text", parser_of(command(name)).format_help().rstrip(), "```", ""]
    return "\n".join(lines)
