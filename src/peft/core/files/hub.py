"""Adapters that are not where they were looked for: in a repository of the hub, or nearby under another name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

from peft.errors import MissingFileError, nearest


def folders_with(folder: str, names: Sequence[str]) -> list[str]:
    """The sub-folders of a folder that have a file of one of these names."""
    inside = os.listdir(folder) if os.path.isdir(folder) and os.access(folder, os.R_OK) else []
    return sorted(n for n in inside if any(os.path.isfile(os.path.join(folder, n, name)) for name in names))


def _near(path: str, names: Sequence[str]) -> str:
    """A hint at a folder beside a path, of a similar name and with such a file."""
    parent, last = os.path.split(path.rstrip("/\\"))
    close = nearest(last, folders_with(parent or ".", names), cutoff=0.6)
    return f" In {parent or 'this folder'}:{close}" if close else ""


def any_of(names: Iterable[str]) -> str:
    """File names as a message has them."""
    return " or ".join(map(repr, names))


def download(repo_id: str, names: tuple[str, ...], subfolder: str | None, hub: dict[str, Any]) -> str:
    """Path of the first file of these names in a repository of the hub; :func:`peft.core.files.io.locate`."""
    from huggingface_hub import errors, hf_hub_download

    if "use_auth_token" in hub:
        hub.setdefault("token", hub["use_auth_token"])
    accepted = inspect.signature(hf_hub_download).parameters
    options = {name: value for name, value in hub.items() if name in accepted}
    wanted = any_of(f"{subfolder}/{name}" if subfolder else name for name in names)
    if os.path.isfile(repo_id):
        raise MissingFileError(
            f"{repo_id!r} is a file. Give the folder that it is in: {(os.path.dirname(repo_id) or '.')!r}."
        )
    start = f"Can't find the adapter {repo_id!r}: it is no local folder, and "
    reason, cause = "", None  # type: tuple[str, Exception | None]
    for name in names:
        try:
            return hf_hub_download(repo_id, name, subfolder=subfolder, **options)
        except errors.HFValidationError as error:
            reason, cause = "it is no valid repository id ('user/name') of the model hub.", error
        except errors.LocalEntryNotFoundError as error:
            reason, cause = f"the hub was not reached and {wanted} is not in the local cache.", error
        except errors.EntryNotFoundError as error:
            reason = f"the hub repository has no {wanted}. It may hold a full model, or need a `subfolder`."
            cause = error
        except errors.RevisionNotFoundError as error:
            reason, cause = f"the hub repository has no revision {options.get('revision')!r}.", error
        except errors.RepositoryNotFoundError as error:
            reason, cause = "the hub has no such repository, or it is private and needs a `token`.", error
        except (errors.HfHubHTTPError, OSError, ValueError) as error:
            reason, cause = f"{wanted} could not be downloaded from the hub: {error}", error
        if not isinstance(cause, errors.EntryNotFoundError):
            break
    raise MissingFileError(start + reason + _near(repo_id, names)) from cause
