"""vLLM's own server with the tuning that l4queue's workers have on CPUs: python bench/routers/serve.py OPTIONS."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    import torch  # noqa: F401  # before the threads are bound: those of this process are not to be

    from workers.engine.vllm.environment import bind_threads, prepare_environment

    cores = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    prepare_environment(kv_cache_gib=1, cores=cores, model=sys.argv[sys.argv.index("--model") + 1])
    os.environ["PYTHONPATH"] = sys.path[0]
    more = ["--worker-cls", "workers.engine.vllm.cpu.SeededCpuWorker"]
    if bind_threads():
        more += ["--distributed-executor-backend", "uni"]
    sys.argv = ["vllm", *sys.argv[1:], *more]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
