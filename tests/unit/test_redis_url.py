"""URLs of Redis: what they say, how a wrong one is told, that no password is ever shown."""

from __future__ import annotations

import json
import logging
import os
import pickle
import ssl
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.celery_config import celery_settings
from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError
from l4queue.protocol.executor import Executor
from l4queue.redis_url import SecretUrl, celery_url, parse_url, redacted, with_password

SECRETS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
HOSTS = st.sampled_from(["127.0.0.1", "redis.example", "[::1]", "[fe80::1%25eth0]", "localhost"])


def test_one_server_is_named_by_host_user_and_database() -> None:
    """With TLS, options of ours and of redis-py."""
    found = parse_url("rediss://me:secret@host:6380/3?ssl_cert_reqs=none&replicas=2")

    assert (found.way, found.replicas, found.is_tls) == ("", 2, True)
    assert (found.username, found.password) == ("me", "secret")
    assert (found.host, found.port, found.database) == ("host", 6380, 3)
    assert found.options == {"ssl_cert_reqs": ssl.CERT_NONE}
    socket = parse_url("unix://me:secret@/run/my%20redis.sock?db=1")
    assert (socket.path, socket.database, socket.username) == ("/run/my redis.sock", 1, "me")
    assert parse_url("redis://").host == "localhost"
    assert (parse_url("redis://:7000").host, parse_url("redis://:7000").port) == ("localhost", 7000)
    assert parse_url("redis://h?db=2&username=me&password=a%40b").password == "a@b"
    assert parse_url("redis://h/?socket_timeout=1.5&client_name=x").options == {
        "socket_timeout": 1.5,
        "client_name": "x",
    }


def test_sentinels_are_named_with_the_service_and_their_own_login() -> None:
    """Host and port by default Sentinel's; the servers' login stays in front."""
    found = parse_url("redis+sentinel://:secret@s1,s2:26380,[::1]:26381/queue/2?sentinel_password=other")

    assert found.places == (("s1", 26379), ("s2", 26380), ("::1", 26381))
    assert (found.way, found.service, found.sentinel_login) == ("sentinel", "queue", {"password": "other"})
    assert (found.password, found.database) == ("secret", 2)


def test_a_cluster_is_named_by_some_of_its_nodes() -> None:
    """Without a database, or with the only one there is."""
    for tail in ("", "/", "/0"):
        found = parse_url(f"redis+cluster://n1:7000,n2{tail}")
        assert (found.way, found.places) == ("cluster", (("n1", 7000), ("n2", 6379)))


@settings(deadline=None)
@given(SECRETS, SECRETS, HOSTS, st.integers(0, 15), st.booleans())
def test_every_password_is_read_as_it_was_encoded(
    username: str, password: str, host: str, database: int, tls: bool
) -> None:
    """By the queue and by Celery, whose URL is read again here."""
    scheme = "rediss" if tls else "redis"
    login = f"{quote(username, safe='')}:{quote(password, safe='')}"

    found = parse_url(f"{scheme}://{login}@{host}:7000/{database}")
    again = parse_url(celery_url(found)[0])

    assert (found.username, found.password, found.database) == (username, password, database)
    assert replace(again, options=found.options) == found
    assert ";" not in celery_url(found)[0].reveal()  # separates alternatives in kombu


@settings(deadline=None)
@given(SECRETS, st.sampled_from(["redis://h:1/2", "redis://me@h", "unix:///run/s?db=1", "redis+sentinel://a,b/q"]))
def test_a_password_of_its_own_setting_needs_no_encoding(password: str, url: str) -> None:
    """It joins a URL that has none, and stays away from one that has."""
    joined = parse_url(with_password(url, password))

    assert joined.password == password
    assert replace(joined, password=None) == parse_url(url)
    assert parse_url(with_password(url, password).reveal()) == joined
    assert with_password("redis://:own@h", password).reveal() == "redis://:own@h"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "it is empty; unset it"),
        ("host:6379", "it begins with no scheme; write redis:// before it"),
        ("://host", "nothing is no scheme"),
        ("http://host", "http is no scheme"),
        ("unix+sentinel:///path", r"unix\+sentinel is no scheme"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("unix:///run/redis.sock?db=one", "db=one is no number"),
        ("redis+sentinel://s1:26379", "lacks the name of the service"),
        ("redis+sentinel://s1:x/queue", "'s1:x' is not host:port"),
        ("redis+cluster://n1,,n2", "'' is not host:port"),
        ("redis+cluster://n1/1", "database 0 only"),
        ("redis://host?replicas=all", "replicas=all is no number"),
        ("redis://host/zero", "/zero is no database"),
        ("redis://host/1/2", "/1/2 is no database"),
        ("redis://host/-1", "/-1 is no database"),
        ("redis://host/1?db=2", "database 1 and database 2"),
        ("redis://host:0", "0 is no port"),
        ("redis://host:70000", "70000 is no port"),
        ("redis://::1/0", "not host:port"),
        ("redis://[::g]/0", "no IPv6 address"),
        ("redis://host?ssl_ca_certs=/ca.pem", "ssl_ca_certs is for TLS: write rediss://"),
        ("rediss://host?ssl_cert_reqs=maybe", "ssl_cert_reqs=maybe cannot be used"),
        ("rediss://host?ssl_check_hostname=perhaps", "ssl_check_hostname=perhaps cannot be used"),
        ("redis://host?retry_on_timeout=1", "retry_on_timeout is no option"),
        ("redis://host?sentinel_password=x", r"redis\+sentinel:// only"),
        ("redis://host?db=1&db=1", "given twice"),
        ("redis://host?max_connections=0", "max_connections=0 cannot be used"),
        ("redis://host?replicas=" + "9" * 5000, "at most 4096 characters"),
        ("redis://host?replicas=\u00b2", "replicas="),
        ("redis+sentinel://s1:99999/queue", "99999"),
        ("redis+cluster://n1:\u00b2", "L4_REDIS_URL|is no"),
        ("redis://host:port", "port"),
        ("redis://host?db=x", "x"),
        ("redis://host?socket_timeout=soon", "soon"),
    ],
)
def test_a_wrong_url_is_told(url: str, says: str) -> None:
    """ConfigError names the variable and what is wrong, before anything connects."""
    with pytest.raises(ConfigError, match=f"^L4_REDIS_URL: .*{says}"):
        Executor(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pa#zyzzyva@host/0",
        "redis://:pa/zyzzyva@host/0",
        "redis://:pa?zyzzyva@host/0",
        "redis://:pa?x=zyzzyva@host/0",
        "redis://u:12/zyzzyva@host/0",
        "redis://u:12?db=zyzzyva@host/0",
        "redis://:pazyzzyva",
        "redis://me:pazyzzyva/0",
        "rediss://:pa]zyzzyva[#x@host",
        "unix:///s?password=pa#zyzzyva",
    ],
)
def test_a_raw_password_is_told_and_not_shown(url: str) -> None:
    """Neither by the error nor by what is shown of the URL."""
    with pytest.raises(ConfigError, match=r"^L4_REDIS_URL: .*(percent-encoded|not host:port)") as caught:
        parse_url(url)
    assert caught.value.__cause__ is None
    for shown in (str(caught.value), redacted(url)):
        assert "zyzzyva" not in shown
        assert "pa#" not in shown


@pytest.mark.parametrize("host", ["[host", "\ud800", "host\x00", "host/\u00b2", "host/" + "9" * 5000])
def test_what_no_url_can_hold_is_told_without_the_password(host: str) -> None:
    """One typed error, whatever the parsers of URLs raise."""
    with pytest.raises(ConfigError, match="L4_REDIS_URL") as caught:
        parse_url(f"redis://:zyzzyva@{host}")
    assert "zyzzyva" not in str(caught.value)


def test_a_broker_that_is_wrong_is_told_by_its_own_name() -> None:
    """Not by the queue's."""
    with pytest.raises(ConfigError, match=r"^L4_CELERY_BROKER_URL: redsi is no scheme"):
        _ = Settings(celery_broker_url="redsi://host/0").broker_url


def test_passwords_are_not_shown() -> None:
    """Of no kind of URL."""
    assert redacted("redis://:secret@127.0.0.1:1/0") == "redis://***@127.0.0.1:1/0"
    many = redacted("redis+sentinel://u:secret@s1:1,s2:2/queue?sentinel_password=secret&replicas=1")
    assert many == "redis+sentinel://***@s1:1,s2:2/queue?sentinel_password=***&replicas=1"
    assert redacted("redis+cluster://n1,n2") == "redis+cluster://n1,n2"
    assert redacted("redis://h?password=a@b&db=1") == "redis://h?password=***&db=1"


def test_settings_never_show_a_password() -> None:
    """However they are printed, formatted, dumped or logged; while programs get the whole URL."""
    secret = "hunter2hunter2"
    settings = load_settings(
        redis_url=f"redis://:{secret}@h:1/0",
        celery_broker_url=f"redis://:{secret}@h:1/1",
        redis_password=secret,
        flower_login=f"admin:{secret}",
    )
    url = settings.redis_url

    shown = [repr(settings), str(settings), f"{settings}", settings.model_dump_json(), repr(settings.model_dump())]
    shown += [
        str(url),
        repr(url),
        f"{url}",
        f"{url:>40}",
        logging.LogRecord("a", 0, "", 0, "at %s", (url,), None).getMessage(),
        str({"a": url}),
        f"{[url]}",
    ]
    shown += [repr(parse_url(url)), repr(settings.broker_url), str(pickle.loads(pickle.dumps(url)))]
    assert [text for text in shown if secret in text] == []
    assert url == f"redis://:{secret}@h:1/0"
    assert type(url.reveal()) is str
    assert json.loads(json.dumps(url)) == url.reveal()
    assert os.fsencode(url) == url.reveal().encode()
    assert celery_settings(settings)["broker_url"] == f"redis://:{secret}@h:1/1"


def test_a_wrong_setting_does_not_show_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pydantic's own error would show what was given."""
    monkeypatch.setenv("L4_REDIS_URL", "redis://:hunter2@h")
    with pytest.raises(ValueError) as caught:
        Settings(redis_url=["redis://:hunter2@h"])
    assert "hunter2" not in str(caught.value)


def test_celery_wants_a_redis_of_its_own() -> None:
    """The database after the queue's is no answer where there is a cluster or Sentinel."""
    url = "redis+sentinel://s1/queue"

    with pytest.raises(ConfigError, match="L4_CELERY_BROKER_URL"):
        _ = Settings(redis_url=url).broker_url
    own = Settings(redis_url=url, celery_broker_url="redis://broker:6379/0")
    assert own.broker_url == "redis://broker:6379/0"
    with pytest.raises(ConfigError, match="L4_CELERY_BROKER_URL"):
        _ = Settings(celery_broker_url=url).broker_url
    for other in ("amqp://me:x@rabbit//", "redis+socket:///run/redis.sock?virtual_host=1"):
        assert Settings(celery_broker_url=other).broker_url == other


def test_the_broker_is_the_next_database_and_checks_certificates_as_the_queue_does() -> None:
    """Plain `rediss://` verifies; what the URL says otherwise goes on to Celery."""
    assert Settings(redis_url="redis://h/3").broker_url == "redis://h:6379/4"
    assert Settings(redis_url="redis://h").broker_tls == {}
    socket = Settings(redis_url="unix://u:p%2F@/run/redis.sock?db=2")
    assert socket.broker_url == "redis+socket://u:p%2F@/run/redis.sock?virtual_host=3"
    verified = Settings(redis_url="rediss://host/0?replicas=1&ssl_ca_certs=/ca.pem")
    assert verified.broker_url == "rediss://host:6379/1"
    assert celery_settings(verified)["broker_use_ssl"] == {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": True,
        "ssl_ca_certs": "/ca.pem",
    }
    assert Settings(redis_url="rediss://h").broker_tls["ssl_cert_reqs"] is ssl.CERT_REQUIRED
    assert Settings(redis_url="rediss://h?ssl_cert_reqs=none").broker_tls["ssl_cert_reqs"] is ssl.CERT_NONE


def test_a_certificate_that_is_not_there_is_told() -> None:
    """A missing file is no passing trouble of a connection."""
    with pytest.raises(ConfigError, match="ssl_ca_certs: there is no /nonexistent"):
        Executor("rediss://host?ssl_ca_certs=/nonexistent/ca.pem")


def test_clients_find_the_redis_that_was_started_in_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a URL is set; nobody counts it as set. A file of somebody else's is left alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L4_REDIS_URL", raising=False)
    assert load_settings().redis_url == "redis://127.0.0.1:6379/0"
    Path(".l4queue").mkdir()
    Path(".l4queue/url").write_text("redis://:secret@127.0.0.1:7/0\n")

    found = load_settings()
    assert found.redis_url == "redis://:secret@127.0.0.1:7/0"
    assert "redis_url" not in found.model_fields_set
    assert isinstance(found.redis_url, SecretUrl)
    assert load_settings(redis_url="redis://other").redis_url == "redis://other"
    if os.getuid() == 0:  # only root can give a file away
        os.chown(".l4queue/url", 4_000_001, -1)
        assert load_settings().redis_url == "redis://127.0.0.1:6379/0"
