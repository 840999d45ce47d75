"""What a Redis URL may say, and what is said of one that is wrong."""

from __future__ import annotations

import pytest

from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.protocol.connect import parse_url
from l4queue.protocol.door import AsyncDoor, Door
from l4queue.protocol.wire import redacted


def test_a_plain_url_is_left_to_the_library() -> None:
    """Database, credentials and options pass through; only `replicas` is ours."""
    found = parse_url("rediss://me:secret@host:6380/3?ssl_cert_reqs=none&replicas=2")

    assert (found.plain_url, found.replicas) == ("rediss://me:secret@host:6380/3?ssl_cert_reqs=none", 2)
    assert (found.way, found.places, found.is_tls) == ("", (), True)
    assert parse_url("unix:///run/redis.sock?db=1").plain_url == "unix:///run/redis.sock?db=1"


def test_sentinels_are_several_and_name_a_service() -> None:
    """Ports have defaults, IPv6 stands in brackets, the database follows the service."""
    found = parse_url("redis+sentinel://:secret@s1,s2:26380,[::1]:26381/queue/2?sentinel_password=other")

    assert found.places == (("s1", 26379), ("s2", 26380), ("::1", 26381))
    assert (found.way, found.service, found.sentinel_login) == ("sentinel", "queue", {"password": "other"})
    assert found.plain_url.startswith("redis://:secret@")
    assert found.plain_url.endswith("/2")


def test_a_cluster_is_named_by_some_of_its_nodes() -> None:
    """Without a database, or with the only one there is."""
    for tail in ("", "/", "/0"):
        found = parse_url(f"redis+cluster://n1:7000,n2{tail}")
        assert (found.way, found.places) == ("cluster", (("n1", 7000), ("n2", 6379)))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://host", "http is no scheme"),
        ("unix+sentinel:///path", r"unix\+sentinel is no scheme"),
        ("redis+sentinel://s1:26379", "lacks the name of the service"),
        ("redis+sentinel://s1:x/queue", "'s1:x' is not host:port"),
        ("redis+cluster://n1,,n2", "'' is not host:port"),
        ("redis+cluster://n1/1", "database 0 only"),
        ("redis://host?replicas=all", "replicas=all is no number"),
        ("redis://host?replicas=" + "9" * 5000, "is no number"),
        ("redis://host?replicas=\u00b2", "is no number"),
        ("redis://:secret@[host", "cannot be read"),
        ("redis://:secret@\ud800", "cannot be read"),
        ("redis://:secret@host\u2100", "cannot be read"),
        ("redis+sentinel://s1:99999/queue", "is not host:port"),
        ("redis+cluster://n1:\u00b2", "is not host:port"),
    ],
)
def test_a_wrong_url_is_told(url: str, says: str) -> None:
    """ConfigError names the variable and what is wrong."""
    with pytest.raises(ConfigError, match=f"L4_REDIS_URL: .*{says}") as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["redis://host:port", "redis://host:99999", "redis://host?db=x", "redis://host?socket_timeout=soon"]
)
def test_what_the_library_cannot_read_is_told_as_well(url: str) -> None:
    """When the first connection is prepared, not when it is needed."""
    with pytest.raises(ConfigError, match="L4_REDIS_URL"):
        Door(url)
    with pytest.raises(ConfigError, match="L4_REDIS_URL"):
        AsyncDoor(url)


@pytest.mark.parametrize("url", ["redis://[host", "redis://host/\u00b2", "redis://host/" + "9" * 5000])
def test_the_broker_of_an_odd_url_is_a_url_or_an_error_of_its_setting(url: str) -> None:
    """Whatever stands for the database."""
    try:
        broker = Settings(redis_url=url[:4096]).broker_url
    except ConfigError as error:
        broker = str(error)
    assert broker.startswith(("redis://host/1", "L4_REDIS_URL"))


def test_passwords_are_not_shown() -> None:
    """Of no kind of URL."""
    assert redacted("redis://:secret@127.0.0.1:1/0") == "redis://***@127.0.0.1:1/0"
    many = redacted("redis+sentinel://u:secret@s1:1,s2:2/queue?sentinel_password=secret&replicas=1")
    assert many == "redis+sentinel://***@s1:1,s2:2/queue?sentinel_password=***&replicas=1"
    assert redacted("redis+cluster://n1,n2") == "redis+cluster://n1,n2"


def test_celery_wants_a_redis_of_its_own() -> None:
    """The database after the queue's is no answer where there is a cluster or Sentinel."""
    url = "redis+sentinel://s1/queue"

    with pytest.raises(ConfigError, match="L4_CELERY_BROKER_URL"):
        _ = Settings(redis_url=url).broker_url
    own = Settings(redis_url=url, celery_broker_url="redis://broker:6379/0")
    assert own.broker_url == "redis://broker:6379/0"
    plain = Settings(redis_url="rediss://host/0?replicas=1&ssl_cert_reqs=none")
    assert plain.broker_url == "rediss://host/1?ssl_cert_reqs=none"
