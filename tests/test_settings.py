"""Every variable of the environment: its default, what it takes, and how it is refused."""

import hashlib
import json
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.onboarding.access import ApiKey, Scope
from app.onboarding.catalogue import Catalogue
from app.onboarding.limits import Limit
from app.onboarding.retention import ExpiryRule, Since
from app.onboarding.sessions import SessionStatus
from app.onboarding.tasks import TaskRule
from app.settings import Settings, SettingsError, load_settings, unknown_variables, variable_of
from tests.agents import AGENT
from tests.faults.servers import HOST

PACKAGED = Path(__file__).parents[1] / "app" / "onboarding" / "catalogue.json"
QUESTIONS = PACKAGED.with_name("questions.json")

STEP = {"id": 1, "key": "first", "title": "First", "phase": 1, "required": True}

DIGEST = hashlib.sha256(b"a key").hexdigest()
API_KEY = f"bcm:generator+admin:{DIGEST}"

BARE_EC_KEY = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEX18H2G5qZ2rUnnXccKo3i4TRpAla"
    "76zZz5mY4UdLQ1mxvIn/PNv2HS0zgXHOWFtu4F97BSqCs3ObQn7F81oHbQ=="
)
EC_KEY = f"-----BEGIN PUBLIC KEY-----\n{BARE_EC_KEY}\n-----END PUBLIC KEY-----\n"
SECRET = "a secret of thirty-two bytes or more"


class Variable(NamedTuple):
    """One variable: what the contract says of it."""

    name: str
    field: str
    default: Any
    good: dict[str, Any]
    """Texts that it takes, with what they mean."""

    bad: list[str]
    """Texts that stop the start."""


NOT_A_NUMBER = ["abc", "1.5.2", "1 000", "0x10", "nan", "∞"]
NOT_AN_INTEGER = [*NOT_A_NUMBER, "1.5", "1e3x"]

VARIABLES = [
    Variable("REDIS_PORT", "redis_port", 6379, {"6380": 6380}, ["0", "65536", *NOT_AN_INTEGER]),
    Variable("REDIS_DB", "redis_db", 0, {"0": 0, "3": 3}, ["-1", *NOT_AN_INTEGER]),
    Variable("ONBOARDING_DATA_DIR", "data_dir", Path(".data"), {"/a b": Path("/a b")}, []),
    Variable(
        "ONBOARDING_KEY_HASH_TAG",
        "key_hash_tag",
        "auto",
        {"auto": "auto", "on": "on", "off": "off"},
        ["yes", "true", "auto,on"],
    ),
    Variable(
        "ONBOARDING_DURABILITY",
        "durability",
        "local",
        {"local": "local"},
        ["none", "sync"],
    ),
    Variable(
        "ENVIRONMENT",
        "environment",
        "development",
        {"development": "development"},
        ["prod", "staging"],
    ),
    Variable("HOST", "host", "127.0.0.1", {"0.0.0.0": "0.0.0.0", "::1": "::1"}, []),
    Variable("PORT", "port", 8000, {"0": 0, "65535": 65535}, ["-1", "65536", *NOT_AN_INTEGER]),
    Variable("WEB_CONCURRENCY", "web_concurrency", 1, {"4": 4}, ["0", "-1", *NOT_AN_INTEGER]),
    Variable(
        "LOG_LEVEL",
        "log_level",
        "info",
        {"debug": "debug", "WARNING": "warning", "error": "error"},
        ["loud", "10"],
    ),
    Variable(
        "ONBOARDING_LOG_FORMAT",
        "log_format",
        None,
        {"json": "json", "console": "console"},
        ["text", "xml"],
    ),
    Variable(
        "ONBOARDING_CORS_ORIGINS",
        "cors_origins",
        (),
        {
            "https://app.example.com": ("https://app.example.com",),
            "http://localhost:3000, https://b.example": (
                "http://localhost:3000",
                "https://b.example",
            ),
        },
        ["*", "app.example.com", "https://*.example.com", "https://a.example/", "null"],
    ),
    Variable("ONBOARDING_DRAIN_S", "drain_s", 5, {"0": 0, "0.5": 0.5}, ["-1", *NOT_A_NUMBER]),
    Variable("ONBOARDING_AUTH", "auth", "off", {"off": "off"}, ["yes", "jwt", "true"]),
    Variable(
        "ONBOARDING_API_KEYS",
        "api_keys",
        None,
        {API_KEY: SecretStr(API_KEY)},
        ["bcm", f"bcm:root:{DIGEST}", f"bcm::{DIGEST}", "bcm:admin:5up3r", f"{API_KEY},{API_KEY}"],
    ),
    Variable(
        "ONBOARDING_API_KEYS_FILE",
        "api_keys_file",
        None,
        {"/dev/null": Path("/dev/null")},
        ["/nowhere", "/", str(PACKAGED)],
    ),
    Variable(
        "ONBOARDING_JWT_KEY",
        "jwt_key",
        None,
        {each: SecretStr(each) for each in (EC_KEY, EC_KEY.replace("\n", "\\n"))},
        [
            *("short", "s" * 31, "x BEGIN y", EC_KEY[:-40], EC_KEY.replace("PUBLIC", "PRIVATE")),
            *(
                "-----BEGIN CERTIFICATE-----",
                BARE_EC_KEY,
                '{"kty": "EC", "crv": "P-256"}' + "x" * 9,
            ),
        ],
    ),
    Variable(
        "ONBOARDING_JWT_JWKS_URL",
        "jwt_jwks_url",
        None,
        {
            url: url
            for url in ("https://id.example/jwks?a=b", "http://localhost:8080/", "http://[::1]/")
        },
        [
            *(
                "id.example",
                "ftp://id.example",
                "https://",
                "https://id.example:port",
                "https:///x",
            ),
            *("https://u:p@id.example", "https://id.example/#x", "https://id.example/a b"),
        ],
    ),
    Variable(
        "ONBOARDING_JWT_ALGORITHMS",
        "jwt_algorithms",
        ("RS256", "ES256", "EdDSA"),
        {"PS512": ("PS512",), "HS256, ES384": ("HS256", "ES384")},
        ["none", "None", "RS256,none", "rs256", ",", "RS256,", "ES256K", "RSA-OAEP", "*"],
    ),
    Variable(
        "ONBOARDING_JWT_ISSUER",
        "jwt_issuer",
        None,
        {"https://id.example/": "https://id.example/"},
        [],
    ),
    Variable("ONBOARDING_JWT_AUDIENCE", "jwt_audience", None, {"onboarding": "onboarding"}, []),
    Variable(
        "ONBOARDING_SESSION_TTL_S",
        "session_ttl_s",
        604_800,
        {"1": 1, "3600": 3600},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_DRAFT_TTL_S",
        "draft_ttl_s",
        86_400,
        {"1": 1, "3600": 3600},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_STEPS_FILE", "steps_file", PACKAGED, {str(PACKAGED): PACKAGED}, ["/nowhere"]
    ),
    Variable(
        "ONBOARDING_FINALIZE_REQUIRES",
        "finalize_requires",
        "none",
        {"none": "none", "required": "required", "all": "all"},
        ["some", "true"],
    ),
    Variable(
        "ONBOARDING_MAX_STEP_BYTES",
        "max_step_bytes",
        256 * 1024,
        {"1024": 1024},
        ["0", "-1", "1MB", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_MAX_UPLOAD_BYTES",
        "max_upload_bytes",
        10 * 1024 * 1024,
        {"1": 1, "1024": 1024},
        ["0", "-1", "1MB", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_MAX_RESULT_BYTES",
        "max_result_bytes",
        32 * 1024 * 1024,
        {"1": 1, "1024": 1024},
        ["0", "-1", "1MB", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_TASK_TYPES",
        "task_types",
        {},
        {
            "{}": {},
            '{"mine": {}}': {"mine": TaskRule()},
            '{"a.b-c_1": {"tracked": false}}': {"a.b-c_1": TaskRule(tracked=False)},
            '{"scraping": {"tracked": true, "kept_until_released": true}}': {
                "scraping": TaskRule(tracked=True, kept_until_released=True)
            },
        },
        [
            *("mine", "{", "[]", "null", '"mine"', "1"),
            *('{"": {}}', '{"a b": {}}', '{"a": true}', '{"a": []}', '{"a": null}'),
            *('{"a": {"tracked": 1}}', '{"a": {"tracked": "yes"}}', '{"a": {"kept": true}}'),
        ],
    ),
    Variable(
        "ONBOARDING_MAX_SESSIONS",
        "max_sessions",
        0,
        {"0": 0, "1": 1, "100000": 100_000},
        ["-1", "1000000001", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_CAPACITY_POLICY",
        "capacity_policy",
        "refuse",
        {"refuse": "refuse", "evict_oldest": "evict_oldest"},
        ["evict", "REFUSE"],
    ),
    Variable(
        "ONBOARDING_EXPIRY_RULES",
        "expiry_rules",
        (),
        {
            "[]": (),
            '[{"older_than_hours": 24}]': (ExpiryRule(older_than_hours=24.0),),
            '[{"status": "error", "older_than_hours": 0.5, "since": "ended"}]': (
                ExpiryRule(status=SessionStatus.ERROR, older_than_hours=0.5, since=Since.ENDED),
            ),
        },
        [
            *("24", "{}", "[", "[1]", '[{"status": "error"}]', '[{"older_than_hours": -1}]'),
            *('[{"older_than_hours": "1"}]', '[{"older_than_hours": 1, "since": "birth"}]'),
            *('[{"older_than_hours": 1, "status": "done"}]', '[{"older_than_hours": 1, "x": 1}]'),
        ],
    ),
    Variable(
        "ONBOARDING_CLEANUP_INTERVAL_S",
        "cleanup_interval_s",
        3600.0,
        {"0.1": 0.1, "60": 60.0},
        ["0", "-1", *NOT_A_NUMBER],
    ),
    Variable(
        "ONBOARDING_MAX_IN_FLIGHT",
        "max_in_flight",
        256,
        {"1": 1, "1000": 1000},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_MAX_STREAMS",
        "max_streams",
        5000,
        {"1": 1, "20000": 20000},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_MAX_STREAMS_PER_SESSION",
        "max_streams_per_session",
        16,
        {"1": 1, "100": 100},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_AGENT",
        "agent",
        None,
        {"tests.agents:make_factory": "tests.agents:make_factory"},
        [
            *("agent", "tests.agents", ":make_factory", "tests.agents:", "tests agents:f"),
            *("tests/agents.py:make_factory", "tests.agents:make.factory"),
            *("no_such_module:f", "tests.agents:no_such_name", "tests.agents:NO_FUNCTION"),
        ],
    ),
    Variable(
        "ONBOARDING_QA_FILE",
        "qa_file",
        QUESTIONS,
        {str(QUESTIONS): QUESTIONS},
        ["/nowhere", "/", str(PACKAGED)],
    ),
    Variable(
        "ONBOARDING_MAX_CONCURRENT_ASKS",
        "max_concurrent_asks",
        10,
        {"1": 1, "100": 100},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_ASKS_PER_SECOND",
        "asks_per_second",
        50,
        {"1": 1, "100000": 100_000},
        ["0", "-1", "100001", *NOT_AN_INTEGER],
    ),
    *(
        Variable(
            f"ONBOARDING_{name.upper()}",
            name,
            default,
            {
                "off": None,
                "1/second": Limit(1, 1),
                " 90/minute ": Limit(90, 60),
                "1000000/hour": Limit(1_000_000, 3600),
                "10/day": Limit(10, 86_400),
            },
            [
                *(
                    "0/minute",
                    "-1/minute",
                    "1000001/minute",
                    "1.5/minute",
                    "600",
                    "600/",
                    "/minute",
                ),
                *("600/minutes", "600/60", "600 / minute", "600/MINUTE", "Off", "none", "٦/day"),
                '{"quota": 1, "window_s": 1}',
            ],
        )
        for name, default in {
            "rate_limit": Limit(600, 60),
            "create_limit": Limit(60, 60),
            "miss_limit": Limit(60, 60),
        }.items()
    ),
    Variable(
        "ONBOARDING_REDIS_TIMEOUT_S",
        "redis_timeout_s",
        1.0,
        {"0.2": 0.2, "5": 5.0},
        ["0", "-1", *NOT_A_NUMBER],
    ),
    Variable(
        "ONBOARDING_RETRY_ATTEMPTS",
        "retry_attempts",
        4,
        {"1": 1, "10": 10},
        ["0", "-1", *NOT_AN_INTEGER],
    ),
    Variable(
        "ONBOARDING_RETRY_BASE_S", "retry_base_s", 1.0, {"0": 0, "0.1": 0.1}, ["-1", *NOT_A_NUMBER]
    ),
    Variable(
        "ONBOARDING_RETRY_JITTER_S",
        "retry_jitter_s",
        0.5,
        {"0": 0, "0.1": 0.1},
        ["-1", *NOT_A_NUMBER],
    ),
    Variable(
        "ONBOARDING_REQUEST_DEADLINE_S",
        "request_deadline_s",
        15.0,
        {"0.5": 0.5, "30": 30.0},
        ["0", "-1", *NOT_A_NUMBER],
    ),
]

BY_ADDRESS = {
    "redis_url": "REDIS_URL",
    "redis_host": "REDIS_HOST",
    "upstash_redis_url": "UPSTASH_REDIS_URL",
    "upstash_redis_token": "UPSTASH_REDIS_TOKEN",
}
"""The variables that say where the store is: what they mean is seen in `store_address`."""


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a function that sets variables: `env(REDIS_URL="...")`."""

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def refusal(**overrides: Any) -> str:
    """Load the settings, which must be refused with one line; gives the line."""
    with pytest.raises(SettingsError) as caught:
        load_settings(**overrides)
    line = str(caught.value)
    assert line.isprintable(), repr(line)
    return line


# One by one


def test_every_variable_that_is_read_is_tried_here() -> None:
    tried = {each.field: each.name for each in VARIABLES} | BY_ADDRESS
    assert tried == {field: variable_of(field) for field in Settings.model_fields}


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda each: each.name)
def test_the_default_of(variable: Variable) -> None:
    assert getattr(load_settings(), variable.field) == variable.default


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        pytest.param(each, text, id=f"{each.name}={text}")
        for each in VARIABLES
        for text in each.good
    ],
)
def test_taken(variable: Variable, text: str, env: Callable[..., None]) -> None:
    env(**{variable.name: text})
    assert getattr(load_settings(), variable.field) == variable.good[text]


@pytest.mark.parametrize(
    ("variable", "text"),
    [pytest.param(each, text, id=f"{each.name}={text}") for each in VARIABLES for text in each.bad],
)
def test_refused(variable: Variable, text: str, env: Callable[..., None]) -> None:
    env(**{variable.name: text})
    line = refusal()
    assert line.startswith(f"{variable.name}: ")
    others = {each.name for each in VARIABLES if each is not variable} | set(BY_ADDRESS.values())
    assert [name for name in others if f"; {name}: " in line] == []


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda each: each.name)
def test_empty_means_unset(variable: Variable, env: Callable[..., None]) -> None:
    env(**{variable.name: ""})
    assert getattr(load_settings(), variable.field) == variable.default


def test_all_faults_are_named_at_once_in_one_line(env: Callable[..., None]) -> None:
    wrong = {each.name: each.bad[0] for each in VARIABLES if each.bad}
    wrong |= {"REDIS_URL": "nonsense"}
    env(**wrong)

    line = refusal()

    assert [name for name in wrong if f"{name}: " not in line] == []


def test_faults_of_single_variables_and_of_their_combination_are_named_together(
    env: Callable[..., None],
) -> None:
    env(REDIS_URL="redis+cluster://h1:7000", ONBOARDING_KEY_HASH_TAG="off", PORT="none")

    line = refusal()

    assert "ONBOARDING_KEY_HASH_TAG" in line
    assert "PORT" in line


def test_a_fault_that_follows_from_another_is_not_named(env: Callable[..., None]) -> None:
    # There is a REDIS_URL: what production lacks is a good one.
    env(REDIS_URL="redis://h1:0", ENVIRONMENT="production")

    line = refusal()

    assert "REDIS_URL" in line
    assert "ENVIRONMENT" not in line


def test_the_embedded_store_cannot_promise_a_replica(env: Callable[..., None]) -> None:
    env(ONBOARDING_DURABILITY="replicated")
    assert "ONBOARDING_DURABILITY: the embedded store has no replica" in refusal()
    env(REDIS_URL="redis://h1")
    assert load_settings().durability == "replicated"


def test_settings_are_made_of_what_they_give(env: Callable[..., None]) -> None:
    env(ONBOARDING_AUTH="on", ONBOARDING_API_KEYS=API_KEY, ONBOARDING_JWT_KEY=EC_KEY)
    settings = load_settings()
    assert load_settings(**settings.model_dump()) == settings


def test_settings_do_not_change() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


# The life of a session


@pytest.mark.parametrize("name", ["SESSION_TTL", "ONBOARDING_SESSION_TTL_S"])
@pytest.mark.parametrize("seconds", [1, 60, 10**10])
def test_the_life_of_a_session_is_any_integer_from_1(
    name: str, seconds: int, env: Callable[..., None]
) -> None:
    env(**{name: str(seconds)})
    assert load_settings().session_ttl_s == seconds


def test_the_own_name_of_the_life_of_a_session_wins(env: Callable[..., None]) -> None:
    env(SESSION_TTL="60", ONBOARDING_SESSION_TTL_S="120")
    assert load_settings().session_ttl_s == 120


def test_the_variable_that_was_set_is_the_one_that_is_named(env: Callable[..., None]) -> None:
    env(SESSION_TTL="a week")
    assert refusal().startswith("SESSION_TTL: ")


# Where the store is


def test_without_a_configured_store_there_is_the_embedded_one() -> None:
    assert load_settings().store_address is None


def nodes() -> tuple[tuple[str, int], ...]:
    address = load_settings().store_address
    assert address is not None
    return address.nodes


UPSTASH = {"UPSTASH_REDIS_URL": "https://u.example", "UPSTASH_REDIS_TOKEN": "token-of-upstash"}


def test_redis_url_comes_before_redis_host_and_that_before_upstash(
    env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    env(REDIS_URL="redis://first:1", REDIS_HOST="second", REDIS_PORT="2", **UPSTASH)
    assert nodes() == (("first", 1),)
    monkeypatch.delenv("REDIS_URL")
    assert nodes() == (("second", 2),)
    monkeypatch.delenv("REDIS_HOST")
    assert nodes() == (("u.example", 6379),)


def test_redis_host_alone_is_the_usual_port_and_database(env: Callable[..., None]) -> None:
    env(REDIS_HOST="h1")
    address = load_settings().store_address
    assert address is not None
    assert (address.mode, address.nodes, address.db) == ("standalone", (("h1", 6379),), 0)


def test_redis_port_and_db_go_with_redis_host(env: Callable[..., None]) -> None:
    env(REDIS_HOST="h1", REDIS_PORT="6380", REDIS_DB="3")
    address = load_settings().store_address
    assert address is not None
    assert (address.nodes, address.db) == ((("h1", 6380),), 3)


@pytest.mark.parametrize("text", ["redis://h1", "redis://:secret-word@h1", "h1:6379", "h1 h2", "/"])
def test_redis_host_that_is_no_host_is_refused(text: str, env: Callable[..., None]) -> None:
    env(REDIS_HOST=text)
    line = refusal()
    assert line.startswith("REDIS_HOST: ")
    assert "secret-word" not in line


@pytest.mark.parametrize("url", ["https://u.example", "rediss://u.example:6379"])
def test_upstash_is_reached_by_tls_with_the_token_as_password(
    url: str, env: Callable[..., None]
) -> None:
    env(UPSTASH_REDIS_URL=url, UPSTASH_REDIS_TOKEN="token-of-upstash")
    address = load_settings().store_address
    assert address is not None
    assert address.nodes == (("u.example", 6379),)
    assert address.tls
    assert (address.username, address.password) == ("default", "token-of-upstash")


@pytest.mark.parametrize("name", UPSTASH)
def test_half_of_upstash_is_refused_naming_both(name: str, env: Callable[..., None]) -> None:
    env(**{name: UPSTASH[name]})
    line = refusal()
    assert "UPSTASH_REDIS_URL" in line
    assert "UPSTASH_REDIS_TOKEN" in line


@pytest.mark.parametrize("url", ["http://u.example", "redis://u.example", "u.example", "https://"])
def test_a_bad_upstash_address_is_refused(url: str, env: Callable[..., None]) -> None:
    env(UPSTASH_REDIS_URL=url, UPSTASH_REDIS_TOKEN="token-of-upstash")
    line = refusal()
    assert "UPSTASH_REDIS_URL" in line
    assert "token-of-upstash" not in line


@pytest.mark.parametrize(
    ("url", "mode"),
    [
        ("redis://h1", "standalone"),
        ("rediss://h1", "standalone"),
        ("valkey://h1", "standalone"),
        ("valkeys://h1", "standalone"),
        ("unix:///run/redis.sock", "standalone"),
        ("redis+sentinel://h1:26379,h2:26379/mymaster/0", "sentinel"),
        ("redis+cluster://h1:7000", "cluster"),
    ],
)
def test_every_kind_of_url_is_taken(url: str, mode: str, env: Callable[..., None]) -> None:
    env(REDIS_URL=url)
    address = load_settings().store_address
    assert address is not None
    assert address.mode == mode


@pytest.mark.parametrize("url", ["h1:6379", "http://h1", "redis://", "redis://h1:port", " "])
def test_a_bad_url_is_refused(url: str, env: Callable[..., None]) -> None:
    env(REDIS_URL=url)
    assert refusal().startswith("REDIS_URL: ")


# Production


def test_production_without_a_store_is_refused_naming_what_would_do(
    env: Callable[..., None],
) -> None:
    env(ENVIRONMENT="production")
    line = refusal()
    for name in ("ENVIRONMENT", "REDIS_URL", "UPSTASH_REDIS_URL", "UPSTASH_REDIS_TOKEN"):
        assert name in line


@pytest.mark.parametrize(
    "store",
    [{"REDIS_URL": "redis://h1"}, {"REDIS_HOST": "h1"}, UPSTASH],
    ids="+".join,
)
def test_production_with_a_store_is_taken(store: dict[str, str], env: Callable[..., None]) -> None:
    env(ENVIRONMENT="production", ONBOARDING_AUTH="on", ONBOARDING_API_KEYS=API_KEY, **store)
    assert load_settings().environment == "production"


def test_production_without_access_control_is_refused_whatever_else_is_wrong(
    env: Callable[..., None],
) -> None:
    env(ENVIRONMENT="production", REDIS_URL="redis://h1", ONBOARDING_API_KEYS=API_KEY)
    assert refusal().startswith("ONBOARDING_AUTH: ")
    env(REDIS_URL="")
    line = refusal()
    assert "ONBOARDING_AUTH: " in line
    assert "UPSTASH_REDIS_TOKEN" in line


# Who may do what

WAYS_IN = {
    "ONBOARDING_API_KEYS": API_KEY,
    "ONBOARDING_JWT_KEY": EC_KEY,
    "ONBOARDING_JWT_JWKS_URL": "https://id.example/jwks",
}


@pytest.mark.parametrize("name", WAYS_IN)
def test_access_control_needs_one_way_in(name: str, env: Callable[..., None]) -> None:
    env(ONBOARDING_AUTH="on", **{name: WAYS_IN[name]})
    assert load_settings().auth == "on"


def test_access_control_without_a_way_in_is_refused_naming_what_would_do(
    env: Callable[..., None],
) -> None:
    # A file without a key is none.
    env(ONBOARDING_AUTH="on", ONBOARDING_API_KEYS_FILE="/dev/null")
    line = refusal()
    assert line.startswith("ONBOARDING_AUTH: ")
    assert [name for name in WAYS_IN if name not in line] == []


@pytest.mark.parametrize("name", WAYS_IN)
def test_a_way_in_that_is_wrong_by_itself_is_the_only_fault(
    name: str, env: Callable[..., None]
) -> None:
    env(ONBOARDING_AUTH="on", **{name: "nonsense"})
    line = refusal()
    assert line.startswith(f"{name}: ")
    assert "ONBOARDING_AUTH" not in line


@pytest.mark.parametrize(
    "both",
    [
        {"ONBOARDING_API_KEYS": API_KEY, "ONBOARDING_API_KEYS_FILE": "/dev/null"},
        {"ONBOARDING_JWT_KEY": EC_KEY, "ONBOARDING_JWT_JWKS_URL": "https://id.example/jwks"},
    ],
    ids=["API keys", "JWT"],
)
def test_one_place_for_a_thing(both: dict[str, str], env: Callable[..., None]) -> None:
    env(**both)
    assert refusal().startswith(f"{', '.join(both)}: ")


@pytest.mark.parametrize("by_file", [True, False])
def test_the_api_keys_that_are_known(
    *, by_file: bool, env: Callable[..., None], tmp_path: Path
) -> None:
    other = hashlib.sha256(b"another").hexdigest()
    text = f"{API_KEY}\nshop:sessions:{other}\n"
    file = tmp_path / "keys"
    file.write_text(f"# Who may call\n\n{text}")
    name, value = ("API_KEYS_FILE", str(file)) if by_file else ("API_KEYS", text)
    env(**{f"ONBOARDING_{name}": value})
    assert load_settings().known_api_keys == (
        ApiKey("bcm", frozenset({Scope.GENERATOR, Scope.ADMIN}), bytes.fromhex(DIGEST)),
        ApiKey("shop", frozenset({Scope.SESSIONS}), bytes.fromhex(other)),
    )


@pytest.mark.parametrize("content", [b"bcm:admin:" + b"5" * 63, b"\xff\xfe", b"bcm"])
def test_a_file_of_api_keys_that_is_unfit_is_refused_without_showing_it(
    content: bytes, env: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_bytes(content)
    env(ONBOARDING_API_KEYS_FILE=str(tmp_path / "keys"))
    line = refusal()
    assert line.startswith("ONBOARDING_API_KEYS_FILE: ")
    assert "555" not in line


@pytest.mark.parametrize("key", [SECRET, EC_KEY])
@pytest.mark.parametrize("algorithms", ["HS256", "RS256", "ES256", "HS512,ES256", "ES384,PS256"])
def test_a_key_needs_an_algorithm_that_fits_it(
    key: str, algorithms: str, env: Callable[..., None]
) -> None:
    env(ONBOARDING_JWT_KEY=key, ONBOARDING_JWT_ALGORITHMS=algorithms)
    fit = ("HS256", "HS512") if key == SECRET else ("ES256",)
    if any(name in algorithms for name in fit):
        assert load_settings().jwt_key == SecretStr(key)
    else:
        line = refusal()
        assert line.startswith("ONBOARDING_JWT_KEY: ")
        assert key not in line


def test_published_keys_need_an_algorithm_for_them(env: Callable[..., None]) -> None:
    env(ONBOARDING_JWT_JWKS_URL="https://id.example/jwks", ONBOARDING_JWT_ALGORITHMS="HS256")
    assert refusal().startswith("ONBOARDING_JWT_ALGORITHMS: ")


@pytest.mark.parametrize(
    ("url", "environment", "is_taken"),
    [
        ("http://id.example/jwks", "development", True),
        ("http://id.example/jwks", "production", False),
        ("https://id.example/jwks", "production", True),
        ("http://127.0.0.1:8080/jwks", "production", True),
        ("http://localhost/jwks", "production", True),
        ("http://[::1]/jwks", "production", True),
        ("http://127.0.0.1.id.example/jwks", "production", False),
    ],
)
def test_keys_are_fetched_by_https_but_while_developing_and_within_the_machine(
    url: str, environment: str, *, is_taken: bool, env: Callable[..., None]
) -> None:
    env(ENVIRONMENT=environment, REDIS_URL="redis://h1", ONBOARDING_AUTH="on")
    env(ONBOARDING_JWT_JWKS_URL=url)
    if is_taken:
        assert load_settings().jwt_jwks_url == url
    else:
        assert refusal().startswith("ONBOARDING_JWT_JWKS_URL: ")


# The hash tag


@pytest.mark.parametrize(
    ("setting", "url", "tagged"),
    [
        ("auto", None, False),
        ("auto", "redis://h1", False),
        ("auto", "redis+sentinel://h1/mymaster", False),
        ("auto", "redis+cluster://h1", True),
        ("on", None, True),
        ("on", "redis://h1", True),
        ("on", "redis+cluster://h1", True),
        ("off", None, False),
        ("off", "redis://h1", False),
    ],
)
def test_the_hash_tag(
    setting: str, url: str | None, *, tagged: bool, env: Callable[..., None]
) -> None:
    env(ONBOARDING_KEY_HASH_TAG=setting, **({"REDIS_URL": url} if url else {}))
    assert load_settings().hash_tag is tagged


def test_a_cluster_without_the_hash_tag_is_refused(env: Callable[..., None]) -> None:
    env(REDIS_URL="redis+cluster://h1", ONBOARDING_KEY_HASH_TAG="off")
    assert "ONBOARDING_KEY_HASH_TAG" in refusal()


# The steps file


def catalogue_file(*steps: object, **further: object) -> str:
    return json.dumps({"version": "7", "steps": steps, **further})


def with_schema(schema: object) -> str:
    return catalogue_file({**STEP, "schema": schema})


def test_the_steps_file_is_the_catalogue(
    steps_file: Callable[[str], Path], env: Callable[..., None]
) -> None:
    second = {**STEP, "id": 2, "key": "second", "required": False, "help": "Take your time"}
    text = catalogue_file({**STEP, "schema": {"required": ["name"]}}, second)
    env(ONBOARDING_STEPS_FILE=str(steps_file(text)))

    catalogue = load_settings().catalogue

    assert (catalogue.version, catalogue.total) == ("7", 2)
    assert catalogue.required == {1}


def test_the_packaged_catalogue_has_23_steps() -> None:
    assert load_settings().catalogue.total == 23


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("steps: []", id="not JSON"),
        pytest.param("[]", id="no object"),
        pytest.param('{"steps": []}', id="no version"),
        pytest.param('{"version": "7"}', id="no steps"),
        pytest.param(catalogue_file(), id="not one step"),
        pytest.param(catalogue_file({**STEP, "colour": "red"}), id="unknown member"),
        pytest.param(catalogue_file({**STEP, "two\nlines": 1}), id="unknown member of two lines"),
        pytest.param(catalogue_file({**STEP, "id": 2}), id="begins with 2"),
        pytest.param(catalogue_file({**STEP, "id": "1"}), id="a number as text"),
        pytest.param(catalogue_file(STEP, {**STEP, "id": 3, "key": "b"}), id="a gap"),
        pytest.param(catalogue_file(STEP, {**STEP, "key": "b"}), id="a number twice"),
        pytest.param(catalogue_file(STEP, {**STEP, "id": 2}), id="a key twice"),
        pytest.param('{"version": "7", "version": "8", "steps": []}', id="a member twice"),
        pytest.param(
            catalogue_file(STEP).replace('"phase": 1', '"phase": 1, "phase": 2'),
            id="a member of a step twice",
        ),
        pytest.param(catalogue_file({**STEP, "required": "yes"}), id="required is no Boolean"),
        pytest.param(with_schema({"type": "nonsense"}), id="unknown type"),
        pytest.param(with_schema({"properties": []}), id="bad keyword"),
        pytest.param(with_schema({"pattern": "("}), id="bad pattern"),
        pytest.param(with_schema("object"), id="schema is text"),
        pytest.param(with_schema({"$ref": "#/$defs/nowhere"}), id="dangling $ref"),
        pytest.param(with_schema({"$ref": "http://example.com/s.json"}), id="remote $ref"),
        pytest.param(with_schema({"$ref": "file:///etc/passwd"}), id="$ref to a file"),
        pytest.param(
            with_schema({"properties": {"a": {"$ref": "https://example.com/s.json"}}}),
            id="remote $ref inside",
        ),
    ],
)
def test_a_steps_file_that_is_unfit_is_refused_in_one_line(
    text: str, steps_file: Callable[[str], Path], env: Callable[..., None]
) -> None:
    env(ONBOARDING_STEPS_FILE=str(steps_file(text)))
    assert refusal().startswith("ONBOARDING_STEPS_FILE: ")


def test_a_steps_file_that_is_missing_or_a_directory_is_refused(
    tmp_path: Path, env: Callable[..., None]
) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        env(ONBOARDING_STEPS_FILE=str(path))
        assert refusal().startswith("ONBOARDING_STEPS_FILE: ")


def test_a_remote_ref_is_refused_without_a_connection(
    steps_file: Callable[[str], Path], env: Callable[..., None]
) -> None:
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        url = f"http://{HOST}:{listener.getsockname()[1]}/schema.json"
        for schema in ({"$ref": url}, {"$schema": url}, {"$dynamicRef": url}):
            env(ONBOARDING_STEPS_FILE=str(steps_file(with_schema(schema))))
            assert refusal().startswith("ONBOARDING_STEPS_FILE: ")
        with pytest.raises(BlockingIOError):
            listener.accept()


# The agent


def test_a_python_that_cannot_search_needs_an_agent_of_the_deployer(
    env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.settings.is_search_there", lambda: False)
    line = refusal()
    assert line.startswith("ONBOARDING_AGENT: ")
    assert "FTS5" in line
    env(ONBOARDING_AGENT=AGENT)
    assert load_settings().agent == AGENT


def test_without_an_agent_of_the_deployer_there_is_the_built_in_one() -> None:
    assert load_settings().load_agent_factory() is None


@pytest.mark.parametrize("name", ["make_nothing", "fail", "Book"])
def test_an_agent_that_gives_no_factory_is_refused_when_it_is_asked_for_one(
    env: Callable[..., None], name: str
) -> None:
    env(ONBOARDING_AGENT=f"tests.agents:{name}")
    settings = load_settings()
    with pytest.raises(SettingsError, match=f"^ONBOARDING_AGENT: tests.agents:{name} ") as caught:
        settings.load_agent_factory()
    assert "secret" not in str(caught.value)


# Names that nobody reads


def test_unknown_variables_are_those_with_our_prefix_that_nothing_reads(
    env: Callable[..., None],
) -> None:
    env(ONBOARDING_SESION_TTL_S="1", ONBOARDING_QUUX="1", QUUX="1", REDIS_QUUX="1")
    env(**{each.name: next(iter(each.good)) for each in VARIABLES})
    assert unknown_variables() == ["ONBOARDING_QUUX", "ONBOARDING_SESION_TTL_S"]


# Secrets

secrets = st.builds(
    # The word in front makes sure that no part of a message is taken for it.
    lambda text: f"xSECRETx{text}",
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=24),
)

environments = st.fixed_dictionaries(
    {},
    optional={
        "REDIS_URL": st.sampled_from(
            [
                "redis://:{}@h1:6379/0",
                "redis://{}@h1",
                "redis://{}:{}@h1:port/0",
                "rediss://user:{}@h1:6379/x",
                "valkey://:{}@h1:0",
                "redis+sentinel://:{}@h1:26379/mymaster/0?sentinel_password={}",
                "redis+sentinel://:{}@h1:26379",
                "redis+cluster://:{}@h1:7000,h2:7001",
                "redis+cluster://:{}@h1:7000/1",
                "unix://:{}@/run/redis.sock",
                "unix:///run/redis.sock?password={}",
                "unix:///run/redis.sock?password={}&pasword={}",
                "redis://h1?password={}",
                "redis:/{}@h1",
                "://{}",
                "{}",
            ]
        ),
        "UPSTASH_REDIS_URL": st.sampled_from(
            [
                "https://u.example",
                "rediss://default:{}@u.example:6379",
                "http://:{}@u.example",
                "{}",
            ]
        ),
        "UPSTASH_REDIS_TOKEN": st.just("{}"),
        "ENVIRONMENT": st.sampled_from(["production", "nonsense"]),
        "ONBOARDING_API_KEYS": st.sampled_from(["{}", "bcm:admin:{}", "{}:admin:x", "a:{}:b"]),
        "ONBOARDING_JWT_KEY": st.sampled_from(
            ["{}", "{}" + SECRET, "-----BEGIN PUBLIC KEY-----{}"]
        ),
        "ONBOARDING_JWT_ALGORITHMS": st.sampled_from(["HS256", "RS256"]),
        "ONBOARDING_JWT_JWKS_URL": st.sampled_from(["https://u:{}@id.example", "{}"]),
        "PORT": st.just("none"),
        "ONBOARDING_KEY_HASH_TAG": st.just("off"),
    },
)


@hypothesis.settings(deadline=None)
@given(environment=environments, secret=secrets, encoded=st.booleans())
def test_no_secret_stands_in_an_error_or_in_the_repr_of_the_settings(
    environment: dict[str, str], secret: str, *, encoded: bool
) -> None:
    written = quote(secret, safe="") if encoded else secret
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value.replace("{}", written))
        try:
            settings = load_settings()
            said = repr(settings) + str(settings) + repr(settings.store_address)
        except SettingsError as error:
            said = "".join(traceback.format_exception(error)) + repr(error)

    assert "SECRET" not in said


def test_a_secret_is_not_in_the_repr_when_all_is_well(env: Callable[..., None]) -> None:
    env(REDIS_URL="redis://user:secret-word@h1", **UPSTASH)
    env(ONBOARDING_API_KEYS=API_KEY, ONBOARDING_JWT_KEY=f"secret-word {SECRET}")
    env(ONBOARDING_JWT_ALGORITHMS="HS256")
    settings = load_settings()
    assert settings.store_address is not None
    assert settings.store_address.password == "secret-word"
    known = settings.known_api_keys
    for said in (repr(settings), str(settings), repr(settings.store_address), repr(known)):
        assert "secret-word" not in said
        assert DIGEST not in said
        assert repr(bytes.fromhex(DIGEST)) not in said
        assert UPSTASH["UPSTASH_REDIS_TOKEN"] not in said


def test_the_catalogue_of_the_settings_is_that_of_the_file() -> None:
    assert load_settings().catalogue.pin == Catalogue.parse(PACKAGED.read_bytes()).pin
