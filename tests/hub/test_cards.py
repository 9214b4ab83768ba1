"""Cards: a header that a hub's own parser takes, a table of what happened, and nothing of this machine."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub import DatasetCard, ModelCard

from buleyean_rl.data.records import make_record, write_records
from buleyean_rl.hub.cards import data_card, gguf_card, run_card
from buleyean_rl.models.source import public_name_and_license
from sample_report import REPORT

RUN = asdict(REPORT)


def test_a_run_card_has_a_header_and_the_table() -> None:
    card = run_card(RUN, license="apache-2.0")
    header = ModelCard(card).data.to_dict()
    assert header == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["buleyean-rl", "negative-feedback", "lora"],
    }
    for row in (
        "| Base model | org/base |",
        "| Parameters | 134,515,008 (adapter: 4,884,480) |",
        "| Objective | `complement`, alpha 0.7, tau 1.0 |",
        "| Training data | 4,500 rejection records, no chosen answers (500 held out) |",
        "| Hardware | cpu, 2 threads |",
        "| Steps | 1,125 in 1,800 s |",
        "| Final loss | 0.5000 held out, 0.5100 in training |",
        "| Loss floor | 0.4800 |",
        "| Optimality gap | 0.0200 nats (5% of the start's) |",
    ):
        assert row in card.splitlines()


def test_a_card_claims_no_held_out_records_it_does_not_have() -> None:
    card = run_card(asdict(replace(REPORT, records_held_out=0, optimality_gap_relative=None)))
    assert "held out" not in card
    assert "| Final loss | 0.5000 on what it was trained on, 0.5100 in training |" in card
    assert "| Optimality gap | 0.0200 nats |" in card


def test_a_base_has_its_public_name() -> None:
    for model, name, license in (
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("org/model", "org/model", None),
        ("/home/somebody/models/mine", "mine", None),
        ("../mine/base.gguf", "base.gguf", None),
    ):
        assert public_name_and_license(model) == (name, license)
        card = run_card(RUN | {"model": model})
        assert "somebody" not in card
        header = ModelCard(card).data.to_dict()
        assert header.get("base_model") == (name if "/" in name else None)
        assert header.get("license") == license


def test_the_card_of_gguf_files() -> None:
    files = [("m-Q4_K_M.gguf", "Q4_K_M", 105_454_208), ("m-Q8_0.gguf", "Q8_0", 144_811_136)]
    card = gguf_card(files, RUN, name="my-model")
    header = ModelCard(card).data.to_dict()
    assert (header["library_name"], header["base_model_relation"]) == ("gguf", "finetune")
    assert "| `m-Q4_K_M.gguf` | Q4_K_M | 105 MB |" in card.splitlines()
    assert "| Optimality gap | 0.0200 nats (5% of the start's) |" in card.splitlines()
    assert "| Format | GGUF, for llama.cpp and what is built on it |" in card.splitlines()
    plain = gguf_card(files, None, name="my-model")
    assert "Optimality gap" not in plain
    assert "base_model" not in ModelCard(plain).data.to_dict()


def test_the_data_card_counts(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    rows = [make_record("Hi", ["No", "Go"], [3, 1], 5, [[(0, 1)], []]), make_record("Why", ["Because"], [2], 2)]
    write_records(path, rows)
    card = data_card(path, name="noes", file="records.jsonl", license="cc0-1.0")
    header = DatasetCard(card).data.to_dict()
    assert header["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "records.jsonl"}]}
    ]
    assert (header["license"], header["size_categories"]) == ("cc0-1.0", ["n<1K"])
    for row in (
        "| Records | 2 |",
        "| Rejected answers | 3 |",
        "| Rejections | 6 |",
        "| Answers with the wrong part marked | 1 |",
    ):
        assert row in card.splitlines()
