"""Model and data cards: a YAML header that hubs read, and a table that people read.

    run.json ------------> model card of an adapter, or of the GGUF files made from it
    records.jsonl -------> data card

A header leaves out what is unknown elsewhere, such as a base model that is a file on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from buleyean_rl.data.records import read_records
from buleyean_rl.models.source import HUB_ID, public_name_and_license
from buleyean_rl.system.wording import counted

TAGS = ["buleyean-rl", "negative-feedback"]
SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST_CATEGORY = "n>1M"
DRIFT_TITLES = {"own": "Drift on passages of the base's own", "bundled": "Drift on bundled texts"}


def run_card(run: Mapping[str, Any], *, license: str | None = None) -> str:
    """The card of a run folder.

    Args:
        run: the contents of its run.json.
        license: an SPDX identifier; None for the base model's.
    """
    base, base_license = public_name_and_license(str(run["model"]))
    header = {
        **_base_fields(base, "adapter"),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": license or base_license,
        "tags": [*TAGS, "lora"],
    }
    return f"""{front_matter(header)}
# {Path(base).name}, taught by rejections

Fine-tuned with `buleyean-rl` from rejected answers alone: no chosen answers, no reward model.

{run_table(run, "PEFT adapter, safetensors; `buleyean export` makes the GGUF")}

{EXPLANATION}

![loss, floor and gap](loss.png)

    buleyean export . -o model.gguf
    buleyean chat model.gguf
"""


def gguf_card(
    files: Sequence[tuple[str, str, int]], run: Mapping[str, Any] | None, *, name: str, license: str | None = None
) -> str:
    """The card of GGUF files.

    Args:
        files: name, quantisation and bytes of each.
        run: the run.json of the run they were made from, if there is one.
        name: of the model.
        license: an SPDX identifier; None for the base model's.
    """
    base, base_license = public_name_and_license(str(run["model"])) if run else ("", None)
    header = {
        **_base_fields(base, "finetune"),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "license": license or base_license,
        "tags": [*TAGS, "gguf", "llama.cpp"],
    }
    rows = "\n".join(f"| `{file}` | {quant} | {size / 1e6:,.0f} MB |" for file, quant, size in files)
    run_facts = f"\n{run_table(run, 'GGUF, for llama.cpp and what is built on it')}\n\n{EXPLANATION}\n" if run else ""
    return f"""{front_matter(header)}
# {name}

Fine-tuned with `buleyean-rl` from rejected answers alone: no chosen answers, no reward model. Each file was compared
with the model it was made from in llama.cpp before it was given its name.

| file | quantisation | size |
|---|---|---|
{rows}
{run_facts}
    buleyean chat {files[0][0]}
"""


def data_card(path: Path, *, name: str, file: str, license: str | None = None) -> str:
    """The card of a records file.

    Args:
        path: the file, which is read once.
        name: of the data set.
        file: its name there.
        license: an SPDX identifier.

    Raises:
        RecordError: a record is bad.
    """
    records = answers = accepted = rejections = with_spans = conversations = 0
    for record in read_records(path):
        records += 1
        rejected, never_rejected = record.count_answers()
        answers += rejected
        accepted += never_rejected
        rejections += sum(record.rejection_counts)
        with_spans += sum(bool(spans) for spans in record.rejected_spans)
        conversations += not isinstance(record.prompt, str)
    header = {
        "pretty_name": name,
        "license": license,
        "task_categories": ["text-generation"],
        "size_categories": [next((size for limit, size in SIZE_CATEGORIES if records < limit), LARGEST_CATEGORY)],
        "tags": [*TAGS, "preference"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": file}]}],
    }
    return f"""{front_matter(header)}
# {name}

Answers people said no to, for training with `buleyean-rl`: prompts, rejected answers, how often each was rejected and
out of how many rounds. There are no chosen answers.

| | |
|---|---|
| Records | {records:,} |
| Prompts that are conversations | {conversations:,} |
| Rejected answers | {answers:,} |
| Accepted answers of the model itself, as anchors | {accepted:,} |
| Rejections | {rejections:,} |
| Answers with the wrong part marked | {with_spans:,} |
| Format | JSON Lines: `prompt`, `rejected_responses`, `rejection_counts`, `total_rounds` or `rounds`, spans |
"""


def run_table(run: Mapping[str, Any], format: str) -> str:
    """What a run was and how it went, as Markdown.

    Args:
        run: the contents of its run.json.
        format: of the weights the card is for.
    """
    config, gap = run["config"], run["optimality_gap_relative"]
    scale = run["adapter_scale"]
    relative = "" if gap is None else f" ({gap:.0%} of the start's)"
    held_out = f" ({run['records_held_out']:,} held out)" if run["records_held_out"] else ""
    measured_on = "held out" if held_out else "on what it was trained on"
    rows = {
        "Base model": public_name_and_license(str(run["model"]))[0],
        "Parameters": f"{run['parameters']['base']:,} (adapter: {run['parameters']['adapter']:,})",
        "Objective": f"`{run['objective']}`, alpha {config['alpha']}, tau {round(config['tau'], 2)}",
        "Adapter": f"LoRA r={config['lora_rank']}, alpha={config['lora_alpha']}, dropout={config['lora_dropout']}"
        + (f", scaled by {scale:g}" if scale != 1 else ""),
        "Training data": f"{counted(run['records'], 'rejection record')}, no chosen answers{held_out}",
        "Format": format,
        "Hardware": run["device"],
        "Steps": f"{run['steps']:,} in {run['seconds']:,.0f} s",
        "Final loss": f"{run['loss_final']:.4f} {measured_on}, {run['loss_training']:.4f} in training",
        "Loss floor": f"{run['loss_floor']:.4f}",
        "Optimality gap": f"{run['optimality_gap']:.4f} nats{relative}",
        **_rejected_row(run["rejected_nll_base"], run["rejected_nll_final"]),
        **{DRIFT_TITLES[kind]: _describe_drift(drift) for kind, drift in run.get("drift", {}).items()},
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _describe_drift(drift: Mapping[str, float]) -> str:
    """What training did to a kind of text."""
    return (
        f"KL {drift['kl']:.3f}, entropy {drift['entropy_base']:.2f} -> {drift['entropy']:.2f}, "
        f"NLL {drift['nll_base']:.3f} -> {drift['nll']:.3f} nats per token"
    )


def _rejected_row(base: float | None, final: float | None) -> dict[str, str]:
    """The row of the rejected answers, if any was measured."""
    is_measured = base is not None and final is not None
    return {"Rejected answers": f"{base:.3f} -> {final:.3f} nats per token"} if is_measured else {}


def front_matter(header: Mapping[str, Any]) -> str:
    """A card's YAML header, without the fields that are None."""
    fields = {key: value for key, value in header.items() if value is not None}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _base_fields(base: str, relation: str) -> dict[str, str]:
    """The header's fields about a base model that is on the Hub."""
    return {"base_model": base, "base_model_relation": relation} if HUB_ID.fullmatch(base) else {}


EXPLANATION = """\
The loss is `alpha KL(P || model) + (1 - alpha) contrast`, P the complement distribution of the rejections. Its floor is
the least value any model could reach on this data, the optimality gap what is left above it."""
