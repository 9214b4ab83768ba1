"""Peak memory of an export, on a made-up model of about 3 GB: a Llama of random bf16 weights, and a random adapter.

    python bench/export_memory.py [FOLDER]

Writes nothing but the folder, which can be deleted, and prints a JSON object a line: the largest tensor, then for
each export the most memory its process ever held, and that less what an export of next to nothing holds.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tiny_tokenizer

SHAPE = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
SMALL = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
EXPORT = """
import sys, time
from pathlib import Path
from buleyean_rl.gguf import blueprint_from_run, write_gguf
run, quants, gate = sys.argv[1], sys.argv[2].split(","), sys.argv[3] == "gate"
paths = {quant: Path(run).parent / f"{quant}.gguf" for quant in quants}
started = time.monotonic()
write_gguf(blueprint_from_run(run), paths, gate=gate)
# since this program began, unlike getrusage, which remembers whoever started it
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) * 1024, time.monotonic() - started)
"""


def make(folder: Path, shape: dict[str, int]) -> int:
    """A base model in one file per layer and a run around it; returns the bytes of its largest tensor."""
    base, run = folder / "base", folder / "run"
    base.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **shape,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    wide, inner, kv = shape["hidden_size"], shape["intermediate_size"], shape["hidden_size"] // 4
    parts = [
        {"model.embed_tokens.weight": (shape["vocab_size"], wide)},
        {"lm_head.weight": (shape["vocab_size"], wide)},
    ]
    adapter: dict[str, torch.Tensor] = {}
    for i in range(shape["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (kv, wide),
            "self_attn.v_proj": (kv, wide),
            "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (inner, wide),
            "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner),
        }
        norms = {f"model.layers.{i}.{name}_layernorm.weight": (wide,) for name in ("input", "post_attention")}
        parts.append({f"model.layers.{i}.{name}.weight": size for name, size in layer.items()} | norms)
        for name, (rows, columns) in layer.items():
            key = f"base_model.model.model.layers.{i}.{name}"
            adapter[f"{key}.lora_A.weight"] = 0.02 * torch.randn(16, columns)
            adapter[f"{key}.lora_B.weight"] = 0.02 * torch.randn(rows, 16)
    parts.append({"model.norm.weight": (wide,)})
    index, largest = {}, 0
    for number, part in enumerate(parts):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: (0.02 * torch.randn(size)).to(torch.bfloat16) for key, size in part.items()}
        save_file(tensors, base / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
        largest = max(largest, *(tensor.nbytes for tensor in tensors.values()))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    run.mkdir(exist_ok=True)
    save_file(adapter, run / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": str(base)}
    (run / "adapter_config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(run)
    return largest


def measure(folder: Path, quants: str, gate: str) -> dict[str, float]:
    """An export in a process of its own: its peak, and that of the quantiser it starts, looked at all the while."""
    words = [sys.executable, "-c", EXPORT, str(folder / "run"), quants, gate]
    below = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    below = max(below, child.memory_info().rss)
            time.sleep(0.02)
        assert process.stdout is not None
        peak, seconds = process.stdout.read().split()
    return {"peak": int(peak), "peak_of_quantiser": below, "seconds": float(seconds)}


def main(folder: Path) -> None:
    """Make the models, then measure one export after the other and say what each took at once."""
    largest = make(folder / "large", SHAPE)
    make(folder / "small", SMALL)
    in_all = sum(path.stat().st_size for path in (folder / "large/base").glob("*.safetensors"))
    print(json.dumps({"model_bytes": in_all, "largest_tensor_bytes": largest}), flush=True)
    for name, quants, gate in (("q8_0", "q8_0", ""), ("q4_k_m", "q4_k_m", ""), ("q8_0 with its gate", "q8_0", "gate")):
        before, after = measure(folder / "small", quants, gate), measure(folder / "large", quants, gate)
        above = after["peak"] - before["peak"]
        found = after | {"baseline": before["peak"], "above": above, "above_in_largest_tensors": above / largest}
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "export-memory"))
