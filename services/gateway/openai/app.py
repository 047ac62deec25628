"""The HTTP API as one ASGI application."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.api import ApiContext
from services.gateway.openai.chat import prepare_chat
from services.gateway.openai.completions import prepare_completions
from services.gateway.openai.edge import Edge
from services.gateway.openai.endpoint import Endpoint
from services.gateway.openai.health import Health
from services.gateway.openai.models import Models
from shared.errors import MethodNotAllowed, PathNotFound


def create_app(api: ApiContext) -> Starlette:
    """The application; serve it with uvicorn's own `server` header off."""
    models = Models(api)
    health = Health(api)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", Endpoint(api, prepare_chat), methods=["POST"]),
            Route("/v1/completions", Endpoint(api, prepare_completions), methods=["POST"]),
            Route("/v1/models", models.list),
            Route("/v1/models/{model:path}", models.get),
            Route("/health/live", health.live),
            Route("/health/ready", health.ready),
            Route("/metrics", health.metrics),
        ],
        middleware=[Middleware(Edge, api=api)],
        exception_handlers={HTTPException: _refuse},
    )
    app.router.redirect_slashes = False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, of a path or a method, as errors of this API."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        raise MethodNotAllowed(f"{request.url.path} does not take {request.method}: use {allowed}.")
    raise PathNotFound(f"There is no {request.url.path} here: see /v1/models, /health/ready, /metrics.")
