"""Start the service: `python -m app`.

One process serves by itself; with `WEB_CONCURRENCY` this one only watches over others. In both
cases it is the one that starts the embedded store, before, and ends it, after everything else.
"""

import signal
import sys
from contextlib import ExitStack

import structlog

from app import __version__
from app.logs import configure_logging
from app.server import CannotListenError, listen, serve
from app.settings import SettingsError, load_settings, unknown_variables
from app.store.embedded import EmbeddedStore, EmbeddedStoreError

log = structlog.get_logger()

REFUSED = 2
"""Exit status when the environment cannot be used: a bad value, a data directory or port in use."""


def main() -> int:
    """Serve until told to stop, and return the exit status."""
    # Until the server takes the signals: end in order, the store last.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        unknown = unknown_variables()
        if unknown:
            log.warning("unknown_variables_ignored", variables=unknown)
        # A bad one is told in one line here, and not by every worker.
        settings.load_agent_factory()
        with ExitStack() as stack:
            if settings.store_address is None:
                store = EmbeddedStore.start(settings.data_dir)
                stack.callback(store.stop)
            listener = stack.enter_context(listen(settings.host, settings.port))
            host, port = listener.getsockname()[:2]
            workers = settings.web_concurrency
            log.info("service_started", version=__version__, host=host, port=port, workers=workers)
            status = serve("app.main:create_app_from_environment", listener, workers)
            log.info("service_stopped", status=status)
            return status
    except (SettingsError, EmbeddedStoreError, CannotListenError) as refused:
        print(f"onboarding-sessions cannot start: {refused}", file=sys.stderr)  # noqa: T201
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
