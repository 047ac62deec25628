"""`python -m services.gateway`."""

import uvloop

from services.gateway.service import serve
from shared.process import run_service
from shared.settings import GatewaySettings

if __name__ == "__main__":
    run_service(GatewaySettings, serve, loop_factory=uvloop.new_event_loop)
