"""Health over HTTP: for balancers, orchestrators and people."""

from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Handler, Operation
from app.onboarding.access import Access
from app.services.health import HealthReport


async def get_liveness(call: Call) -> ASGIApp:
    """Say that the process runs; touches nothing."""
    return call.answer({"status": "alive"})


async def get_health(call: Call) -> ASGIApp:
    """Say whether reads and writes work."""
    report = call.services.health.report()
    return call.answer(report, 200 if report["status"] == "ok" else 503)


async def get_readiness(call: Call) -> ASGIApp:
    """Say whether requests should come here: also while only reads work."""
    report = call.services.health.report()
    return call.answer(report, 200 if report["status"] in {"ok", "degraded"} else 503)


def _probe(path: str, name: str, summary: str, handler: Handler) -> Operation:
    return Operation(
        methods=["GET"],
        path=path,
        handler=handler,
        name=name,
        access=Access.PUBLIC,
        summary=summary,
        tag="Health",
        quiet=True,
        at_once="own",
        answers=[
            Answer(description="It is well", schema=HealthReport),
            Answer(status=503, description="It is not; `reason` says why", schema=HealthReport),
        ],
    )


OPERATIONS = [
    Operation(
        methods=["GET"],
        path="/livez",
        handler=get_liveness,
        name="get_liveness",
        access=Access.PUBLIC,
        summary="Say that the process runs; touches nothing",
        tag="Health",
        quiet=True,
        at_once="own",
        answers=[
            Answer(
                description="It runs",
                schema={
                    "type": "object",
                    "required": ["status"],
                    "properties": {"status": {"const": "alive"}},
                },
            )
        ],
    ),
    _probe("/health", "get_health", "Say whether reads and writes work", get_health),
    _probe("/healthz", "get_healthz", "The same as /health", get_health),
    _probe("/readyz", "get_readiness", "Say whether requests should come here", get_readiness),
]
