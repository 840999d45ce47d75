"""The check of a line's model against what workers publish."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue import Settings
from l4queue.client.batch.served import ModelNotServed, ServedModels
from l4queue.errors import ConfigError
from l4queue.model_config import served_names
from l4queue.models import WorkerLoad

NEW = WorkerLoad(worker_id="new", models=("llama", "alias"))
OLD = WorkerLoad(worker_id="old")


def test_an_unserved_model_is_refused_with_both_names() -> None:
    """By any of the names of the served one, and without any, a line passes."""
    served = ServedModels(any_model=False)
    served.seen([NEW])
    for model in ("llama", "alias", ""):
        served.check(model)
    with pytest.raises(ModelNotServed, match="gpt is not served; llama or alias is") as caught:
        served.check("gpt")
    assert caught.value.field == "model"


@pytest.mark.parametrize(("workers", "any_model"), [([], False), ([NEW, OLD], False), ([NEW], True)])
def test_without_knowledge_every_model_passes(workers: list[WorkerLoad], any_model: bool) -> None:
    """A worker of an earlier release may serve anything."""
    served = ServedModels(any_model=any_model)
    served.check("gpt")
    served.seen(workers)
    served.check("gpt")


def test_an_answer_has_the_model_of_its_worker() -> None:
    """Also of one that has left since; else the one that was asked for."""
    served = ServedModels(any_model=True)
    assert served.is_due()
    served.seen([NEW, OLD])
    assert not served.is_due(["new", "old", None])
    served.seen([])
    assert [served.answered(worker, asked="gpt") for worker in ("new", "old", None)] == ["llama", "gpt", "gpt"]


def test_workers_publish_the_name_that_the_gateway_serves() -> None:
    """The setting, or the names among the options of `vllm serve`; an emulated engine reads none of these."""
    assert served_names(Settings(model="m")) == ("m",)
    named = "--dtype float32 --served-model-name a b --revision r"
    assert served_names(Settings(model="m", vllm_args=named)) == ("a", "b")
    assert served_names(Settings(model="m", vllm_args="--served-model-name=a")) == ("a",)
    assert served_names(Settings(model="m", vllm_args=named, engine="emulated")) == ("m",)
    with pytest.raises(ConfigError, match="L4_VLLM_ARGS"):
        served_names(Settings(model="m", vllm_args="--served-model-name 'a"))
    engines: tuple[Any, ...] = ("vllm", "emulated")
    for engine in engines:
        set_ = Settings(model="m", vllm_args=named, engine=engine, served_model_name="c '/my models/d' c")
        assert served_names(set_) == ("c", "/my models/d")
    with pytest.raises(ConfigError, match="L4_SERVED_MODEL_NAME"):
        served_names(Settings(served_model_name="'a"))
