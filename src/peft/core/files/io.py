"""Files of adapters: where they are, how they are read, and the one writer that changes them.

What a reader may count on: at any moment, also after the writing process was killed, a folder's config and weights are
the old ones or the new ones, never one of each. A save writes into a hidden folder inside the target. Renaming that
folder is the commit: before it the old files stay, after it the new ones take their places.

- Where one file differs (a training run saves again under the same config), it is replaced in one step.
- Where several do, the old ones step out, the config first, and the new ones step in, the config last. A tool that
  knows nothing of this sees, for these microseconds, a folder without `adapter_config.json`, and no mix.

`locate` and the next save finish what was committed and drop what was not. Where a folder cannot be written,
`locate` answers with the file inside the hidden folder.

Nothing here imports torch, safetensors or huggingface_hub until it is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from peft.core.files.hub import any_of, download, folders_with
from peft.errors import (
    CheckpointError,
    MissingFileError,
    NotAFolderError,
    WrongTypeError,
    damaged,
    nearest,
    some,
)


if TYPE_CHECKING:
    import torch

try:
    import fcntl
except ImportError:  # not on Windows: there the owner of a leftover is taken to be gone
    fcntl = None  # type: ignore[assignment]


CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
INDEX_NAME = "adapter_model.safetensors.index.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

PREFIX = "base_model.model."
"""What the names of an adapter's tensors start with in files, before the name of their module in the plain model."""

SMALL = 64 << 20
"""Bytes of a file that may be in memory twice for a moment."""

# Keywords of `from_pretrained` that concern the download and nothing else.
# fmt: off
HUB_KEYWORDS = frozenset((
    "cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version",
    "local_dir", "local_files_only", "proxies", "repo_type", "revision", "token", "user_agent", "use_auth_token",
))
# fmt: on


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what concerns the place of a file, and its download, out of the keywords of a `from_pretrained`."""
    return {name: kwargs.pop(name) for name in [*kwargs] if name in HUB_KEYWORDS or name == "subfolder"}


# --- finding ---------------------------------------------------------------------------------------------------


def locate(where: str | os.PathLike, *names: str, subfolder: str | None = None, **hub: Any) -> str:
    """Path of the first file of these names in a local folder or, where there is none, in a repository of the hub.

    Args:
        where: folder, or repository "user/name".
        hub: options of the download, such as `revision`, `token`, `cache_dir`.

    Raises:
        MissingFileError: there is none; the message says what was looked for, where, and what to do.
        WrongTypeError: ``where`` is no path.
    """
    if not isinstance(where, (str, os.PathLike)):
        raise WrongTypeError(f"an adapter is found by its folder, or by its name on the hub, not by {where!r}.")
    where = os.fspath(where)
    if not os.path.isdir(where):
        return download(where, names, subfolder, hub)
    folder = os.path.join(where, subfolder) if subfolder else where
    if not os.path.isdir(folder):
        hint = nearest(subfolder, folders_with(where, names))
        raise MissingFileError(f"The folder {where!r} has no sub-folder {subfolder!r} with {any_of(names)}.{hint}")
    with suppress(OSError):  # a folder that cannot be written
        _settle(folder)
    for name in names:
        if (path := _current(folder, name)) is not None:
            return path
    inside = folders_with(folder, names)
    there = some({n for n in os.listdir(folder) if not n.startswith(".")}, 8) or "nothing"
    hint = f"Adapters are in its sub-folders {inside}: name one as `subfolder`." if inside else f"It holds {there}."
    raise MissingFileError(f"Can't find {any_of(names)} in the folder {folder!r}. {hint}")


def locate_weights(where: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> list[str]:
    """Paths of an adapter's weights: one file, or those that an index names.

    Raises:
        MissingFileError: there are none, or not all that the index names.
        CheckpointError: the index is damaged.
    """
    path = locate(where, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, INDEX_NAME, subfolder=subfolder, **hub)
    if os.path.basename(path) != INDEX_NAME:
        return [path]
    return [locate(where, name, subfolder=subfolder, **hub) for name in named_by_index(path)]


def named_by_index(path: str | os.PathLike) -> list[str]:
    """Names of the files over which an index spreads tensors, each once and in their order.

    Raises:
        CheckpointError: it is no index, or names files outside of its folder.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted({*json.load(file)["weight_map"].values()})
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no index of files ({type(error).__name__}: {error}).") from error
    if outside := [name for name in names if os.path.basename(name) != name]:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is not a file beside it.")
    return names


# --- reading ---------------------------------------------------------------------------------------------------


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors from a folder, or from a repository on the hub.

    Args:
        device: where to put them; the CPU by default.
        key_mapping: regex -> replacement, applied to the names, those of the base model or as the file has them; the
            first that matches counts.

    Raises:
        FileNotFoundError: if there is no file of weights, or one that an index names is missing.
        ValueError: if a file is damaged, or a key of ``key_mapping`` is no regular expression.

    Examples:
        >>> model.save_pretrained("adapter")
        >>> tensors = load_peft_weights("adapter")
        >>> list(tensors)[0]
        'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    files = locate_weights(model_id, **hf_hub_download_kwargs)
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file, device).items()}
    return tensors if not key_mapping else {_mapped(name, key_mapping): t for name, t in tensors.items()}


def read_tensors(file: str, device: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of one file, safetensors or a pickle.

    Raises:
        ValueError: if the file is missing or damaged, or holds something else than named tensors.
    """
    import torch

    if torch.device(device or "cpu").type == "meta":
        raise ValueError("files cannot be read on the meta device; low_cpu_mem_usage=True makes no tensors before.")
    try:
        if file.endswith(".safetensors"):
            from safetensors.torch import load, load_file

            if str(device or "cpu") == "cpu" and os.path.getsize(file) <= SMALL:  # in half the time of a mapped file
                with open(file, "rb") as opened:
                    return dict(sorted(load(opened.read()).items()))  # it gives them in the order of their hashes
            return load_file(file, device=str(device or "cpu"))
        tensors = torch_load(file, map_location=torch.device(device or "cpu"))
    except Exception as error:
        raise damaged(file, error) from error
    return checked_tensors(file, tensors)


def checked_tensors(file: str, tensors: Any) -> dict[str, torch.Tensor]:
    """What was in a file, if that is named tensors.

    Raises:
        ValueError: it is not.
    """
    import torch

    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file} holds a {type(tensors).__name__}, and not a dict of name -> tensor.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file}: the entry {name!r} is a {type(tensor).__name__}, and not a tensor.")
    return tensors


def _mapped(name: str, key_mapping: dict[str, str]) -> str:
    """A name of a file after a mapping, whose patterns may be of names in the base model or in the file."""
    inside = name.removeprefix(PREFIX)
    new = renamed(inside, key_mapping)
    return name[: len(name) - len(inside)] + new if new != inside else renamed(name, key_mapping)


def renamed(name: str, key_mapping: dict[str, str]) -> str:
    """A name after the first replacement whose pattern occurs in it."""
    for pattern, replacement in key_mapping.items():
        try:
            new, count = re.subn(pattern, replacement, name)
        except re.error as error:
            raise ValueError(f"key_mapping: {pattern!r} -> {replacement!r} is no replacement ({error}).") from error
        if count:
            return new
    return name


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """``torch.load`` that runs no code from the file unless told to."""
    import torch

    return torch.load(*args, weights_only=weights_only, **kwargs)


# --- writing ---------------------------------------------------------------------------------------------------

_PENDING, _COMMITTED = ".peft_saving_", ".peft_saved_"
_OLD, _STALE = "old", "stale"  # in a committed folder: what has stepped out, and empty files named as what goes


@contextmanager
def replacing(folder: str | os.PathLike, *stale: str) -> Iterator[Callable[[str], str]]:
    """Files that change together, or not at all: write each to ``path(name)``; they take their places at the end.

    Args:
        folder: made if need be. What interrupted saves have left there is finished or cleared first.
        stale: names of files that the new ones make obsolete; they go when the new ones come.

    Raises:
        NotAFolderError: the folder is a file.
    """
    folder = os.fspath(folder)
    if os.path.isfile(folder):
        raise NotAFolderError(f"Cannot save to {folder!r}: it is a file, and a folder is needed.")
    new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    _settle(folder, clear=True)
    staging = tempfile.mkdtemp(prefix=_PENDING, dir=folder)
    with _held(staging):
        try:
            yield lambda name: os.path.join(staging, name)
            _commit(folder, staging, stale)
        except BaseException:
            _drop(folder, staging)
            if new:
                with suppress(OSError):  # something else was written there
                    os.rmdir(folder)
            raise


def _commit(folder: str, staging: str, stale: Iterable[str]) -> None:
    names = os.listdir(staging)
    for name in names:
        path = os.path.join(staging, name)
        os.chmod(path, 0o644)
        # On the disk before it is renamed: after a crash of the machine, a new name must not mean an empty file.
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    gone = [name for name in stale if os.path.exists(os.path.join(folder, name))]
    if not gone and sum(not _same(os.path.join(staging, n), os.path.join(folder, n)) for n in names) < 2:
        for name in names:
            os.replace(os.path.join(staging, name), os.path.join(folder, name))
        os.rmdir(staging)
        return
    for inner in (_OLD, _STALE):
        os.mkdir(os.path.join(staging, inner))
    for name in gone:
        open(os.path.join(staging, _STALE, name), "w").close()
    committed = os.path.join(folder, _COMMITTED + os.path.basename(staging)[len(_PENDING) :])
    os.rename(staging, committed)
    moved: list[str] = []
    try:
        _move_in(folder, committed, moved)
    except BaseException:
        for name in moved:
            os.rename(os.path.join(folder, name), os.path.join(committed, name))
        os.rename(committed, staging)  # not committed after all: what has stepped out comes back
        raise
    shutil.rmtree(committed, ignore_errors=True)


def _move_in(folder: str, committed: str, moved: list[str]) -> None:
    """Let the files of a committed save take their places, from wherever it was interrupted."""
    names = _config_last(name for name in os.listdir(committed) if name not in (_OLD, _STALE))
    marks = os.path.join(committed, _STALE)
    stale = os.listdir(marks) if os.path.isdir(marks) else ()  # else all is in place, and this was being removed
    for name in reversed(_config_last({*names, *stale})):
        with suppress(FileNotFoundError):
            os.rename(os.path.join(folder, name), os.path.join(committed, _OLD, name))
    for name in names:
        os.replace(os.path.join(committed, name), os.path.join(folder, name))
        moved.append(name)


def _config_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == CONFIG_NAME, name))


def _same(one: str, other: str) -> bool:
    """Whether two files hold the same bytes; only small ones are compared, which a config is."""
    if not os.path.isfile(other) or not os.path.getsize(one) == os.path.getsize(other) < 1 << 20:
        return False
    with open(one, "rb") as a, open(other, "rb") as b:
        return a.read() == b.read()


def _drop(folder: str, staging: str) -> None:
    """Undo a save that was not committed; files that had stepped out for it come back, the config last."""
    old = os.path.join(staging, _OLD)
    for name in _config_last(os.listdir(old) if os.path.isdir(old) else ()):
        os.rename(os.path.join(old, name), os.path.join(folder, name))
    shutil.rmtree(staging, ignore_errors=True)


def _leftovers(folder: str) -> list[str]:
    """The hidden folders of saves that are under way, or were interrupted."""
    with os.scandir(folder) as found:
        return sorted(e.path for e in found if e.name.startswith((_PENDING, _COMMITTED)))


def _settle(folder: str, clear: bool = False) -> None:
    """Finish what interrupted saves have left, or undo it, or (``clear``) remove it; those under way go on."""
    for path in _leftovers(folder):
        with suppress(FileNotFoundError), _held(path) as free:  # not found: its owner has just finished
            if not free:
                continue
            if os.path.basename(path).startswith(_COMMITTED):
                if not _is_overwritten(folder, path):
                    _move_in(folder, path, [])
                shutil.rmtree(path, ignore_errors=True)
            elif clear or os.path.isdir(os.path.join(path, _OLD)):
                _drop(folder, path)


def _is_overwritten(folder: str, committed: str) -> bool:
    """Whether another tool has put a config where the old one has stepped out and the new one was to step in."""
    places = (folder, committed, os.path.join(committed, _OLD))
    return all(os.path.exists(os.path.join(place, CONFIG_NAME)) for place in places)


def _current(folder: str, name: str) -> str | None:
    """Where the file of this name is, which may be in a save that nobody could finish."""
    for path in _leftovers(folder):
        committed = os.path.basename(path).startswith(_COMMITTED)
        if committed and os.path.exists(os.path.join(path, _STALE, name)):
            return None
        if os.path.isfile(found := os.path.join(path, *(() if committed else (_OLD,)), name)):
            return found
    return found if os.path.isfile(found := os.path.join(folder, name)) else None


@contextmanager
def _held(path: str) -> Iterator[bool]:
    """Hold a hidden folder; False if another process does. The system lets go of it when a process ends."""
    if fcntl is None:
        yield True
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        yield free
    finally:
        os.close(handle)


def write_adapter(
    folder: str | os.PathLike, tensors: dict[str, torch.Tensor], config: Any, safe_serialization: bool = True
) -> None:
    """Write an adapter's tensors and its config into a folder; what was there stays until all is written."""
    stale = WEIGHTS_NAME if safe_serialization else SAFETENSORS_WEIGHTS_NAME
    with replacing(folder, stale, INDEX_NAME) as path:
        write_weights(path, tensors, safe_serialization)
        config.save_pretrained(path(""))


def write_weights(path: Callable[[str], str], tensors: dict[str, torch.Tensor], safe_serialization: bool) -> None:
    """Write an adapter's tensors, as safetensors or as a pickle."""
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(separate(tensors), path(SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    else:
        import torch

        torch.save({name: t.cpu() for name, t in tensors.items()}, path(WEIGHTS_NAME))


def separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors detached, contiguous and without memory in common, as safetensors takes them."""
    seen: set[tuple[Any, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        # Tensors on meta, and empty ones, have no address, so they have no memory in common.
        memory = tensor.device, 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen and memory[1] else tensor
        seen.add(memory)
    return result
