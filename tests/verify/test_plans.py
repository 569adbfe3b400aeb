import pytest

from jaxlm.core.errors import DataError
from jaxlm.verify.plans import Call, parse_plan, plans_equal, same_plan

PLAN = '1. find_contact("Ada")\n2. read_file("notes, old")\n3. summarize($2)\n4. send($1, $3)\n5. join()'


def test_a_plan_is_its_calls_with_results_as_places():
    assert parse_plan(PLAN) == (
        Call("find_contact", ("Ada",)),
        Call("read_file", ("notes, old",)),
        Call("summarize", (1,)),
        Call("send", (0, 2)),
    )
    assert parse_plan("7 . show ( $ 3 )".replace("$ 3", "'a'")) == (Call("show", ("a",)),)
    assert parse_plan("10. f()\n20. g($10)") == (Call("f", ()), Call("g", (0,)))


def test_order_and_numbers_do_not_matter():
    assert plans_equal('1. read_file("notes, old")\n3. find_contact(Ada)\n4. summarize($1)\n9. send($3, $4)', PLAN)


@pytest.mark.parametrize(
    "other",
    [
        PLAN.replace("$1, $3", "$3, $1"),  # places of arguments count
        PLAN.replace("$1, $3", "$1, $2"),  # another dependency
        PLAN.replace("summarize", "translate"),
        PLAN.replace("4. send($1, $3)", "4. send($1, $3)\n6. show($3)"),
        "no plan at all",
        PLAN.replace("$3)", f"${'9' * 5000})"),
        "",
    ],
)
def test_other_graphs_are_other_plans(other):
    assert not plans_equal(other, PLAN)


def test_texts_count_unless_told_otherwise():
    other = PLAN.replace("Ada", "Alan")
    assert not plans_equal(other, PLAN)
    assert plans_equal(other, PLAN, arguments=False)


def test_a_shared_result_is_not_two_results():
    shared = parse_plan("1. read(a)\n2. send($1)\n3. send($1)")
    twice = parse_plan("1. read(a)\n2. read(a)\n3. send($1)\n4. send($2)")
    assert not same_plan(shared, twice)
    crossed = parse_plan("1. read(a)\n2. read(a)\n3. send($2)\n4. send($1)")
    assert same_plan(twice, crossed)
    both_of_one = parse_plan("1. read(a)\n2. read(a)\n3. send($1)\n4. send($1)")
    assert not same_plan(twice, both_of_one)
    assert not same_plan(both_of_one, twice)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1. f(a)\nhello", "line 2 of the plan is no numbered call: 'hello'"),
        ("1. f(a)\n1. g(a)", "line 2 of the plan has the number 1 again"),
        ("1. f($2)\n2. g(a)", r"line 1 of the plan takes \$2, the result of no call before it"),
        ("1. f('a)", "line 1 of the plan has arguments that cannot be read"),
        ("1. join()", "has no call"),
        ("9" * 5000 + ". f(a)", "line 1 of the plan is no numbered call"),
        (f"1. f(a)\n2. g(${'9' * 5000})", r"line 2 of the plan takes \$9{80}, the result"),
    ],
)
def test_what_is_no_plan_is_named(text, message):
    with pytest.raises(DataError, match=message):
        parse_plan(text)
