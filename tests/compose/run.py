"""`make test-compose`: docker-compose.yml in a real daemon, under load, with crashes; non-zero on any failure.

Starts a daemon and makes base images where there are none, and removes all it made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.compose.console import Failed, check, heading, say, until
from tests.compose.daemon import install_tools, open_daemon
from tests.compose.deployment import Deployment
from tests.compose.images import PREFIX, BaseImages, make_base_images
from tests.compose.traffic import Mix, Traffic

PLANNING = {"L4_REPLAN_INTERVAL_S": "3", "L4_PLAN_MIN_LIFE_S": "3"}
EMULATED = Mix(per_s=12.0, prompt_tokens=(16, 6000), max_tokens=(8, 400))
ENGINE_START_S = 900.0
"""vLLM on CPU is up in half a minute on an idle machine, and takes minutes on a busy one."""
VLLM = Mix(per_s=1.5, prompt_tokens=(16, 1500), max_tokens=(8, 96))


def follow_the_workers(traffic: Traffic, number: int, *, timeout_s: float = 180.0) -> None:
    """Leases and plan have so many workers."""
    until(
        lambda: len(traffic.client.overview().workers) == number,
        f"{number} worker(s) hold a lease",
        timeout_s=timeout_s,
    )

    def planned() -> int:
        return sum(stage.num_workers for stage in traffic.client.overview().plan.stages)

    until(lambda: planned() == number, f"the plan counts {number} worker(s)", timeout_s=120)
    plan = traffic.client.overview().plan
    ranges = ", ".join(f"[{s.low_tokens}, {s.high_tokens or '∞'}) × {s.num_workers}" for s in plan.stages)
    say(f"plan {plan.version}: {ranges}")


def check_flower(deployment: Deployment, *, workers: int) -> None:
    """Nothing without the password; with it the workers and their requests."""
    check(deployment.flower("/workers")[0] == 401, "Flower asks for a login")
    check(deployment.flower("/workers", password="wrong")[0] == 401, "and refuses a wrong one")

    def online() -> int:
        status, body = deployment.flower("/workers?json=1&refresh=1", password=deployment.password)
        rows = json.loads(body)["data"] if status == 200 else []
        return sum(row["hostname"].startswith("worker@") and bool(row["status"]) for row in rows)

    until(lambda: online() == workers, f"Flower shows {workers} worker(s) online", timeout_s=60)

    def tasks() -> int:
        status, body = deployment.flower("/api/tasks?limit=200", password=deployment.password)
        if status != 200:
            raise Failed(f"Flower answers /api/tasks with {status}")
        return sum(str(task["name"]).startswith("l4queue.generate/") for task in json.loads(body).values())

    until(lambda: tasks() > 0, "Flower shows requests as tasks", timeout_s=60)


def crash_a_worker(deployment: Deployment, *, workers: int) -> None:
    """Its container comes back by the restart policy, under its name."""
    victim = deployment.crash("worker", "workers")
    say(f"SIGKILL to the worker in container {victim[:12]}")
    until(lambda: deployment.restarts(victim) == 1, "the daemon restarted its container", timeout_s=60)
    deployment.wait_healthy(workers=workers)


def emulated(environment: Mapping[str, str], folder: Path, images: BaseImages) -> None:
    """Workers with the emulated engine: every scene."""
    heading("workers with the emulated engine")
    engine = {"WORKER_TARGET": "services", "L4_ENGINE": "emulated", "L4_MODEL": "tiny"}
    deployment = Deployment(environment, folder / "emulated", images, **engine, **PLANNING)
    try:
        deployment.build()
        deployment.up(workers=1)
        deployment.wait_healthy(workers=1)
        traffic = Traffic(deployment.settings, EMULATED, seed=1)
        traffic.start()
        traffic.wait_accepted(100)
        follow_the_workers(traffic, 1)
        heading("scale 1 → 4 under load")
        deployment.up(workers=4)
        follow_the_workers(traffic, 4)
        deployment.wait_healthy(workers=4)
        traffic.wait_accepted(200)
        check_flower(deployment, workers=4)
        heading("a worker, the dispatcher and Redis crash")
        crash_a_worker(deployment, workers=4)
        deployment.crash("dispatcher", "dispatcher")
        say("SIGKILL to the dispatcher")
        deployment.wait_healthy(workers=4)
        traffic.wait_accepted(50)
        kill_redis(deployment)
        deployment.wait_healthy(workers=4)
        follow_the_workers(traffic, 4)
        deployment.compose("restart", "redis")
        say("compose restart redis")
        deployment.wait_healthy(workers=4)
        follow_the_workers(traffic, 4)
        traffic.wait_accepted(100)
        heading("scale 4 → 2 under load")
        scale_down(deployment, traffic, workers=2)
        traffic.wait_accepted(100)
        heading("the account")
        traffic.finish(timeout_s=300)
        check_client_image(deployment)
    except BaseException:
        keep_logs(deployment)
        raise
    finally:
        deployment.down()


def vllm(environment: Mapping[str, str], folder: Path, images: BaseImages) -> None:
    """Workers with vLLM on CPU: cores of their own, a stand-by, a crash."""
    num_cores = len(os.sched_getaffinity(0))
    heading(f"workers with vLLM on {num_cores} CPUs")
    engine = {"WORKER_TARGET": "worker-cpu", "L4_ENGINE": "vllm", "L4_MODEL": "tiny", "L4_MAX_MODEL_LEN": "4096"}
    deployment = Deployment(environment, folder / "vllm", images, **engine, **PLANNING)
    try:
        deployment.build()
        deployment.up(workers=1)
        deployment.wait_healthy(workers=1, timeout_s=ENGINE_START_S)
        traffic = Traffic(deployment.settings, VLLM, seed=2)
        traffic.start()
        traffic.wait_accepted(20)
        heading("scale 1 → 2, then 3 on two cores' worth of work")
        deployment.up(workers=2)
        follow_the_workers(traffic, 2, timeout_s=ENGINE_START_S)
        cores = re.findall(r"took CPU ([\d,]+)", deployment.logs("worker"))
        check(len(cores) == 2 and len(set(cores)) == 2, f"the workers took different cores: {sorted(cores)}")
        check_flower(deployment, workers=2)
        if num_cores == 2:
            deployment.up(workers=3)
            until(
                lambda: "waiting for 1 core(s)" in deployment.logs("worker"), "the third stands by", timeout_s=120
            )
        victim = deployment.containers("worker")[0]["Id"]
        deployment.docker("kill", victim)
        say(f"docker kill {victim[:12]}, which stays down")
        name = f"worker@{victim[:12]}"
        until(
            lambda: all(load.worker_id != name for load in traffic.client.overview().workers),
            "its lease has run out",
            timeout_s=60,
        )
        follow_the_workers(traffic, 2 if num_cores == 2 else 1, timeout_s=ENGINE_START_S)
        traffic.wait_accepted(20)
        heading("the account")
        traffic.finish(timeout_s=400)
    except BaseException:
        keep_logs(deployment)
        raise
    finally:
        deployment.down()


def kill_redis(deployment: Deployment) -> None:
    """SIGKILL to redis-server itself; the container's main process is it."""
    one = deployment.containers("redis")[0]
    if os.getuid() == 0 and Path(f"/proc/{one['State']['Pid']}").exists():
        os.kill(int(one["State"]["Pid"]), 9)
        say("SIGKILL to redis-server")
        until(lambda: deployment.restarts(one["Id"]) == 1, "the daemon restarted it", timeout_s=60)
    else:
        deployment.docker("kill", one["Id"])
        deployment.compose("up", "--detach", "--no-build", "--no-recreate", "redis")
        say("docker kill of Redis, and up again")


def scale_down(deployment: Deployment, traffic: Traffic, *, workers: int) -> None:
    """The workers that go drain: they give their requests back and end with code 0."""
    since_s = time.time()
    deployment.up(workers=workers)
    codes = deployment.exit_codes("worker", since_s=since_s)
    check(codes == [0, 0], f"two workers drained and ended with code 0: {codes}")
    follow_the_workers(traffic, workers)


def check_client_image(deployment: Deployment) -> None:
    """The small image reads the deployment from its network."""
    args = [f"{key}={value}" for key, value in deployment.base_args.items()]
    name = f"{PREFIX}-client:latest"
    build = [part for arg in args for part in ("--build-arg", arg)]
    deployment.docker("build", "--target", "client", "-t", name, *build, str(Path.cwd()))
    url = f"redis://:{deployment.redis_password}@redis:6379/0"
    network = f"{deployment.project}_default"
    shown = deployment.docker(
        "run", "--rm", "--network", network, "-e", f"L4_REDIS_URL={url}", name, "stats", "--json"
    )
    check("workers" in json.loads(shown), "the client image shows the deployment: l4queue stats --json")


def keep_logs(deployment: Deployment) -> None:
    """For whoever looks after a failure."""
    file = deployment.folder / "containers.log"
    try:
        file.write_text(deployment.compose("logs", "--no-color"), "utf-8")
        say(f"logs of the containers: {file}")
        for line in file.read_text("utf-8").splitlines():
            if re.search(r"error|Traceback|CRITICAL", line, re.IGNORECASE):
                print("    " + line[:200])
    except Failed as error:
        say(f"no logs: {error}")


def remove_images(environment: Mapping[str, str]) -> None:
    """All that begin with our prefix."""
    from tests.compose.console import execute

    names = execute("docker", "images", "--format", "{{.Repository}}:{{.Tag}}", environment=environment).split()
    ours = [name for name in names if name.startswith(PREFIX)]
    if ours:
        execute("docker", "rmi", "--force", *ours, environment=environment, allowed=(0, 1))
    say(f"removed {len(ours)} images")


def main() -> int:
    """All chapters, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapters", nargs="*", help="emulated, vllm; default both")
    parser.add_argument("--base-image", help="a Debian with Python 3.11 to 3.13; default: made with debootstrap")
    parser.add_argument("--keep", action="store_true", help="keep images and the daemon's data for the next run")
    parser.add_argument("--folder", type=Path, default=Path("build/compose"), help="logs, and the daemon's data")
    options = parser.parse_args()
    chapters = options.chapters or ["emulated", "vllm"]
    folder = options.folder.absolute()
    try:
        install_tools()
        with open_daemon(folder / "daemon") as environment:
            try:
                heading("images")
                images = make_base_images(environment, folder / "images", base=options.base_image)
                for name in chapters:
                    {"emulated": emulated, "vllm": vllm}[name](environment, folder, images)
            finally:
                if not options.keep:
                    remove_images(environment)
        if not options.keep:
            shutil.rmtree(folder / "daemon", ignore_errors=True)
    except Failed as error:
        say(f"FAILED {error}")
        return 1
    say(f"all checks hold: {', '.join(chapters)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
