"""What the run ran on: versions of libraries, peak memory."""

from __future__ import annotations

import platform
from importlib.metadata import version

LIBRARIES = ("buleyean-rl", "torch", "transformers", "peft", "accelerate", "safetensors", "gguf")


def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def peak_rss_bytes() -> int:
    """The most memory this process has ever held, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
