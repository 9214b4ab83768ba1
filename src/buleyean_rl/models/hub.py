"""Models on the Hugging Face Hub: which commit, and its files on this disk.

id --find_revision: the newest commit, or offline the cached one--> download --> folder
"""

from __future__ import annotations

import socket
import threading
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from buleyean_rl.errors import ModelError

CONNECT_SECONDS = 2.0  # for a name to be resolved and a connection made
TIMEOUT_SECONDS = 10.0
CONFIGURATION_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHT_FILES = ("*.safetensors",)


def find_revision(hub_id: str) -> str:
    """The newest commit of a model, or where the Hub cannot be reached the cached one.

    Raises:
        ModelError: there is neither.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    reason = "the Hub cannot be reached"
    if is_reachable():
        try:
            return str(HfApi().model_info(hub_id, timeout=TIMEOUT_SECONDS).sha)
        except Exception as error:  # refused: the client raises any error of its HTTP library
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404):
                reason = f"the Hub has no such model, or not for you (HTTP {status}; `hf auth login` if it is private)"
    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        raise ModelError(f"cannot load model {hub_id!r}: {reason} and it is not cached")
    return Path(config).parent.name


@cache
def is_reachable() -> bool:
    """Whether the Hub, or the proxy before it, takes a connection.

    Tried once, before the Hub's client is asked, which repeats every request for some ten seconds.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    address = urlsplit(getproxies().get(endpoint.scheme, "")) if getproxies().get(endpoint.scheme) else endpoint
    connected = threading.Event()

    def connect() -> None:
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname, port), CONNECT_SECONDS).close()
            connected.set()
        except OSError:
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=connect, daemon=True).start()  # a name may take longer to resolve than any timeout
    done.wait(CONNECT_SECONDS)
    return connected.is_set()


@cache
def download(hub_id: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """The folder with a model's files at a commit, downloaded where they are not in the cache.

    Args:
        hub_id: of the model.
        revision: from `find_revision`.
        patterns: of file names.

    Raises:
        ModelError: a file is neither in the cache nor reachable.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
                local_files_only=not is_reachable(),
            )
        )
    except Exception as error:  # any error of the client's HTTP library
        raise ModelError(f"cannot load model {hub_id!r}: {str(error).strip().splitlines()[0]}") from error
