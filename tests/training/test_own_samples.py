"""Samples of the base beside the rejected answers."""

from __future__ import annotations

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import make_record
from buleyean_rl.inference.protocol import Answer
from buleyean_rl.training.own_samples import add_own_samples
from parrot import Parrot
from tiny import tiny_tokenizer


def test_own_samples_stand_beside_the_rejections_at_count_0() -> None:
    records = [make_record("Hi", ["No."], [3], 3, [[[0, 2]]]), make_record("And?", ["AND?", "Why"], [1, 2], 4)]
    parrot = Parrot()  # says every prompt again, in capitals
    grown = add_own_samples(records, parrot, 2, seed=5)
    assert [record.rejected_responses for record in grown] == [("No.", "HI"), ("AND?", "Why")]  # each once
    assert [record.rejection_counts for record in grown] == [(3, 0), (1, 2)]
    assert [record.rejected_spans for record in grown] == [(((0, 2),), ()), ((), ())]
    assert [record.rounds for record in grown] == [(3, 3), (4, 4)]
    conversations, sampling = parrot.asked[0]
    assert [messages[-1]["content"] for messages in conversations] == ["Hi", "Hi", "And?", "And?"]
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 1.0, 5)
    assert [record.ended for record in grown] == [(None, True), (None, None)]
    assert all(record.tokenizer is None for record in grown)


def test_own_samples_keep_the_ids_that_were_drawn_where_the_records_have_no_others() -> None:
    talker = Parrot()
    talker.answers = lambda *_, **__: ((n, Answer("Hm.", 2, True, (1, 2))) for n in range(2))  # type: ignore[method-assign, assignment, misc]
    talker.tokenizer = tiny_tokenizer()
    drawn = {"token_ids": [[5]], "policy": {"model": "another"}}
    ours, others = make_record("Hi", ["No."]), make_record("Hi", ["No."], tokenizer="another", **drawn)  # type: ignore[arg-type]
    grown, beside = add_own_samples([ours, others], talker, 1)
    assert (grown.token_ids, grown.tokenizer) == ((None, (1, 2)), tokenizer_hash(talker.tokenizer))
    assert (beside.token_ids, beside.tokenizer, beside.policy) == (((5,), None), "another", None)
