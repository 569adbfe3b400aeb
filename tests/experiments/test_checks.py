from types import SimpleNamespace

import pytest

from experiments.checks import check_arms, check_counts, check_rates, check_seeds
from jaxlm.core.errors import ConfigError


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: check_counts(SimpleNamespace(steps=1, rows=0), "steps", "rows"), "rows is 0, expected at least 1"),
        (lambda: check_rates(SimpleNamespace(rates=()), "rates"), "rates are \\(\\), expected positive ones"),
        (lambda: check_rates(SimpleNamespace(rates=(1.0, -1.0)), "rates"), "rates are \\(1.0, -1.0\\)"),
        (lambda: check_rates(SimpleNamespace(rates=(float("nan"),)), "rates"), "rates are \\(nan,\\)"),
        (lambda: check_seeds((), 0), "seeds are \\(\\), expected different ones, none of them 0"),
        (lambda: check_seeds((1, 1)), "seeds are \\(1, 1\\), expected different ones$"),
        (lambda: check_seeds((0, 1), 0), "none of them 0"),
        (lambda: check_arms(("adm",), ("adam", "sgd")), "no arm 'adm': did you mean 'adam'"),
        (
            lambda: check_arms(("adam", "adam"), ("adam", "sgd")),
            "arms are \\('adam', 'adam'\\), expected different ones",
        ),
        (lambda: check_arms((), ("adam",)), "arms are \\(\\)"),
    ],
)
def test_what_cannot_work_is_named(check, said):
    with pytest.raises(ConfigError, match=said):
        check()


def test_what_can_work_passes():
    check_counts(SimpleNamespace(steps=1), "steps")
    check_rates(SimpleNamespace(rates=(1e-3, 2e-3)), "rates")
    check_seeds((0, 1))
    check_seeds((1, 2), 0)
    check_arms(("sgd", "adam"), ("adam", "sgd"))
