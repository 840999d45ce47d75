"""Whom Flower answers: pages of its own, programs of this machine; never pages of others, under whatever name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.flower import check_variables, flower_options
from dispatcher.monitoring.flower_guard import Rules, is_loopback, refusal
from l4queue.config import Settings
from l4queue.errors import ConfigError

LOOPBACK = Rules()
OPEN = Rules(is_loopback=False)
LOGIN = Rules(has_login=True, is_loopback=False)
PROXIED = Rules(names=frozenset({"flower.example"}))
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
FOREIGN = st.sampled_from(
    (
        "http://evil.example",
        "https://127.0.0.1:5556",
        "http://127.0.0.1",
        "http://localhost:8000",
        "http://127.0.0.1:5555.evil.example",
        "http://[::1",
        "127.0.0.1:5555",
        "file://",
        "null",
        "",
    )
)
RULES = st.sampled_from([LOOPBACK, OPEN, LOGIN, PROXIED])


@settings(deadline=None)
@given(METHODS, FOREIGN, RULES)
def test_a_foreign_origin_is_refused_with_any_method(method: str, origin: str, rules: Rules) -> None:
    """With a login as well: the browser would add it."""
    assert refusal(method, {"Host": "127.0.0.1:5555", "Origin": origin}, rules)


@settings(deadline=None)
@given(
    METHODS,
    st.sampled_from(["evil.example", "evil.example:5555", "127.0.0.1.evil.example", "a,127.0.0.1", "[::1"]),
)
def test_a_foreign_name_is_refused(method: str, host: str) -> None:
    """A name that was made to lead here: the page and its origin agree, so only the name tells."""
    for rules in (LOOPBACK, OPEN, PROXIED):
        assert refusal(method, {"Host": host, "Origin": f"http://{host}"}, rules)
        assert refusal(method, {"Host": host}, rules)


@settings(deadline=None)
@given(
    METHODS, st.sampled_from(["127.0.0.1:5555", "localhost:5555", "[::1]:5555", "LOCALHOST", "127.9.9.9"]), RULES
)
def test_pages_of_its_own_and_programs_are_answered(method: str, host: str, rules: Rules) -> None:
    """With an Origin, as browsers send it with changes, and without, as curl does."""
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert refusal(method, own, rules) is None
    assert refusal(method, {"Host": host}, rules) is None
    assert refusal(method, {"Host": host, "Sec-Fetch-Site": "none"}, rules) is None
    assert refusal(method, {}, rules) is None


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_of_foreign_pages_only_links_to_a_tab_lead_here(site: str) -> None:
    """Not images, scripts, frames, forms: those carry no Origin when they read."""
    link = {
        "Host": "127.0.0.1",
        "Sec-Fetch-Site": site,
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert refusal("GET", link, LOOPBACK) is None
    assert refusal("POST", link, LOOPBACK)
    for more in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}):
        assert refusal("GET", link | more, LOOPBACK)


def test_names_that_were_chosen_are_answered() -> None:
    """A proxy's, also where it rewrites the Host; any name where there is a login; addresses for all others."""
    assert refusal("POST", {"Host": "flower.example", "Origin": "https://flower.example"}, PROXIED) is None
    assert refusal("POST", {"Host": "127.0.0.1:5555", "Origin": "https://flower.example"}, PROXIED) is None
    assert refusal("POST", {"Host": "any.example", "Origin": "https://any.example"}, LOGIN) is None
    assert refusal("GET", {"Host": "192.168.1.5:5555"}, OPEN) is None
    assert refusal("GET", {"Host": "192.168.1.5:5555"}, LOOPBACK)


def test_what_only_this_machine_reaches() -> None:
    """An empty address is all of them."""
    assert [is_loopback(a) for a in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_loopback(a) for a in ("", "0.0.0.0", "::", "10.0.0.1", "flower", "127.0.0.1.x")] == [False] * 6


def test_a_variable_that_flower_cannot_read_is_named() -> None:
    """In place of a traceback of Flower's."""
    with pytest.raises(ConfigError, match=r"^FLOWER_PORT: tcp://10\.0\.0\.1:5555 is no int"):
        check_variables({"FLOWER_PORT": "tcp://10.0.0.1:5555"})
    with pytest.raises(ConfigError, match=r"^FLOWER_MAX_TASKS"):
        check_variables({"FLOWER_MAX_TASKS": "many"})
    with pytest.raises(ConfigError, match=r"^FLOWER_READ_ONLY"):
        check_variables({"FLOWER_READ_ONLY": "perhaps"})
    check_variables(
        {"FLOWER_PORT": "80", "FLOWER_URL_PREFIX": "x", "FLOWER_READ_ONLY": "true", "FLOWER_OTHER": "?"}
    )
    check_variables({"FLOWER_TASK_RUNTIME_METRIC_BUCKETS": "1,2.5,inf"})


def test_flowers_own_variables_win() -> None:
    """Over every option of ours."""
    ours = flower_options(Settings(flower_port=7), {})
    assert (ours["port"], ours["address"]) == ("7", "127.0.0.1")
    assert "port" not in flower_options(Settings(), {"FLOWER_PORT": "8"})
