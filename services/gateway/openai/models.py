"""/v1/models: which model this gateway serves."""

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.api import ApiContext, check_model
from services.gateway.openai.job import Json


class Models:
    """The list of the one model served, and that model by its name."""

    def __init__(self, api: ApiContext) -> None:
        self._api = api

    async def list(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def get(self, request: Request) -> Response:
        check_model(self._api, request.path_params["model"])
        return _json(self._model())

    def _model(self) -> Json:
        return {
            "id": self._api.served_model_name,
            "object": "model",
            "created": self._api.created_at,
            "owned_by": "pdserve",
            "max_model_len": self._api.core.max_model_len(),
        }


def _json(content: Json) -> Response:
    return Response(to_json(content), media_type="application/json")
