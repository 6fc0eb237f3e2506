"""From what a person writes (a folder or a Hugging Face hub id) to a folder on this machine."""

import errno
import os
import re
from pathlib import Path

from qwen_env.errors import UsageError
from qwen_env.files import expand, kind_of

OFFLINE_CHOICES = (
    "without the hub, name a local folder in Hugging Face layout or a .gguf file, or leave the "
    "argument out for the embedded pocket model"
)

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(folder_or_hub_id: str | Path, *, allow_patterns: list[str]) -> Path:
    """A local folder as it is, or else a hub repository's files, downloaded or from the cache.

    Args:
        allow_patterns: the file names to download, as shell patterns.

    Raises:
        UsageError: no such folder, no such repository, or the hub cannot be reached.
    """
    folder = expand(folder_or_hub_id)
    kind = kind_of(folder)
    if kind == "a folder":
        return folder
    if kind != "nothing":
        raise UsageError(f"{folder} is {kind}; name the folder that it is in.")
    name = str(folder_or_hub_id)
    if isinstance(folder_or_hub_id, Path) or not _HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: no such folder.")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=allow_patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"{name}: no such folder, and no such repository on the Hugging Face hub "
            "(or it needs a login)."
        ) from error
    except Exception as error:  # each package that reaches the network has its own
        code = getattr(error, "errno", None)
        if code in _DISK_ERRORS:
            raise UsageError(f"{name} cannot be downloaded: {os.strerror(code)}.") from error
        raise UsageError(
            f"{name}: no such folder, and the Hugging Face hub cannot be reached; "
            f"{OFFLINE_CHOICES}."
        ) from error
