"""Data that grows: seconds, processor and memory of importing, validating and tokenising so many pairs.

    python bench/data.py [--rows 1000000] [--files 4] [--tokens]

The pairs stand in several packed files, some prompts in two of them. Each stage is a process of its own: its memory
is that of the stage. With --tokens the records are tokenised as training does, in a cache of their own, and read
again from the token store as one epoch does.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# In a small process of its own: to the system a child has held at least what its parent held when it was started.
MEASURED = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
processor = usage.ru_utime + usage.ru_stime
print(json.dumps({"seconds": seconds, "processor_seconds": processor, "rss_bytes": usage.ru_maxrss * 1024}))
"""
TOKENISE = """
import sys
from buleyean_rl.data.records import fold_stream, read_records
from buleyean_rl.data.token_store import tokenise
from buleyean_rl.models.weights import load_tokenizer
tokenise(fold_stream(read_records(sys.argv[1])), "bench", load_tokenizer("smollm2-135m"), 1024)
"""
EPOCH = """
import sys
from pathlib import Path
import numpy as np
from buleyean_rl.data.token_store import BoundaryFile
(path,) = Path(sys.argv[1], "buleyean-rl", "tokens").glob("*.arrow")
boundaries = BoundaryFile(path)
for index in np.random.default_rng(0).permutation(len(boundaries))[:100_000]:
    boundaries[int(index)]
"""


def write_pairs(folder: Path, rows: int, files: int) -> None:
    for number in range(files):
        with gzip.open(folder / f"pairs-{number}.jsonl.gz", "wt", compresslevel=1) as file:
            for i in range(number, rows, files):
                prompt = i - 1 if i % 100 == 1 else i  # every hundredth is there twice, in two of the files
                answers = {"chosen": f"Yes: {i * i}. {'word ' * 20}", "rejected": f"No: {i + i}. {'other ' * 20}"}
                file.write(json.dumps({"prompt": f"What is {prompt} times {prompt}?", **answers}) + "\n")


def measure(*command: str, **environment: str) -> dict[str, float]:
    words = [sys.executable, "-c", MEASURED, sys.executable, *command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    result: dict[str, float] = json.loads(done.stdout)
    print(command[:4], result, file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--tokens", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"rows": arguments.rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, arguments.rows, arguments.files)
        records, command = str(folder / "records.jsonl"), ("-m", "buleyean_rl.cli", "data")
        results["import"] = measure(*command, "import", str(folder / "*.gz"), "-o", records)
        with open(records, encoding="utf-8") as file:
            results["records"] = sum(1 for _ in file)
        for packed in folder.glob("*.gz"):
            packed.unlink()
        results["validate"] = measure(*command, "validate", records)
        if arguments.tokens:
            cache = {"XDG_CACHE_HOME": name}
            results["tokenise"] = measure("-c", TOKENISE, records, **cache)
            results["tokenise again"] = measure("-c", TOKENISE, records, **cache)
            results["read 100,000"] = measure("-c", EPOCH, name, **cache)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
