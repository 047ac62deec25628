"""`python -m services.controller`."""

from services.controller.service import serve
from shared.process import run_service
from shared.settings import ControllerSettings

if __name__ == "__main__":
    run_service(ControllerSettings, serve)
