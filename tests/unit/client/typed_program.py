"""A program of a user, for mypy --strict: each way to call the client. It is not run."""

from __future__ import annotations

from array import array

import numpy as np

from l4queue import (
    AsyncClient,
    BatchSummary,
    Client,
    Handle,
    QueueFull,
    RequestFields,
    RequestSpec,
    RequestState,
    RequestStatus,
    Result,
    SamplingParams,
)


def serve(client: Client) -> str:
    handle: Handle = client.enqueue("hi", max_tokens=3, stop="END", temperature=0, deadline_s=2.5)
    client.enqueue("hi", SamplingParams(max_tokens=3), seed=2)
    client.enqueue("hi", {"max_tokens": 3})
    chat = [{"role": "user", "content": "hi"}]
    client.enqueue(messages=chat, max_tokens=np.int64(3), structured_outputs={"choice": ["yes", "no"]})
    client.enqueue(token_ids=np.array([1, 2, 3]), temperature=np.float32(0.5), stop_token_ids=(1, 2))
    client.enqueue(token_ids=array("I", [1]))
    client.enqueue(token_ids=range(3), metadata={"a": [1, {"b": None}]})
    client.enqueue(RequestSpec(prompt="hi", params=SamplingParams(max_tokens=3)))
    many: list[RequestFields] = [{"prompt": "a", "max_tokens": 2}, {"messages": chat}]
    handles = client.enqueue_many(["a", "b"], max_tokens=3, block=False)
    handles += client.enqueue_many(many)
    client.enqueue_many([{"prompt": "a", "max_tokens": 2}])
    status: RequestStatus = handle.status()
    if status.state is RequestState.DONE and status.finished_at_s is not None:
        print(status.e2e_s, client.ping())
    summary: BatchSummary = client.run_batch("in", "out", max_in_flight=3)
    print(summary.num_lines)
    try:
        result: Result = handle.result(timeout=3)
    except QueueFull as full:
        return str(full.retry_after_s)
    return result.text


async def main() -> None:
    async with AsyncClient(timeout_s=1) as client:
        handle = await client.enqueue(messages=[{"role": "user", "content": "hi"}], top_k=5)
        async for chunk in handle.stream():
            print(chunk.text)
        print((await handle.status()).output_tokens)
        await client.enqueue_many(["a"], priority=3)
