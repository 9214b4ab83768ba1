# ruff: noqa: E402
"""A model's frozen weights as numbers and in blocks: seconds to load, memory, tokens a second of training.

    python bench/models.py [MODEL ...] [--bits blocks 16 8 4] [--records 2] [--steps 2]
    python bench/models.py --shape 7b --records 1 --steps 0 --length 128

Records of exactly 512 tokens (`--length`), LoRA of rank 16 on every linear layer, the default objective, each model and
each number of bits in a process of its own; the first step warms up and is not counted. All steps are on the same
records, so that the last loss says whether the adapter learns as much. `blocks`: as a GGUF file has them. A shape has
random weights of 4 bits, and shows nothing but memory and time. Prints a table, writes no file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

sys.modules["triton"] = None  # type: ignore[assignment] # see contestant.py

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig

from buleyean_rl.batching.forward import batch_losses
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.batching.micro_batch import bin_pack, micro_batch_tokens
from buleyean_rl.kernels.quantised import Q4_1, Blocks, QuantisedTensor
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.skeleton import build_skeleton
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.system.host import peak_rss_bytes
from workload import full_boundaries, step_of

SHAPES = {
    "7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    }
}


def random_model(shape: str) -> Model:
    """A Llama of random matrices in blocks of Q4_1."""
    module = build_skeleton(LlamaConfig(**SHAPES[shape]), torch.bfloat16, attention=None)
    generator = np.random.default_rng(0)
    for path, parameter in list(module.named_parameters()):
        owner, name = path.rpartition(".")[::2]
        weight: torch.Tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() == 2:
            rows, width = parameter.shape
            packed = torch.from_numpy(np.frombuffer(bytearray(generator.bytes(rows * width // 32 * 20)), np.uint8))
            packed = packed.view(rows, width // 32, 20)
            packed[..., :4] = torch.tensor([0.005, -0.0375], dtype=torch.float16).view(torch.uint8)
            weight = QuantisedTensor([Blocks(Q4_1, packed.flatten(1))], torch.bfloat16)
        module.get_submodule(owner).register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return Model.from_module(module)


def measure(name: str, bits: str, records: int, steps: int, length: int) -> dict[str, Any]:
    """Of one model, in this process."""
    started = time.perf_counter()
    if name in SHAPES:
        model = random_model(name)
    else:
        model = open_model(name, base_bits=None if bits == "blocks" else int(bits))
        _ = model.module
    loaded, after_loading = time.perf_counter() - started, peak_rss_bytes()
    model.attach_adapter(lora_config(16, 32, 0.0, None))
    layout, objective = LAYOUTS[model.layout], Objective()

    losses = []

    def loss(boundaries: Any) -> torch.Tensor:
        total = torch.zeros(())
        for row in bin_pack(boundaries, lambda boundary: boundary.size, micro_batch_tokens(model.module)):
            each = batch_losses(model.module, model.head, layout(row), objective).loss.mean()
            each.backward()
            total += each.detach()
        losses.append(float(total))
        return total.requires_grad_()

    step, seconds = step_of(model.module, loss), []
    for number in range(steps + 1):
        began = time.perf_counter()
        step(full_boundaries(records, length))
        seconds.append(time.perf_counter() - began)
        print(f"step {number}: {seconds[-1]:.1f} s", file=sys.stderr)
    return {
        "model": name,
        "compute": model.describe().removeprefix("compute: "),
        "load s": round(loaded, 1),
        "GB after loading": round(after_loading / 1e9, 2),
        "peak GB": round(peak_rss_bytes() / 1e9, 2),
        "tokens/s": round(records * length / min(seconds[1:] or seconds), 1),
        "last loss": round(losses[-1], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[BUNDLED])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--bits", nargs="+", default=["blocks", "16"], choices=["blocks", "16", "8", "4"])
    parser.add_argument("--records", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a record (%(default)s)")
    parser.add_argument("--one", action="store_true", help="in this process, as JSON")
    arguments = parser.parse_args()
    names, bits = ([arguments.shape], ["blocks"]) if arguments.shape else (arguments.models, arguments.bits)
    numbers = {"records": arguments.records, "steps": arguments.steps, "length": arguments.length}
    if arguments.one:
        print(json.dumps(measure(names[0], bits[0], **numbers)))
        return
    settings = ["--one", *(part for name, number in numbers.items() for part in (f"--{name}", str(number)))]
    rows = []
    for name in names:
        for number in bits:
            which = ["--shape", name] if arguments.shape else [name, "--bits", number]
            command = [sys.executable, __file__, *which, *settings]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    print("\n".join("| " + " | ".join(map(str, row.values())) + " |" for row in rows))


if __name__ == "__main__":
    main()
