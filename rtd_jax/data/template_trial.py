"""Renders a chat template in a process of its own, within limits of time and memory: `chat.check_template` starts it.

Run as a file, so that it imports nothing but Jinja and is over in a fraction of a second. Its standard input is JSON:
the template, conversations and variables. The environment is that of `transformers`, as far as templates can see it.
"""

import datetime
import json
import resource
import sys
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

CPU_SECONDS = 4  # templates take milliseconds
MEMORY = 2**29  # bytes of address space
MAX_CHARACTERS = 1_000_000  # of the result, beside ten times what is in the conversation
OUT_OF_MEMORY, TOO_LONG = 3, 4  # exit statuses; too slow a process is killed by a signal


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark an assistant's words: here only what is in it."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def main() -> int:
    """0 if the template ends, with a text or with an error of its own, which the real rendering will have too."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(asked["template"])
    except MemoryError:
        return OUT_OF_MEMORY
    except Exception:
        return 0
    for messages in asked["conversations"]:
        allowed = MAX_CHARACTERS + 10 * sum(len(message["content"]) for message in messages)
        for is_prompt in (True, False):
            variables = {"tools": None, "documents": None, **asked["variables"]}
            try:
                pieces = template.generate(messages=messages, add_generation_prompt=is_prompt, **variables)
                for piece in pieces:
                    allowed -= len(piece)
                    if allowed < 0:
                        return TOO_LONG
            except MemoryError:
                return OUT_OF_MEMORY
            except Exception:
                continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
