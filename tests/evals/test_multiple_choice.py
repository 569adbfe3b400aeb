import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.evals.multiple_choice import (
    ChoiceScores,
    Question,
    choice_metrics,
    few_shot,
    question_from_record,
    score_questions,
)
from jaxlm.scoring import TokenizerEncoding, score_pairs
from jaxlm.testing import tiny_decoder

BYTES = TokenizerEncoding(ByteTokenizer())


def scores(choices, log_likelihoods, *, answer=0, num_tokens=None, unconditional=None):
    question = Question("q", tuple(choices), answer)
    num_tokens = num_tokens or (1,) * len(choices)
    without = None if unconditional is None else np.array(unconditional)
    return ChoiceScores(question, np.array(log_likelihoods), num_tokens, without)


def test_characters_against_sums():
    # The example of the harness's card: -2 over 1 character, -6 over 4.
    found = scores(["a", "abcd"], [-2.0, -6.0])
    assert found.prediction("none") == 0
    assert found.prediction("characters") == 1


def test_bytes_are_not_characters():
    # Three characters each; six bytes against three.
    found = scores(["\u00e9\u00e9\u00e9", "abc"], [-4.0, -3.0])
    assert found.prediction("characters") == 1
    assert found.prediction("bytes") == 0


def test_tokens():
    found = scores(["aaaa", "b"], [-6.0, -4.0], num_tokens=(3, 1))
    assert found.normalized("tokens").tolist() == [-2, -4]
    assert [found.prediction(n) for n in ("none", "tokens")] == [1, 0]


def test_unconditional_takes_the_prior_away():
    # The first choice is likelier, but it always is.
    found = scores(["yes", "no"], [-1.0, -2.0], unconditional=[-0.5, -3.0])
    assert found.normalized("unconditional").tolist() == [-0.5, 1.0]
    assert found.prediction("none") == 0
    assert found.prediction("unconditional") == 1


def test_brier():
    found = scores(["a", "b"], np.log([0.6, 0.2]), answer=1)
    np.testing.assert_allclose(found.probabilities, [0.75, 0.25])
    assert found.brier == pytest.approx(0.75**2 + 0.75**2)


def test_metrics_are_means_with_errors():
    found = [scores(["a", "abcd"], [-2.0, -6.0], answer=i) for i in (0, 0, 0, 1)]
    metrics = choice_metrics(found, ("none", "characters"))
    assert metrics["acc"] == (0.75, pytest.approx(np.sqrt(0.75 * 0.25 / 3)))
    assert metrics["acc_norm"].value == 0.25
    assert set(metrics) == {"acc", "acc_norm", "brier"}


def test_scores_are_those_of_pairs():
    subject = tiny_decoder("llama", vocab_size=259)
    questions = [Question("one", ("two", "three", "four"), 2), Question("", ("x", "four"), 0, delimiter="")]
    pairs = [("one", " two"), ("one", " three"), ("one", " four"), ("", "x"), ("", "four")]
    priors = [("", " two"), ("", " three"), ("", " four"), ("", "x"), ("", "four")]
    expected = np.array([s.log_likelihood for s in score_pairs(*subject, BYTES, pairs)])
    alone = np.array([s.log_likelihood for s in score_pairs(*subject, BYTES, priors)])
    found = score_questions(*subject, BYTES, questions, normalizations=("none", "unconditional"))
    np.testing.assert_allclose(np.concatenate([f.log_likelihoods for f in found]), expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([f.unconditional for f in found]), alone, atol=1e-5)
    assert [f.num_tokens for f in found] == [(4, 6, 5), (1, 4)]


def test_few_shot():
    example = Question("Q: 1?\nA:", ("one", "two"), 1)
    question = Question("Q: 2?\nA:", ("x", "y"), 0)
    assert few_shot([example, example], question).context == "Q: 1?\nA: two\n\nQ: 1?\nA: two\n\nQ: 2?\nA:"
    assert few_shot([], question) == question


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("B", 1), ("no", 1), ("yes", 0)])
def test_answers_of_records(answer, index):
    record = {"question": "{braces}?", "choices": ["yes", "no"], "answer": answer}
    question = question_from_record(record, "here")
    assert question == Question("Question: {braces}?\nAnswer:", ("yes", "no"), index)


def test_a_choice_that_is_a_letter_wins():
    record = {"question": "?", "choices": ["B", "A"], "answer": "A"}
    assert question_from_record(record, "here").answer == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "x line 3: field 'question' holds NoneType, expected text"),
        ({"choices": "ab"}, "x line 3: field 'choices' holds str, expected a list"),
        ({"choices": ["a", 1]}, "x line 3: field 'choices' holds"),
        ({"choices": ["a"]}, "x line 3: choices are .* expected at least two"),
        ({"choices": ["a", ""]}, "x line 3: choices are .* none of them empty"),
        ({"answer": "C"}, "x line 3: answer 'C' is neither a choice nor one of A, B"),
        ({"answer": 2}, "x line 3: answer is 2, expected 0 to 1"),
        ({"answer": True}, "x line 3: field 'answer' holds bool"),
    ],
)
def test_bad_records_are_named(change, message):
    record = {"question": "?", "choices": ["a", "b"], "answer": 0, **change}
    with pytest.raises(DataError, match=message):
        question_from_record(record, "x line 3")


def test_missing_field_is_named():
    with pytest.raises(DataError, match=r"x line 1: no field 'choices' \(fields present: question, options\)"):
        question_from_record({"question": "?", "options": []}, "x line 1")


def test_unknown_normalization_has_a_nearest():
    with pytest.raises(ConfigError, match="did you mean 'characters'"):
        score_questions(None, None, BYTES, [], normalizations=("character",))
    with pytest.raises(ConfigError, match="did you mean 'bytes'"):
        scores(["a", "b"], [0.0, 1.0]).normalized("byte")
    with pytest.raises(ConfigError, match="needs scores made with it"):
        scores(["a", "b"], [0.0, 1.0]).normalized("unconditional")
