"""`make test-newcomer`: README.md on a fresh machine, its commands one by one as they are written there.

The machine is a container of a Debian made by debootstrap, with a user who may sudo. Nothing is known here but
README.md: its console lines, its Python example and its tables are read out of it, in their order. A command that
the walk cannot place, and one that it expects and README.md no longer has, both fail.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.compose.console import Failed, check, execute, heading, say, until
from tests.compose.daemon import install_tools, open_daemon
from tests.compose.deployment import ROOT
from tests.compose.images import PREFIX, make_base_images

NAME = f"{PREFIX}-newcomer"
HOME = "/home/newcomer"
PLACE = f"{HOME}/l4queue"
_MACHINE = """ARG BASE
FROM ${BASE}
RUN apt-get update -qq \\
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends sudo procps \\
    && useradd --create-home --shell /bin/bash newcomer \\
    && echo 'newcomer ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/newcomer
USER newcomer
WORKDIR /home/newcomer
"""
ELSEWHERE = {
    "make test": "the test suite itself, which takes much longer than all of this",
    "cp .env.example .env": "make test-compose",
    "docker compose up --build --detach": "make test-compose",
    "docker compose up --detach --scale worker=4": "make test-compose",
}
"""What README.md offers and this walk leaves to others."""
WALKED = {
    *("up", "demo", "enqueue", "result", "status", "cancel", "explain"),
    *("stats", "health", "dead", "simulate", "plan", "bench", "doctor"),
}
BATCH = [
    {
        "custom_id": f"line-{n}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": f"Line {n}", "max_tokens": 8},
    }
    for n in range(5)
]


class Readme:
    """README.md as its reader has it."""

    def __init__(self, text: str) -> None:
        self.console = [
            line.removeprefix("$ ").split("#")[0].strip()
            for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
            for line in block.splitlines()
            if line.startswith("$ ")
        ]
        (self.python,) = re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
        (self.output,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
        cells = [re.findall(r"`([^`]+)`", cell) for cell in re.findall(r"^\|(.+?)\|", text, re.MULTILINE)]
        named = [words for words in cells if words and words[0].startswith("l4queue ")]
        self.commands = {word.removeprefix("l4queue ").split()[0] for words in named for word in words}
        (self.packages,) = re.findall(r"`(sudo apt-get install [^`]+)`", text)
        (self.columns,) = re.findall(r"columns `([a-z_,]+)`", text)
        (self.worker,) = re.findall(r"`(L4_WORKER_ID=[^` ]+)`", text)
        self.installs = re.findall(r"`(pip install \.)`", text)


class Machine:
    """A container, and the one shell session that is had on it: what changes the shell holds for what follows."""

    def __init__(self, environment: Mapping[str, str], image: str) -> None:
        self.environment = environment
        self._session: list[str] = []
        self._docker("rm", "--force", NAME, allowed=(0, 1))
        self._docker("run", "--detach", "--init", "--name", NAME, "--shm-size", "1g", image, "sleep", "infinity")

    def type(self, command: str, *, timeout_s: float = 600.0, stdin: str | None = None) -> str:
        """One line at the prompt, in the checkout; what it writes to stdout."""
        started_s = time.monotonic()
        script = "\n".join((f"cd {PLACE}", *self._session, command))
        if re.match(r"(\.|source|export) ", command):
            self._session.append(command)
        done = subprocess.run(
            ["docker", "exec", "--interactive", NAME, "bash", "-c", script],
            env=dict(self.environment), input=stdin, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
            raise Failed(f"$ {command}\nended with {done.returncode}:\n{tail}")
        say(f"$ {command}   ({time.monotonic() - started_s:.1f} s)")
        return done.stdout

    def begin(self, command: str, log: str) -> None:
        """The same in a second terminal; its output goes to a file."""
        script = "\n".join((f"cd {PLACE}", *self._session, f"exec {command} >{log} 2>&1"))
        self._docker("exec", "--detach", NAME, "bash", "-c", script)
        say(f"$ {command}   (in another terminal)")

    def read(self, path: str) -> str:
        """What a file has so far."""
        return self._docker("exec", NAME, "bash", "-c", f"cat {path} 2>/dev/null || true")

    def write(self, path: str, text: str) -> None:
        """A file in the checkout."""
        self.type(f"cat >{path}", stdin=text)

    def check_out(self) -> None:
        """What git has or would take, as it is here now."""
        listed = execute("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split(
            "\0"
        )
        files = [name for name in listed if name and (ROOT / name).is_file()]
        self._docker("exec", NAME, "mkdir", "-p", PLACE)
        with subprocess.Popen(["tar", "-C", ROOT, "-c", "--", *files], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                ["docker", "exec", "--interactive", NAME, "tar", "-C", PLACE, "-x"],
                env=dict(self.environment), stdin=tar.stdout, check=True,
            )  # fmt: skip
        say(f"checked out {len(files)} files")

    def remove(self) -> None:
        """The container and all in it."""
        self._docker("rm", "--force", NAME, allowed=(0, 1))

    def _docker(self, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        return execute("docker", *arguments, environment=self.environment, allowed=allowed)


def demo(machine: Machine, command: str) -> None:
    """From a bare checkout to a table."""
    shown = machine.type(command, timeout_s=1500)
    print("    " + "\n    ".join(shown.strip().splitlines()[-30:]))
    rows = re.findall(r"^\W*(short|medium|long|all)\W+(\d+) ", shown, re.MULTILINE)
    found = {name: int(number) for name, number in rows}
    check("all" in found and found["all"] > 0, f"a table of what was measured: {found}")
    check(sum(n for name, n in found.items() if name != "all") == found["all"], "its classes add up")


def python_example(machine: Machine, readme: Readme) -> None:
    """The example prints what README.md says that it prints, but for the noise."""
    shown = machine.type("python -", stdin=readme.python).strip().splitlines()
    print("    " + "\n    ".join(shown))

    def shape(lines: list[str]) -> tuple[list[str], list[str]]:
        """Chunks may be cut elsewhere, hence only the last offset; ids and times differ."""
        chunks = [line.split(" ")[0] for line in lines if re.match(r"\d+ ['\"]", line)]
        rest = [re.sub(r"^[0-9a-f]{32} ", "ID ", re.sub(r"[\d.]+ s$", "TIME", line)) for line in lines]
        return chunks[-1:], [line for line in rest if not re.match(r"\d+ ['\"]", line)]

    check(shape(shown) == shape(readme.output.strip().splitlines()), "it prints what README.md shows")


def commands(machine: Machine, readme: Readme) -> None:
    """Every command of the tables, in ways that a newcomer would try."""
    request_id = machine.type("l4queue enqueue 'The return statement' --max-tokens 12").strip()
    check(re.fullmatch(r"[0-9a-f]{32}", request_id) is not None, f"enqueue prints an id: {request_id}")
    check(len(machine.type(f"l4queue result {request_id} --timeout 60").strip()) > 0, "result prints the text")
    status = json.loads(machine.type(f"l4queue status {request_id} --json"))
    check(status["state"] == "done", "status says done")
    check("done: 12 tokens" in machine.type(f"l4queue explain {request_id}"), "explain tells its life")
    asked = json.loads(machine.type("l4queue enqueue 'The return' --max-tokens 3 --logprobs 2 --wait --json"))
    check([len(row["top"]) for row in asked["logprobs"]] == [2] * asked["output_tokens"], "logprobs are served")
    waiting = machine.type("l4queue enqueue x --max-tokens 4000").strip()
    check(json.loads(machine.type(f"l4queue cancel {waiting} --json"))["state"] == "cancelled", "cancel ends one")
    machine.write("in.jsonl", "".join(json.dumps(line) + "\n" for line in BATCH))
    machine.type("l4queue enqueue --jsonl in.jsonl --out out.jsonl")
    ids = {json.loads(line)["custom_id"] for line in machine.type("cat out.jsonl").splitlines()}
    check(ids == {line["custom_id"] for line in BATCH}, "the batch has an answer for each line")
    stats = json.loads(machine.type("l4queue stats --json"))
    check(len(stats["workers"]) == 2, "stats shows two workers, as promised of `up`")
    check(machine.type("l4queue stats").count("worker") >= 2, "and for people")
    for role in ("dispatcher", "planner", "beat", "flower"):
        machine.type(f"l4queue health {role}")
    machine.type(f"{readme.worker} l4queue health worker")
    machine.type("l4queue dead")
    machine.type("l4queue doctor")
    simulator(machine, "l4queue", readme)
    machine.type("l4queue bench serve --help")
    unknown = sorted(readme.commands ^ WALKED)
    check(not unknown, f"these are all the commands of README.md's table {unknown}")


def simulator(machine: Machine, name: str, readme: Readme) -> None:
    """The two questions about a trace; `name` is l4queue, or the way to it."""
    rows = io.StringIO()
    write = csv.writer(rows)
    columns = readme.columns.split(",")
    write.writerow(columns)
    for number in range(2000):
        kind = number % 3
        row = {
            "arrival_s": round(number / 20, 3),
            "input_tokens": (120, 300, 9000)[kind],
            "output_tokens": (60, 200, 400)[kind],
        }
        write.writerow([row[name] for name in columns])
    machine.write("requests.csv", rows.getvalue())
    for command in readme.console:
        if "requests.csv" in command:
            shown = machine.type(command.replace("l4queue", name, 1))
            print("    " + "\n    ".join(shown.strip().splitlines()[:12]))
            if "simulate" in command:
                check("central-sjf" in shown and "l4" in shown, "both policies are compared")


def walk(machine: Machine, readme: Readme) -> None:
    """From top to bottom."""
    heading("a fresh machine")
    machine.check_out()
    machine.type(f"{readme.packages.replace('install', 'install -qq -y', 1)}")
    heading("the console lines of README.md")
    done: set[str] = set()
    for command in readme.console:
        if command in ELSEWHERE:
            say(f"left out: {command} ({ELSEWHERE[command]})")
        elif command.startswith("make demo"):
            demo(machine, command)
        elif command.startswith(("l4queue up", "make up")):
            machine.begin(command, "up.log")
            until(lambda: "ready: Redis at" in machine.read(f"{PLACE}/up.log"), "up is ready", timeout_s=900)
            python_example(machine, readme)
            commands(machine, readme)
        elif re.match(r"\. |source |make install", command):
            machine.type(command, timeout_s=1200)
        elif "requests.csv" not in command:
            raise Failed(f"README.md has a command that the walk does not know: {command}")
        done.add(command)
    check({c.split()[0] for c in done} >= {"make", "l4queue"}, "it has the commands that the walk is about")
    heading("up ends")
    machine.type("pkill -INT -f 'bin/l4queue up'")
    until(lambda: "l4queue up" not in machine.type("ps -eo args"), "Ctrl-C ends it", timeout_s=60)
    heading("clients and the simulator alone")
    check(readme.installs == ["pip install ."], "README.md says how")
    machine.type("python3 -m venv /tmp/alone && . /tmp/alone/bin/activate && " + readme.installs[0], timeout_s=300)
    simulator(machine, "/tmp/alone/bin/l4queue", readme)


def main() -> int:
    """The walk; non-zero when a line of README.md does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep container, images and the daemon's data")
    parser.add_argument("--folder", type=Path, default=Path("build/compose"), help="the daemon's data")
    options = parser.parse_args()
    folder = options.folder.absolute()
    readme = Readme((ROOT / "README.md").read_text("utf-8"))
    try:
        install_tools()
        with open_daemon(folder / "daemon") as environment:
            images = make_base_images(environment, folder / "images", base=None)
            context = folder / "newcomer"
            context.mkdir(parents=True, exist_ok=True)
            (context / "Dockerfile").write_text(_MACHINE, "utf-8")
            build = ("docker", "build", "--build-arg", f"BASE={images.build}", "-t", f"{NAME}:latest", context)
            execute(*build, environment=environment)
            machine = Machine(environment, f"{NAME}:latest")
            try:
                walk(machine, readme)
            except Failed:
                print(machine.read(f"{PLACE}/up.log")[-3000:])
                raise
            finally:
                if not options.keep:
                    machine.remove()
        if not options.keep:
            shutil.rmtree(folder / "daemon", ignore_errors=True)
    except Failed as error:
        say(f"FAILED {error}")
        return 1
    say("README.md holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
