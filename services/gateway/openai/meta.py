"""What is not a generation: the served model, health and metrics."""

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.api import ApiContext, check_model


class Meta:
    """/v1/models, /health and /metrics."""

    def __init__(self, api: ApiContext) -> None:
        self._api = api

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/metrics", self.metrics),
        ]

    async def models(self, request: Request) -> Response:
        """Lists the one model that is served."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describes a model by its name."""
        check_model(self._api, request.path_params["model"])
        return _json(self._model())

    async def live(self, request: Request) -> Response:
        """Responds with 200 as long as the process responds at all."""
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Responds with 200 if requests can be served now, else with 503 and the reason."""
        reason = self._api.core.not_ready()
        if reason is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": reason}, status_code=503)

    async def metrics(self, request: Request) -> Response:
        """Responds with all metrics."""
        return Response(self._api.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    def _model(self) -> dict[str, object]:
        return {
            "id": self._api.served_model_name,
            "object": "model",
            "created": self._api.created_at,
            "owned_by": "pdserve",
            "max_model_len": self._api.core.max_model_len(),
        }


def _json(content: dict[str, object], status_code: int = 200) -> Response:
    return Response(to_json(content), status_code=status_code, media_type="application/json")
