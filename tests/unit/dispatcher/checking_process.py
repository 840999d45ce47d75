"""A checking process without vLLM: what it does with a constraint is written in its first choice."""

from __future__ import annotations

import os
import sys
from typing import Any

from dispatcher.constraints.process import serve


def check(given: dict[str, Any]) -> str:
    """As native code may behave: accept, refuse, take long, crash, take all memory."""
    match given["choice"][0]:
        case "bad":
            return "is bad"
        case "endless":
            while True:
                pass
        case "crash":
            os.abort()
        case "huge":
            bytearray(1 << 40)
        case "raise":
            raise RuntimeError("what a library never does")
        case text if text.startswith("until:"):
            while not os.path.exists(text.removeprefix("until:")):
                os.sched_yield()
        case text if text.startswith("count:"):
            with open(text.removeprefix("count:"), "a", encoding="utf-8") as file:
                file.write("x")
    return ""


if __name__ == "__main__":
    if os.path.exists(sys.argv[1]):  # told to end at its start, as long as that file is there
        sys.exit(3)
    serve(check, 0, os.fdopen(os.dup(1), "wb"))
