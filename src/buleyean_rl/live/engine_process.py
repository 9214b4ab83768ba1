"""The process of one engine: a file that makes llama.cpp abort ends this process, and its memory is freed with it.

stdin: what to open, a line of JSON; its end, which is the front's, ends the process.
stdout: where it answers, a line of JSON; or {"error"}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from buleyean_rl.errors import BuleyeanError
from buleyean_rl.system.module_process import take_stdout


def main() -> None:
    """Open an engine, and let it answer until the front is gone."""
    out = take_stdout()
    wanted = json.loads(sys.stdin.buffer.readline())
    try:
        from buleyean_rl.inference.llama_server import LlamaCppEngine
        from buleyean_rl.inference.protocol import Adapter

        engine = LlamaCppEngine(
            Path(wanted["gguf"]),
            parallel=wanted["slots"],
            context=wanted["context"],
            threads=wanted["threads"],
            adapter=None if wanted["adapter"] is None else Adapter(Path(wanted["adapter"])),
            equal_slots=True,
        )
    except BuleyeanError as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
        return
    print(json.dumps(engine.endpoint._asdict()), file=out, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # what is under way is nobody's any more


if __name__ == "__main__":
    main()
