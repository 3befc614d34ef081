"""Start the service: `python -m app`.

One process serves by itself; with `WEB_CONCURRENCY` this one only watches over others. In both
cases it is the one that starts the embedded store, before, and ends it, after everything else.
"""

import signal
import sys
from contextlib import ExitStack

import structlog
import uvicorn
from uvicorn.supervisors import Multiprocess

from app import __version__
from app.logs import configure_logging
from app.settings import Settings, SettingsError, load_settings, unknown_variables
from app.store.embedded import EmbeddedStore, EmbeddedStoreError

log = structlog.get_logger()

REFUSED = 2
"""Exit status when the environment cannot be used, or the data directory belongs to another."""

GRACE_S = 10
"""How long requests in flight may go on after the drain, in seconds."""


def main() -> int:
    """Serve until told to stop, and return the exit status."""
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        _warn(settings)
        with ExitStack() as stack:
            if settings.store_address is None:
                store = EmbeddedStore.start(settings.data_dir)
                stack.callback(store.stop)
            _serve(settings)
    except (SettingsError, EmbeddedStoreError) as refused:
        print(f"onboarding-sessions cannot start: {refused}", file=sys.stderr)  # noqa: T201
        return REFUSED
    return 0


def _serve(settings: Settings) -> None:
    # When it is done, uvicorn sends itself the signal that ended it. By default that would end
    # this process before the store is stopped.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        "app.main:create_app_from_environment",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.web_concurrency,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    with config.bind_socket() as listener:
        host, port = listener.getsockname()[:2]
        workers = settings.web_concurrency
        log.info("service_started", version=__version__, host=host, port=port, workers=workers)
        if workers == 1:
            uvicorn.Server(config).run(sockets=[listener])
        else:
            Multiprocess(config, sockets=[listener]).run()
    log.info("service_stopped")


def _warn(settings: Settings) -> None:
    unknown = unknown_variables()
    if unknown:
        log.warning("unknown_variables_ignored", variables=unknown)
    if settings.environment == "production" and settings.auth == "off":
        log.warning("access_not_checked", variable="ONBOARDING_AUTH")


if __name__ == "__main__":
    sys.exit(main())
