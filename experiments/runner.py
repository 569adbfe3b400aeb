"""The command line of every experiment: options, the run folder, errors, and the report at the end.

An experiment is a module whose docstring cites the paper and states the claim (its first line is what
`python -m experiments list` shows), with a frozen dataclass `Config`, `PRESETS: dict[str, Config]` and
`run(config, out) -> Report`, and it ends with

    if __name__ == "__main__":
        runner.main(__name__)

A tool (generate, evaluate) has `Config` and `run(config)` alone and ends with `runner.tool(__name__)`: the
same options and errors, no presets and no run folder.

Exit codes: 0 the run is complete, whether or not its claims hold; 1 the run failed; 2 the input cannot work,
found before any compute; 130 interrupted, and the same command resumes.
"""

import contextlib
import dataclasses
import difflib
import errno
import os
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn

from jaxlm.core.configs import differences, from_dict, to_dict
from jaxlm.core.errors import CheckpointError, ConfigError, DataError, JaxlmError, ProcessLostError, nearest
from jaxlm.core.json_files import write_json
from jaxlm.reporting.report import Report, format_cell


def main(name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the experiment in module `name` with the words of the command line, and exits."""
    _leave(lambda: execute(sys.modules[name], sys.argv[1:] if argv is None else argv))


def tool(name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the tool in module `name` with the words of the command line, and exits."""
    _leave(lambda: execute_tool(sys.modules[name], sys.argv[1:] if argv is None else argv))


def execute(experiment: ModuleType, argv: Sequence[str]) -> int:
    """Parses `argv`, prepares the run folder, runs, writes the report. Returns the exit code."""
    module = _module_name(experiment)
    command = shlex.join(["python", "-m", module, *argv])

    def prepare() -> tuple[str, Path, Any, bool]:
        preset = _preset(experiment.PRESETS, argv)
        slug = module.rsplit(".", 1)[-1]
        arguments = parse(
            experiment.Config,
            argv,
            module=module,
            description=experiment.__doc__ or "",
            default=experiment.PRESETS[preset],
            extra={
                "preset": (Literal[tuple(experiment.PRESETS)], preset, "Which settings to start from."),
                "out": (Path, Path("runs") / f"{slug}-{preset}", "Run folder; given again, it resumes."),
            },
        )
        is_new = not arguments.out.exists()
        open_run_folder(arguments.out, arguments.config)
        return preset, arguments.out, arguments.config, is_new

    def work(prepared: tuple[str, Path, Any, bool]) -> None:
        preset, out, config, is_new = prepared
        _show_config(command, out, config)
        started = time.monotonic()
        try:
            report = experiment.run(config, out)
        except (ConfigError, DataError):
            if is_new:
                _remove_unused(out)
            raise
        if not isinstance(report, Report):
            raise ConfigError(f"{module}.run returned {type(report).__name__}, expected a Report")
        report = dataclasses.replace(
            report,
            experiment=module.removeprefix("experiments."),
            preset=preset,
            command=command,
            seconds=time.monotonic() - started if is_new else None,  # of a resumed run only the rest is timed
            config=to_dict(config),
        )
        _finish(report, out)

    return _guard(argv, command, prepare, work)


def execute_tool(module: ModuleType, argv: Sequence[str]) -> int:
    """Parses `argv` into the module's `Config` and calls its `run(config)`. Returns the exit code."""
    name = _module_name(module)

    def prepare() -> Any:
        return parse(module.Config, argv, module=name, description=module.__doc__ or "").config

    return _guard(argv, None, prepare, module.run)


def parse(
    config: type,
    argv: Sequence[str],
    *,
    module: str,
    description: str,
    default: Any = None,
    extra: dict[str, tuple[Any, Any, str]] | None = None,
) -> Any:
    """The words of a command line as an object with `config`, `debug` and the `extra` options.

    Args:
      config: the dataclass whose fields are options, nested ones as `--model.num_layers 3`.
      argv: the words after `python -m module`.
      module: named in help and errors.
      description: what `--help` says first.
      default: values of the fields that are not given; None for those of the dataclass.
      extra: further options as `name: (type, default, help)`.

    Raises:
      ConfigError: an unknown option; names the nearest ones.
      SystemExit: code 0 after `--help`, 2 after a bad value (which was then explained).
    """
    import tyro

    flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
    extra = (extra or {}) | {"debug": (flag, False, "Show where in the code an error was raised.")}
    fields = {field.name for field in dataclasses.fields(config)}
    for name in extra:
        if name in fields:
            raise ConfigError(f"{module}: Config has a field '{name}', which the command line uses itself")
    options = [
        (name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=value))
        for name, (kind, value, text) in extra.items()
    ]
    kind = Annotated[config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands]
    whole = ("config", kind) if default is None else ("config", kind, dataclasses.field(default=default))
    arguments, unknown = tyro.cli(
        dataclasses.make_dataclass("Arguments", [whole, *options], kw_only=True),
        args=argv,
        prog=f"python -m {module}",
        description=textwrap.indent(description.strip(), "  "),  # indented lines are not joined
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        raise ConfigError(_unknown_option(unknown, to_dict(arguments.config), extra, module))
    return arguments


def open_run_folder(out: Path, config: Any) -> None:
    """Makes the run folder and saves `config.json`, or checks that the folder holds a run of the same config.

    Fields that an older run does not have count as their defaults.

    Raises:
      ConfigError: the path is a file, or cannot be written to.
      CheckpointError: the folder holds another config; lists the differences.
    """
    from jaxlm.reporting.run_folder import read_config

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, expected a folder")
    path = out / "config.json"
    if not path.exists():
        try:
            write_json(path, to_dict(config))
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot write there: {error.strerror}") from error
        return
    old = read_config(out)
    with contextlib.suppress(ConfigError):  # of another experiment: the differences say so
        old = to_dict(from_dict(type(config), old))
    changed = differences(old, to_dict(config))
    if changed:
        lines = "\n  ".join(changed)
        raise CheckpointError(
            f"{out} holds a run with another config (there -> here):\n  {lines}\n"
            "Choose another folder with --out, or delete this one."
        )


def _remove_unused(out: Path) -> None:
    """Removes a run folder in which nothing was made, so that the corrected command may use it."""
    with contextlib.suppress(FileNotFoundError):  # other processes of the run do the same
        if {path.name for path in out.iterdir()} <= {"config.json", ".lock"}:
            for path in out.iterdir():
                path.unlink()
            out.rmdir()


def _leave(work: Callable[[], int]) -> NoReturn:
    """Exits with the code that `work` returns, also where a read hangs that an orderly end would wait for."""
    try:
        code = work()
    except Exception:
        if "jax" not in sys.modules or not sys.modules["jax"].distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    watch = sys.modules.get("jaxlm.data.watch")
    if watch is not None and watch.stalled():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if "jax" in sys.modules:
        from jaxlm.core.distributed import leave

        leave(code)
    sys.exit(code)


def _finish(report: Report, out: Path) -> None:
    """Adds the curves of the run and how it was made, writes the report, and says what came out."""
    if "jax" in sys.modules and sys.modules["jax"].process_index() != 0:
        return  # the first host writes
    from jaxlm.reporting import html
    from jaxlm.reporting.environment import environment
    from jaxlm.reporting.figures import loss_curves
    from jaxlm.reporting.run_folder import read_metrics

    try:
        curves = loss_curves(read_metrics(out))
    except DataError as error:  # a damaged log must not cost the report
        print(f"warning: no curves: {error}", file=sys.stderr)
        curves = []
    drawn = {figure.title for figure in report.figures}
    curves = tuple(figure for figure in curves if figure.title not in drawn)
    report = dataclasses.replace(report, figures=curves + report.figures, environment=environment())
    path = html.write(report, out)
    print()
    for label, value in report.numbers.items():
        print(f"{label}: {format_cell(value)}")
    for claim in report.claims:
        print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.statement}")
        print(f"  paper {format_cell(claim.paper_value)}, here {format_cell(claim.measured)}")
    print(f"report: {path}")


def _guard(argv: Sequence[str], command: str | None, prepare: Callable[[], Any], work: Callable[[Any], None]) -> int:
    """Calls `prepare` then `work`, turns errors into one clear message and an exit code."""
    ready = False
    try:
        prepared = prepare()
        ready = True
        work(prepared)
    except JaxlmError as error:
        if "--debug" in argv:
            traceback.print_exc()
        resume = f"; resume with: {command}" if command and isinstance(error, ProcessLostError) else ""
        print(f"error: {error}{resume}", file=sys.stderr)
        return 1 if ready and not isinstance(error, (ConfigError, DataError)) else 2
    except OSError as error:
        if error.errno not in _DISK:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        resume = f"; when that is mended, the same command goes on: {command}" if command and ready else ""
        print(f"error: {error.strerror}: {error.filename or 'while writing'}{resume}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resume = f"; resume with: {command}" if command and ready else ""
        print(f"\ninterrupted{resume}", file=sys.stderr)
        return 130
    return 0


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""What the machine, not the program, is to blame for."""


def _preset(presets: dict[str, Any], argv: Sequence[str]) -> str:
    """The preset named on the command line, before the options whose defaults it gives are parsed."""
    chosen = "small" if "small" in presets else next(iter(presets))
    for i, word in enumerate(argv):
        if word == "--preset":
            chosen = argv[i + 1] if i + 1 < len(argv) else ""
        elif word.startswith("--preset="):
            chosen = word.removeprefix("--preset=")
    if chosen not in presets:
        raise ConfigError(f"no preset '{chosen}': {nearest(chosen, presets)}")
    return chosen


def _unknown_option(words: Sequence[str], config: dict, extra: dict, module: str) -> str:
    from jaxlm.reporting.html import flatten

    word = next((w for w in words if w.startswith("-")), None)
    if word is None:
        return f"unexpected word '{words[0]}' (options are written --name value)"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    known = [*flatten(config), *extra]
    last = {}
    for option in known:
        last.setdefault(option.rsplit(".", 1)[-1], []).append(option)
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=3, cutoff=0.6)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.75) + [o for key in close for o in last[key]]
    hint = " or ".join(f"--{option}" for option in list(dict.fromkeys(near))[:4])
    return (
        f"no option '{word.split('=')[0]}'"
        + (f": did you mean {hint}?" if hint else "")
        + f" (all of them: python -m {module} --help)"
    )


def _show_config(command: str, out: Path, config: Any) -> None:
    from jaxlm.reporting.html import flatten

    print(command)
    print(f"run folder: {out}")
    flat = flatten(to_dict(config))
    width = max(map(len, flat), default=0)
    for name, value in flat.items():
        print(f"  {name:<{width}}  {value!r}")
    sys.stdout.flush()


def _module_name(module: ModuleType) -> str:
    """The name to run a module by; `__main__` knows it from how it was started."""
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return spec.name
    return f"experiments.{Path(getattr(module, '__file__', module.__name__)).stem}"
