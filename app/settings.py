"""The settings: every variable of the environment that the service reads, and what it may be."""

import ipaddress
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.address import StoreAddress, parse_store_url, upstash_address
from app.onboarding.access import ApiKey, parse_api_keys
from app.onboarding.assistant import AgentFactory
from app.onboarding.catalogue import Catalogue
from app.onboarding.guide import QuestionEntry, is_search_there, parse_questions
from app.onboarding.jwt import ALGORITHMS, Algorithm, parse_jwt_key
from app.onboarding.limits import Limit, parse_limit
from app.onboarding.retention import (
    LONGEST_INTERVAL_S,
    MOST_SESSIONS,
    SHORTEST_INTERVAL_S,
    Capacity,
    CapacityPolicy,
    ExpiryRule,
    parse_expiry_rules,
)
from app.onboarding.tasks import TASK_RULES, Rules, TaskRule, parse_task_rules

PREFIX = "ONBOARDING_"

LONGEST_LIFE_S = 1000 * 365 * 86400
"""Longest life that is counted, in seconds: 1,000 years. A deadline must stay in the calendar."""

MOST_ASKS = 100_000
"""Highest limit of questions within a second: when each was asked is kept for so long."""

_PACKAGED_STEPS = Path(__file__).parent / "onboarding" / "catalogue.json"
_PACKAGED_QUESTIONS = Path(__file__).parent / "onboarding" / "questions.json"

Life = Annotated[int, Field(ge=1), AfterValidator(lambda life_s: min(life_s, LONGEST_LIFE_S))]


_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def _origins(value: object) -> object:
    if not isinstance(value, str):
        return value
    origins = tuple(part.strip() for part in value.split(",") if part.strip())
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("exact origins, comma-separated, such as https://app.example.com")
    return origins


def _store_url(url: SecretStr | None) -> SecretStr | None:
    if url is not None:
        parse_store_url(url.get_secret_value())
    return url


def _host(host: str | None) -> str | None:
    if host is not None and not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", host):
        raise ValueError("a host name or an IP address alone; the port goes into REDIS_PORT")
    return host


def _port(port: object) -> object:
    # Kubernetes sets REDIS_PORT=tcp://... beside a service that is called redis.
    return 6379 if isinstance(port, str) and port.startswith("tcp://") else port


def _steps_file(path: Path) -> Path:
    try:
        Catalogue.parse(path.read_bytes())
    except OSError as unreadable:
        raise ValueError(f"the file cannot be read ({unreadable.strerror})") from None
    return path


def _qa_file(path: Path) -> Path:
    try:
        parse_questions(path.read_bytes())
    except OSError as unreadable:
        raise ValueError(f"the file cannot be read ({unreadable.strerror})") from None
    return path


def _agent(name: str | None) -> str | None:
    if name is not None:
        _find_agent(name)
    return name


def _find_agent(name: str) -> Callable[[], object]:
    """Find what gives a factory of agents. Raises `ValueError`."""
    if not re.fullmatch(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*:[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError("package.module:factory, such as my_agent.assistant:make_factory")
    module = name.partition(":")[0]
    try:
        found = pkgutil.resolve_name(name)
    except ImportError as missing:
        lost = missing.name or module
        raise ValueError(f"{module} cannot be imported ({lost} is not there, or unfit)") from None
    except AttributeError:
        raise ValueError(f"{name} is not there: the module has no such name") from None
    except Exception as failure:  # noqa: BLE001 - it runs whatever the module does
        kind = type(failure).__name__
        raise ValueError(f"{module} cannot be imported (it raises {kind})") from None
    if not callable(found):
        raise ValueError(f"{name} cannot be called")  # noqa: TRY004 - as settings do
    return found  # type: ignore[no-any-return] # what it gives is looked at


@cache
def _make_agent_factory(name: str) -> AgentFactory:
    """Have a factory of agents made, once in a process. Raises `ValueError`."""
    find = _find_agent(name)
    try:
        factory: Any = find()
    except Exception as failure:  # noqa: BLE001 - nobody knows what it may raise
        raise ValueError(f"{name} gives no factory (it raises {type(failure).__name__})") from None
    if not callable(getattr(factory, "make", None)):
        reason = "what it gives has no method make"
        raise ValueError(f"{name} gives no factory: {reason}")  # noqa: TRY004 - as settings do
    return factory  # type: ignore[no-any-return] # as far as that can be told


def _api_keys(text: SecretStr | None) -> SecretStr | None:
    if text is not None:
        parse_api_keys(text.get_secret_value())
    return text


def _api_keys_file(path: Path | None) -> Path | None:
    if path is not None:
        _read_api_keys(path)
    return path


def _read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    try:
        text = path.read_bytes().decode()
    except OSError as unreadable:
        raise ValueError(f"the file cannot be read ({unreadable.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8") from None
    return parse_api_keys(text)


def _jwt_key(key: SecretStr | None) -> SecretStr | None:
    if key is not None:
        parse_jwt_key(key.get_secret_value(), ALGORITHMS)
    return key


def _algorithms(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _jwks_url(url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or "@" in parts.netloc or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise ValueError(
            "a URL such as https://id.example.com/.well-known/jwks.json, without a user or password"
        )
    return url


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _rules(value: object) -> object:
    return parse_expiry_rules(value) if isinstance(value, str) else value


def _limit(value: object) -> object:
    return parse_limit(value.strip()) if isinstance(value, str) else value


Ceiling = Annotated[Limit | None, NoDecode, BeforeValidator(_limit)]


class SettingsError(ValueError):
    """The environment cannot be used; the message is one line naming every variable at fault."""


class Settings(BaseSettings):
    """The settings, with the defaults that suit a developer's machine."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    # Where the store is.
    redis_url: Annotated[SecretStr | None, AfterValidator(_store_url)] = Field(
        None, validation_alias="REDIS_URL"
    )
    redis_host: Annotated[str | None, AfterValidator(_host)] = Field(
        None, validation_alias="REDIS_HOST"
    )
    redis_port: Annotated[int, BeforeValidator(_port)] = Field(
        6379, validation_alias="REDIS_PORT", ge=1, le=65535
    )
    redis_db: int = Field(0, validation_alias="REDIS_DB", ge=0)
    upstash_redis_url: SecretStr | None = Field(None, validation_alias="UPSTASH_REDIS_URL")
    upstash_redis_token: SecretStr | None = Field(None, validation_alias="UPSTASH_REDIS_TOKEN")
    data_dir: Path = Path(".data")
    key_hash_tag: Literal["auto", "on", "off"] = "auto"
    durability: Literal["local", "replicated"] = "local"

    # How the process serves.
    environment: Literal["development", "production"] = Field(
        "development", validation_alias="ENVIRONMENT"
    )
    host: str = Field("127.0.0.1", validation_alias="HOST", min_length=1)
    port: int = Field(8000, validation_alias="PORT", ge=0, le=65535)
    web_concurrency: int = Field(1, validation_alias="WEB_CONCURRENCY", ge=1, le=256)
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(str.lower)
    ] = Field("info", validation_alias="LOG_LEVEL")
    log_format: Literal["json", "console"] | None = None
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)] = ()
    drain_s: float = Field(5.0, ge=0, le=3600)

    # Who may do what, and how they show who they are.
    auth: Literal["off", "on"] = "off"
    api_keys: Annotated[SecretStr | None, AfterValidator(_api_keys)] = None
    api_keys_file: Annotated[Path | None, AfterValidator(_api_keys_file)] = None
    jwt_key: Annotated[SecretStr | None, AfterValidator(_jwt_key)] = None
    jwt_jwks_url: Annotated[str | None, AfterValidator(_jwks_url)] = None
    jwt_algorithms: Annotated[tuple[Algorithm, ...], NoDecode, BeforeValidator(_algorithms)] = (
        *("RS256", "ES256", "EdDSA"),
    )
    jwt_issuer: str | None = None
    jwt_audience: str | None = None

    # What a session is.
    session_ttl_s: Life = Field(
        604_800, validation_alias=AliasChoices(PREFIX + "SESSION_TTL_S", "SESSION_TTL")
    )
    draft_ttl_s: Life = 86_400
    steps_file: Annotated[Path, AfterValidator(_steps_file)] = _PACKAGED_STEPS
    finalize_requires: Literal["none", "required", "all"] = "none"
    max_step_bytes: int = Field(256 * 1024, ge=1)
    max_upload_bytes: int = Field(10 * 1024 * 1024, ge=1)
    max_result_bytes: int = Field(32 * 1024 * 1024, ge=1)

    # Which tasks are tracked, beside and instead of the packaged types.
    task_types: Annotated[dict[str, TaskRule], NoDecode, BeforeValidator(parse_task_rules)] = {}

    # How many sessions there may be, and what ends one before its lifetime does.
    max_sessions: int = Field(0, ge=0, le=MOST_SESSIONS)
    capacity_policy: CapacityPolicy = "refuse"
    expiry_rules: Annotated[tuple[ExpiryRule, ...], NoDecode, BeforeValidator(_rules)] = ()
    cleanup_interval_s: float = Field(3600.0, ge=SHORTEST_INTERVAL_S, le=LONGEST_INTERVAL_S)

    # Who may follow a session live.
    max_streams: int = Field(5000, ge=1)
    max_streams_per_session: int = Field(16, ge=1)

    # Who answers questions, and how many at a time.
    agent: Annotated[str | None, AfterValidator(_agent)] = None
    qa_file: Annotated[Path, AfterValidator(_qa_file)] = _PACKAGED_QUESTIONS
    max_concurrent_asks: int = Field(10, ge=1, le=10_000)
    asks_per_second: int = Field(50, ge=1, le=MOST_ASKS)

    # How much is served at once, and how much a caller may ask for.
    max_in_flight: int = Field(256, ge=1)
    rate_limit: Ceiling = Limit(600, 60)
    create_limit: Ceiling = Limit(60, 60)
    miss_limit: Ceiling = Limit(60, 60)

    # How long is waited, and how often tried.
    redis_timeout_s: float = Field(1.0, gt=0, le=60)
    retry_attempts: int = Field(4, ge=1, le=20)
    retry_base_s: float = Field(1.0, ge=0, le=60)
    retry_jitter_s: float = Field(0.5, ge=0, le=60)
    request_deadline_s: float = Field(15.0, gt=0, le=600)

    @cached_property
    def store_address(self) -> StoreAddress | None:
        """Where the configured store is; None stands for the embedded one."""
        if self.redis_url:
            return parse_store_url(self.redis_url.get_secret_value())
        if self.redis_host:
            return StoreAddress(
                mode="standalone", nodes=((self.redis_host, self.redis_port),), db=self.redis_db
            )
        if self.upstash_redis_url and self.upstash_redis_token:
            return upstash_address(
                self.upstash_redis_url.get_secret_value(),
                self.upstash_redis_token.get_secret_value(),
            )
        return None

    @cached_property
    def catalogue(self) -> Catalogue:
        """The catalogue that new sessions begin with."""
        return Catalogue.parse(self.steps_file.read_bytes())

    @cached_property
    def questions(self) -> tuple[QuestionEntry, ...]:
        """The questions and answers that the built-in agent knows beside the help texts."""
        return parse_questions(self.qa_file.read_bytes())

    @cached_property
    def known_api_keys(self) -> tuple[ApiKey, ...]:
        """The keys of machines, of which any may be sent."""
        if self.api_keys_file is not None:
            return _read_api_keys(self.api_keys_file)
        return () if self.api_keys is None else parse_api_keys(self.api_keys.get_secret_value())

    def load_agent_factory(self) -> AgentFactory | None:
        """Give what makes agents, made once in a process; None stands for the built-in one.

        Raises `SettingsError` when what the deployer named gives none.
        """
        try:
            return None if self.agent is None else _make_agent_factory(self.agent)
        except ValueError as unfit:
            raise SettingsError(f"{PREFIX}AGENT: {unfit}") from None

    @property
    def task_rules(self) -> Rules:
        """What is kept of tasks, by their types: the packaged ones and those of the deployer."""
        return {**TASK_RULES, **self.task_types}

    @property
    def capacity(self) -> Capacity:
        """How many sessions there may be."""
        return Capacity(self.max_sessions, self.capacity_policy)

    @property
    def hash_tag(self) -> bool:
        """Whether the id of a session stands in braces in its keys."""
        if self.key_hash_tag == "auto":
            return self.store_address is not None and self.store_address.mode == "cluster"
        return self.key_hash_tag == "on"

    def find_faults(self, wrong: set[str]) -> Iterator[str]:
        """Find what is at fault with several variables together.

        `wrong` are the fields that are so by themselves: what follows from one of them is no fault
        of its own.
        """
        if not any("redis" in name for name in wrong):
            yield from self._find_faults_of_store()
        if self.agent is None and not is_search_there():
            yield (
                f"{PREFIX}AGENT: the built-in agent needs SQLite with FTS5, which this Python has"
                " not; name an agent of your own"
            )
        if "jwt_algorithms" not in wrong:
            yield from self._find_faults_of_tokens()
        yield from self._find_faults_of_access(wrong)

    def _find_faults_of_store(self) -> Iterator[str]:
        upstash = (self.upstash_redis_url, self.upstash_redis_token)
        if not self.redis_url and not self.redis_host and any(upstash) and not all(upstash):
            yield "UPSTASH_REDIS_URL, UPSTASH_REDIS_TOKEN: set both or neither"
            return
        try:
            address = self.store_address
        except ValueError as unfit:
            yield f"UPSTASH_REDIS_URL, UPSTASH_REDIS_TOKEN: {unfit}"
            return
        if address is None and self.environment == "production":
            known = "REDIS_URL, or UPSTASH_REDIS_URL and UPSTASH_REDIS_TOKEN"
            yield f"ENVIRONMENT: production needs a Redis of its own; set {known}"
        if address is None and self.durability == "replicated":
            yield f"{PREFIX}DURABILITY: the embedded store has no replica; set REDIS_URL or local"
        if address is not None and address.mode == "cluster" and self.key_hash_tag == "off":
            yield f"{PREFIX}KEY_HASH_TAG: off cannot work on a Cluster; use auto or on"

    def _find_faults_of_tokens(self) -> Iterator[str]:
        if self.jwt_key and self.jwt_jwks_url:
            yield f"{PREFIX}JWT_KEY, {PREFIX}JWT_JWKS_URL: set one of them"
        if self.jwt_key:
            try:
                parse_jwt_key(self.jwt_key.get_secret_value(), self.jwt_algorithms)
            except ValueError as unfit:
                yield f"{PREFIX}JWT_KEY: {unfit}"
        if self.jwt_jwks_url:
            url = urlsplit(self.jwt_jwks_url)
            is_here = self.environment == "development" or _is_loopback(url.hostname)
            if url.scheme == "http" and not is_here:
                yield f"{PREFIX}JWT_JWKS_URL: use https; http is for development and this machine"
            if all(name.startswith("HS") for name in self.jwt_algorithms):
                yield f"{PREFIX}JWT_ALGORITHMS: HS256 and its kin are for secrets, never published"

    def _find_faults_of_access(self, wrong: set[str]) -> Iterator[str]:
        if self.api_keys and self.api_keys_file:
            yield f"{PREFIX}API_KEYS, {PREFIX}API_KEYS_FILE: set one of them"
        ways = {"api_keys", "api_keys_file", "jwt_key", "jwt_jwks_url"}
        is_way_in = self.known_api_keys or self.jwt_key or self.jwt_jwks_url
        if self.auth == "on" and not is_way_in and not ways & wrong:
            names = ", ".join(variable_of(name) for name in sorted(ways))
            yield f"{PREFIX}AUTH: on lets nobody in without a key; set one of {names}"
        if self.environment == "production" and self.auth == "off" and "auth" not in wrong:
            yield f"{PREFIX}AUTH: production refuses off, with which everybody may do everything"


def load_settings(**overrides: Any) -> Settings:
    """Read the environment. Raises `SettingsError` with one line naming every variable at fault."""
    faults: list[str] = []
    wrong: set[str] = set()
    try:
        settings = Settings(**overrides)
    except ValidationError as unfit:
        found = unfit.errors(include_url=False, include_input=False)
        faults = [_describe(fault["loc"], fault["msg"]) for fault in found]
        wrong = {_field_of(str(fault["loc"][0])) for fault in found}
    if wrong:
        # For a look at several together, the defaults stand in the place of those.
        defaults = {name: Settings.model_fields[name].default for name in wrong}
        settings = Settings(**{**overrides, **defaults})
    faults += settings.find_faults(wrong)
    if faults:
        raise SettingsError("; ".join(faults))
    return settings


def variable_of(field: str) -> str:
    """Name the variable that sets a field of `Settings`."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return str(alias or PREFIX + field.upper())


def unknown_variables() -> list[str]:
    """List the variables with our prefix that nothing reads, such as misspelled ones."""
    known = {variable_of(field) for field in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def _describe(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    name = _field_of(str(location[0]))
    variable = variable_of(name)
    if name == "session_ttl_s" and variable not in os.environ and "SESSION_TTL" in os.environ:
        variable = "SESSION_TTL"
    return f"{variable}: {' '.join(message.split())}"


def _field_of(location: str) -> str:
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        aliases = alias.choices if isinstance(alias, AliasChoices) else [alias]
        if location == name or location in aliases:
            return name
    raise LookupError(location)
