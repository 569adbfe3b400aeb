import dataclasses

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.chat import ChatML, Plain, chat_template
from jaxlm.data.chat_batches import ChatBatches, LabeledBatches, PairBatches, SampleBatches
from jaxlm.data.chat_examples import chat_examples, labeled_examples, preference_examples
from jaxlm.data.chat_jinja import JinjaTemplate
from jaxlm.data.chat_records import ChatRecord, LabeledRecord, PreferenceRecord
from jaxlm.data.packing import Piece, fill_rows
from tests.data.test_chat import CHAT, TOKENIZER
from tests.data.test_chat_jinja import REASONED, REASONING

ARRAYS = {"inputs", "targets", "loss_weights", "segment_ids", "positions"}


def user(text):
    return ({"role": "user", "content": text},)


def reply(text):
    return ({"role": "assistant", "content": text},)


def trained(example):
    """The targets that have weight, as text."""
    return TOKENIZER.show(example["targets"][example["loss_weights"] > 0])


def records(*sizes):
    return [ChatRecord((*user("q"), *reply("r" * n)), f"x line {i}", 1) for i, n in enumerate(sizes, 1)]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("replies", "Hello<|im_end|>abc<|im_end|>"),
        ("last", "abc<|im_end|>"),
        ("completion", "abc<|im_end|>"),
    ],
)
def test_what_is_trained(train_on, expected):
    (example,), counts = chat_examples(
        [ChatRecord(tuple(CHAT), "x", 4)], TOKENIZER, ChatML(), length=200, train_on=train_on
    )
    assert trained(example) == expected
    ids, _ = ChatML().encode(TOKENIZER, CHAT)
    np.testing.assert_array_equal(example["inputs"], ids[:-1])
    np.testing.assert_array_equal(example["targets"], ids[1:])
    assert (counts.examples, counts.tokens) == (1, len(ids) - 1)


def test_training_on_everything_weighs_every_target():
    (example,), counts = chat_examples(records(3), TOKENIZER, Plain(), length=99, train_on="all")
    assert example["loss_weights"].all()
    assert counts.trained_tokens == counts.tokens


def test_a_template_that_rewrites_the_past_gives_an_example_for_each_reply():
    first, second = chat_examples(
        [ChatRecord(tuple(REASONED), "x")], TOKENIZER, JinjaTemplate(REASONING), length=400
    )[0]
    # The second <|im_end|> of the first reply is its text, which spells a control token.
    assert trained(first) == "<think>\nhm<|im_end|>\n</think>\n\nHello <|im_end|><|im_end|>"
    assert trained(second) == "<think>\nso\n</think>\n\nabc<|im_end|>"


def test_what_is_too_long_is_dropped_or_truncated_and_counted():
    examples, counts = chat_examples(records(2, 90, 5), TOKENIZER, Plain(), length=20)
    assert [len(e["inputs"]) for e in examples] == [4, 7]
    assert (counts.records, counts.examples, counts.dropped, counts.truncated, counts.longest) == (3, 2, 1, 0, 92)
    assert "1 dropped and 0 truncated at 20 tokens (the longest has 92)" in counts.describe(20)
    examples, counts = chat_examples(records(2, 90, 5), TOKENIZER, Plain(), length=20, too_long="truncate")
    assert [len(e["inputs"]) for e in examples] == [4, 20, 7]
    assert (counts.dropped, counts.truncated) == (0, 1)
    late = [ChatRecord((*user("q" * 50), *reply("r")), "x line 1")]
    with pytest.raises(DataError, match="no example is left of 1 records: 1 are longer than 20"):
        chat_examples(late, TOKENIZER, Plain(), length=20, too_long="truncate")


def test_errors_name_the_record():
    wrong = [ChatRecord((*user("a"), *user("b"), *reply("c")), "f.jsonl line 7")]
    with pytest.raises(DataError, match=r"f.jsonl line 7: turn 2 is the user's"):
        chat_examples(wrong, TOKENIZER, Plain(), length=9)
    with pytest.raises(DataError, match=r"f.jsonl line 7: train_on 'completion' needs"):
        chat_examples(wrong, TOKENIZER, ChatML(), length=99, train_on="completion")
    endless = JinjaTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match="no special token"):
        chat_examples(records(1), TOKENIZER, endless, length=9)


def test_packed_rows_hold_every_example_once_and_whole():
    examples, _ = chat_examples(records(1, 2, 3, 4, 5, 6, 7), TOKENIZER, Plain(), length=12)
    batches = ChatBatches(examples, batch_size=2, length=12, seed=0)
    rows = [batch for batch in batches.one_pass()]
    assert set(rows[0]) == ARRAYS
    found = []
    for batch in rows:
        for row in range(2):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                at = batch["segment_ids"][row] == segment
                np.testing.assert_array_equal(batch["positions"][row, at], np.arange(at.sum()))
                found.append(trained({name: x[row, at] for name, x in batch.items()}))
    assert sorted(found) == sorted(trained(e) for e in examples)
    assert batches.count < len(examples)
    assert ChatBatches(examples, batch_size=2, length=12, seed=0, pack=False).count == len(examples)


def test_batches_are_a_function_of_the_step_and_resume_there():
    examples, _ = chat_examples(records(*range(1, 30)), TOKENIZER, Plain(), length=40)
    settings = {"batch_size": 4, "length": 40, "seed": 3}
    batches = ChatBatches(examples, **settings)
    first = [next(batches) for _ in range(5)]
    again = ChatBatches(examples, **settings)
    again.set_state({**batches.get_state(), "next_step": 2})
    for batch in first[2:]:
        np.testing.assert_equal(next(again), batch)
    rows = np.concatenate([batches.row_indices(step) for step in range(batches.count)])
    for epoch in rows.reshape(-1, batches.count):
        assert sorted(epoch) == list(range(batches.count))
    assert (rows[: batches.count] != rows[batches.count : 2 * batches.count]).any()
    parts = [ChatBatches(examples, **settings, process_index=p, process_count=2)[7] for p in range(2)]
    np.testing.assert_equal({k: np.concatenate([p[k] for p in parts]) for k in ARRAYS}, batches[7])


def test_a_batch_counts_samples_not_rows():
    examples, _ = chat_examples(records(*range(1, 30)), TOKENIZER, Plain(), length=40)
    settings = {"samples": 8, "steps": 20, "length": 40, "seed": 3}
    batches = SampleBatches(examples, **settings)
    used = []
    for step in range(20):
        batch, plan = batches[step], batches.plan(step)
        assert batch["inputs"].shape == (batches.batch_size, 40)
        # A row's highest segment is the number of its examples.
        assert batch["segment_ids"].max(axis=1).sum() == 8
        drawn = [piece.example for row in plan for piece in row]
        assert batch["loss_weights"].sum() == sum(examples[i]["loss_weights"].sum() for i in drawn)
        assert sorted(drawn) == sorted(batches.row_indices(step))
        used += batches.row_indices(step).tolist()
    assert batches.batch_size < 8  # several to a row
    assert batches.batch_size == max(sum(map(bool, batches.plan(step))) for step in range(20))
    assert batches.steps_per_epoch == 29 / 8
    assert sorted(used[:29]) == sorted(used[29:58]) == list(range(29))
    passed = list(batches.one_pass())
    assert sum(b["segment_ids"].max(axis=1).sum() for b in passed) == 29
    again = SampleBatches(examples, **{**settings, "steps": 40})
    again.set_state({**batches.get_state(), "next_step": 2})
    assert next(again)["loss_weights"].sum() == batches[2]["loss_weights"].sum()
    even = SampleBatches(examples, **settings, row_multiple=3, process_count=2)
    assert even.batch_size % 6 == 0
    assert even[0]["inputs"].shape[0] == even.batch_size // 2
    with pytest.raises(DataError, match="trained on other data"):
        SampleBatches(examples, **{**settings, "samples": 9}).set_state(batches.get_state())
    with pytest.raises(ConfigError, match="samples is 0"):
        SampleBatches(examples, **{**settings, "samples": 0})


def test_a_batch_that_was_not_planned_for_and_does_not_fit_is_refused():
    examples, _ = chat_examples(records(1, 30), TOKENIZER, Plain(), length=34)
    # Of both, twice over: the third sample is the short one, then the long one is left for the next batch.
    made = (SampleBatches(examples, samples=3, steps=1, length=34, seed=seed) for seed in range(20))
    batches = next(b for b in made if b.batch_size == 2)
    with pytest.raises(DataError, match="the 3 samples of batch 1 need 3 rows, but there are 2"):
        batches[1]


def test_provenance_is_enough_to_make_a_batch_again():
    examples, _ = chat_examples(records(*range(1, 30)), TOKENIZER, Plain(), length=40)
    batches = ChatBatches(examples, batch_size=4, length=40, seed=3)
    for step in (0, 11):
        rows = batches.provenance(step)["rows"]
        made = fill_rows(examples, [[Piece(*piece) for piece in row["pieces"]] for row in rows], 40)
        np.testing.assert_equal(made, batches[step])
        assert [row["weight"] for row in rows] == batches[step]["loss_weights"].sum(axis=1).tolist()
        assert rows[0]["epoch"] == 4 * step // batches.count
    batches = SampleBatches(examples, samples=6, steps=12, length=40, seed=3)
    rows = batches.provenance(11)["rows"]
    made = fill_rows(examples, [[Piece(*piece) for piece in row["pieces"]] for row in rows], 40)
    np.testing.assert_equal(made, batches[11])
    assert rows[0]["epoch"] == 66 // 29
    pairs = [(examples[i], examples[i + 1]) for i in range(0, 20, 2)]
    batches = PairBatches(pairs, batch_size=3, length=40, seed=3)
    for row, batch_row in zip(batches.provenance(2)["rows"], batches[2]["targets"]):
        for (example, start, stop), targets in zip(row["pieces"], batch_row):
            assert start == 0
            np.testing.assert_array_equal(targets[:stop], batches.examples[example]["targets"])


def test_other_data_or_settings_do_not_resume():
    examples, _ = chat_examples(records(1, 2, 3), TOKENIZER, Plain(), length=9)
    batches = ChatBatches(examples, batch_size=2, length=9, seed=0)
    state = batches.get_state()
    for other in (
        ChatBatches(examples[:2], batch_size=2, length=9, seed=0),
        ChatBatches(examples, batch_size=2, length=9, seed=1),
    ):
        with pytest.raises(DataError, match="trained on other data"):
            other.set_state(state)
    with pytest.raises(DataError, match="an example has 5 pairs, but rows hold 4"):
        ChatBatches(examples, batch_size=2, length=4, seed=0)


def test_pairs_share_an_index():
    pairs, counts = preference_examples(
        [PreferenceRecord(user("q" * n), reply("good"), reply("bad"), f"x line {n}") for n in (1, 2, 90)],
        TOKENIZER,
        chat_template("plain"),
        length=20,
    )
    assert (counts.examples, counts.dropped) == (2, 1)
    batch = next(PairBatches(pairs, batch_size=2, length=20, seed=0))
    assert {name: x.shape for name, x in batch.items()} == dict.fromkeys(ARRAYS, (2, 2, 20))
    for row in range(2):
        sides = [{name: x[row, side] for name, x in batch.items()} for side in range(2)]
        assert [trained(side) for side in sides] == ["good</s>", "bad</s>"]
        assert sides[0]["inputs"][1] == sides[1]["inputs"][1]


def test_mismatched_rows_have_the_next_row_s_completion():
    labeled, _ = labeled_examples(
        [LabeledRecord(user(f"q{c}"), reply(f"r{c}"), c in "ab", "x") for c in "abcd"],
        TOKENIZER,
        chat_template("plain"),
        length=20,
    )
    batches = LabeledBatches(labeled, batch_size=3, length=20, seed=1)
    batch = next(batches)
    rows = batches.row_indices(0)
    names = ["abcd"[r] for r in rows]
    assert batch["labels"].tolist() == [float(n in "ab") for n in names]
    for row, (mine, other) in enumerate(zip(names, np.roll(names, -1))):
        here = {name: x[row] for name, x in batch.items() if name != "labels"}
        assert trained(here) == f"r{mine}</s>"
        mixed = {name.removeprefix("kl_"): x for name, x in here.items() if name.startswith("kl_")}
        n = int(mixed["segment_ids"].sum())
        assert TOKENIZER.show(mixed["inputs"][:n]) + TOKENIZER.show(mixed["targets"][n - 1 : n]) == (
            f"<s>q{mine}r{other}</s>"
        )
        assert trained(mixed) == f"r{other}</s>"
    with pytest.raises(ConfigError, match="KTO needs another row's completion"):
        LabeledBatches(labeled, batch_size=1, length=20, seed=1)
    flipped = dataclasses.replace(labeled, labels=[not x for x in labeled.labels])
    with pytest.raises(DataError, match="trained on other data"):
        LabeledBatches(flipped, batch_size=3, length=20, seed=1).set_state(batches.get_state())
