"""The process in which chat templates are rendered (`jaxlm.data.jinja_process` starts it): Jinja alone, in its sandbox.

Requests and answers are JSON texts, each after its length in four bytes, on standard input and output. This file is
run by its path and imports nothing of jaxlm.
"""

import datetime
import functools
import json
import struct
import sys

MAX_OUTPUT = 1 << 24
MAX_LINES = 2_000_000
MEMORY = 1 << 30
CPU_SECONDS = 3


def main():
    """Answers requests until there are no more."""
    sys.path[:] = json.loads(sys.argv[1])
    confine()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := requests.read(4)) == 4:
        request = json.loads(requests.read(struct.unpack("!I", head)[0]))
        allow_cpu_time()
        try:
            answer = respond(request)
        except MemoryError:
            answer = {"error": "limit", "message": f"it takes more than {MEMORY >> 20} MiB of memory"}
        data = json.dumps(answer).encode()
        answers.write(struct.pack("!I", len(data)) + data)
        answers.flush()


def respond(request):
    """`{"text": ...}`, or `{"error": kind, "message": ...}`: `syntax` (with a `line`), `limit`, `refused`, `fails`."""
    import jinja2

    try:
        template = compiled(request["source"])
    except (jinja2.TemplateError, SyntaxError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return {"error": "syntax", "message": str(error), "line": getattr(error, "lineno", None)}
    if request["variables"] is None:
        return {"text": ""}
    date = datetime.datetime.fromisoformat(request["date"])
    variables = {**request["variables"], "strftime_now": date.strftime, "raise_exception": refuse}
    try:
        with LineBudget():
            pieces, size = [], 0
            for piece in template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise Limit(f"it wrote more than {MAX_OUTPUT} characters")
        return {"text": "".join(pieces)}
    except Limit as error:
        return {"error": "limit", "message": str(error)}
    except (Refused, RecursionError) as error:
        return {"error": "refused", "message": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # whatever Python's own functions raise on what a template hands them
        return {"error": "fails", "message": str(error) or type(error).__name__}


def confine():
    """Takes from this process what rendering does not need: memory beyond a bound, files, other processes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, limit in (("AS", MEMORY), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0)):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS has the name of the first, and not the limit
            continue


def allow_cpu_time():
    """The system ends this process after so many more seconds of work, also inside one long operation."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))


class Refused(Exception):
    """What `raise_exception` raises."""


class Limit(Exception):
    """A template that takes too long or writes too much."""


def refuse(message):
    raise Refused(message)


@functools.lru_cache(maxsize=32)
def compiled(source):
    return environment().from_string(source)


@functools.cache
def environment():
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}` puts a mark before and after what it holds."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            marks = jinja2.nodes.ContextReference()
            call = self.call_method("_around", [marks])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _around(self, context, caller):
            before, after = context["_generation_marks"]
            return before + caller() + after

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Refuses products and powers that would fill the memory."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            sizes = [len(x) if isinstance(x, (str, list, tuple)) else 0 for x in (left, right)]
            if operator == "**" or (any(sizes) and max(sizes) * max(number(left), number(right)) > MAX_OUTPUT):
                raise jinja2.TemplateRuntimeError(f"the operation {operator} is refused here")
            return super().call_binop(context, operator, left, right)

    found = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    found.filters["tojson"] = tojson
    return found


def number(x):
    return x if isinstance(x, (int, float)) else 0


class LineBudget:
    """Counts the lines that compiled templates execute, and stops them when there are too many."""

    def __enter__(self):
        self._left = MAX_LINES
        sys.settrace(self._trace)

    def __exit__(self, *exc):
        sys.settrace(None)

    def _trace(self, frame, event, argument):
        # Jinja compiles templates given as text to code of this name.
        return self._count if frame.f_code.co_filename == "<template>" else None

    def _count(self, frame, event, argument):
        self._left -= 1
        if self._left < 0:
            raise Limit(f"it runs on and on: more than {MAX_LINES} lines executed")
        return self._count


if __name__ == "__main__":
    main()
