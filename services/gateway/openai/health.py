"""/health and /metrics: for those who watch over the gateway; they need no key."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from services.gateway.api import ApiContext


class Health:
    """Whether the process runs, whether it can serve, and how it has served."""

    def __init__(self, api: ApiContext) -> None:
        self._api = api

    async def live(self, request: Request) -> Response:
        """200 as long as the process answers at all."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """200 if requests can be served now, else 503 and the reason."""
        reason = self._api.core.not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._api.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})
