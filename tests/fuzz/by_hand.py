"""Coverage-guided fuzzing of one target, by hand and for as long as one likes; needs `pip install atheris`.

    python -m tests.fuzz.by_hand gguf -max_total_time=600          # options of libFuzzer after the target

The inputs are those of the tests (`tests.fuzz.targets`), chosen so that they reach lines of jaxlm which no input
before did. A finding ends it with a traceback; `python -m tests.fuzz.run` makes findings of its own small.
"""

import sys

import atheris
from hypothesis import HealthCheck, given, settings

from jaxlm.core.errors import JaxlmError
from tests.fuzz.run import fuzz
from tests.fuzz.target import home
from tests.fuzz.targets import TARGETS


def main() -> None:
    name = sys.argv.pop(1)
    target, folder = TARGETS[name], home() / "in" / name
    with atheris.instrument_imports(include=["jaxlm"]):
        fuzz(name, 3)  # readers import inside functions

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs())
    def check(case):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            target.read(case, folder)
        except JaxlmError:
            return

    atheris.Setup(sys.argv, atheris.instrument_func(check.hypothesis.fuzz_one_input))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
