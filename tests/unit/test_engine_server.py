"""Addresses of servers that are already running, and the model that is meant at them."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4queue.cli.stack.engine_servers import adopted_model, check_models, known_servers
from l4queue.config import Settings
from l4queue.engine_server import EngineServer, ModelCard, engine_headers, engine_urls, model_names
from l4queue.errors import ConfigError
from l4queue.model_config import with_model_facts
from tests.services.small_server import small_server
from workers.build import make_worker
from workers.telemetry.observer import NullObserver


def server(*cards: tuple[str, str], parent: bool = False) -> EngineServer:
    """One that serves these names, each with the place that the model is from."""
    found = tuple(ModelCard(name=name, root=root, max_model_len=8, is_adapter=parent) for name, root in cards)
    return EngineServer(url="http://gpu:8000", version="0.32.0", cards=found)


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("http://gpu:8000", ("http://gpu:8000",)),
        ("http://gpu:8000/v1/", ("http://gpu:8000",)),
        (" https://a/llm/v1 , http://[::1]:1/ ", ("https://a/llm", "http://[::1]:1")),
    ],
)
def test_urls_are_read_with_or_without_the_path_of_the_api(text: str, urls: tuple[str, ...]) -> None:
    assert engine_urls(Settings(engine_url=text)) == urls


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "name the server"),
        ("gpu:8000", "is no URL"),
        ("http://", "is no URL"),
        ("http://gpu:80000", "is no URL"),
        ("ftp://gpu", "is no URL"),
        ("http://gpu/?key=1", "is no URL"),
        ("http://user:secret@gpu", "put the API key into L4_ENGINE_KEY"),
        ("http://gpu:1 http://gpu:1/v1", "names a server twice"),
    ],
)
def test_what_is_no_url_is_told_and_no_secret_with_it(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^L4_ENGINE_URL: .*{says}|^L4_ENGINE_URL: {says}") as told:
        engine_urls(Settings(engine_url=text))
    assert "secret" not in str(told.value)


def test_a_model_is_known_by_its_name_or_its_place() -> None:
    """What is said for the server alone counts alone."""
    settings = Settings(model="/models/llama", served_model_name="llama 'the llama'")
    assert model_names(settings, "/cache/x") == ("/models/llama", "/cache/x", "llama", "the llama")
    assert server(("chat", "/models/llama")).card(model_names(settings)).name == "chat"
    assert server(("the llama", "/elsewhere")).card(model_names(settings)).name == "the llama"
    meant = Settings(model="/models/llama", engine_model="chat")
    assert server(("chat", "/srv/x")).card(model_names(meant)).root == "/srv/x"
    with pytest.raises(ConfigError, match=r"serves qwen \(of /models/qwen\), not /models/llama"):
        server(("qwen", "/models/qwen")).card(model_names(settings))
    with pytest.raises(ConfigError, match="adapter"):
        server(("chat", "/srv/x"), parent=True).card(model_names(meant))


def test_a_key_is_a_header_and_nothing_else() -> None:
    assert engine_headers(Settings()) == {}
    settings = Settings(engine_key="s3cret")  # type: ignore[arg-type] # as the environment gives it
    assert engine_headers(settings) == {"Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(settings)


async def test_up_takes_the_model_of_the_servers_and_says_which_is_silent() -> None:
    """One worker for each; a server that is not there yet is waited for by its worker."""
    async with small_server() as gone:
        pass
    notes: list[str] = []
    async with small_server() as there:
        settings = Settings(engine="http", engine_url=f"{gone.url} {there.url}", tokenizer="/models/tokenizer")
        servers = await known_servers(settings, num_workers=None, note=notes.append)
        assert list(servers) == [gone.url, there.url]
        assert servers[gone.url] is None
        (note,) = notes
        assert gone.url in note
        assert "its worker waits for it" in note
        assert adopted_model(servers, settings) == "/models/m"
        assert check_models(servers, Settings(model="m"), "") == ("m",)
        with pytest.raises(ConfigError, match="serves m"):
            check_models(servers, Settings(model="x"), "")
        with pytest.raises(ConfigError, match="2 servers have 2 workers"):
            await known_servers(settings, num_workers=3, note=notes.append)
        with pytest.raises(ConfigError, match=r"is not here: set --model to a copy .* L4_ENGINE_MODEL to m"):
            adopted_model(servers, Settings(engine="http"))
    with pytest.raises(ConfigError, match="no engine answers"):
        adopted_model({gone.url: None}, settings)
    assert await known_servers(Settings(engine="emulated"), num_workers=1, note=notes.append) == {}


def test_a_worker_drives_one_server(tmp_path: Path) -> None:
    settings = Settings(engine="http", engine_url="http://a http://b", model="tiny")
    with pytest.raises(ConfigError, match="names 2 servers"):
        make_worker(settings, NullObserver())


def test_a_tokenizer_is_enough_where_the_model_is_elsewhere() -> None:
    """Without one the model's configuration is looked for here, as with an engine in process."""
    settings = Settings(engine="http", model="/nowhere/llama")
    assert with_model_facts(settings.model_copy(update={"tokenizer": "/models/t"})).max_model_len == 16_384
    with pytest.raises(ConfigError, match="/nowhere/llama"):
        with_model_facts(settings)
