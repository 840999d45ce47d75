"""Starts one GPU worker: `python -m workers`. SIGTERM, SIGINT and Flower's shutdown drain it."""

from __future__ import annotations

import logging
import sys

from l4queue.config import load_settings
from l4queue.errors import L4QueueError


def main() -> int:
    """Entry point; the exit code is 1 when the engine failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = load_settings()
    except L4QueueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from workers.app import app
    from workers.build import make_worker, worker_name
    from workers.host import Host

    name = worker_name(settings)
    template = name if "@" in name else f"{name}@%h"
    from celery.utils.nodenames import host_format

    nodename = host_format(template)
    host = Host(settings, app, lambda observer: make_worker(settings, observer), name=nodename)
    host.install()
    arguments = ["worker", "--pool=solo", f"--hostname={nodename}", f"--queues=l4-worker.{name}"]
    try:
        app.worker_main([*arguments, "--loglevel=WARNING", "--without-gossip", "--without-mingle", "-E"])
    except SystemExit as end:
        if end.code and not host.failure:
            return int(end.code) if isinstance(end.code, int) else 1
    return 1 if host.failure else 0


if __name__ == "__main__":
    sys.exit(main())
