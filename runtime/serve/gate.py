"""The deployment that clients reach: the application, and the end of admission."""

from __future__ import annotations

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from cspd.runtime.serve.app import make_app
from cspd.runtime.serve.models import Settings
from cspd.runtime.serve.service import Service


class Gate:
    """Checks, admits and counts requests, and passes them to the engines behind `engine`."""

    def __init__(self, settings: Settings, engine: DeploymentHandle) -> None:
        self.settings, self.service = settings, Service(settings, engine)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, when Ray Serve asks for it."""
        return make_app(self.settings, self.service)

    def close(self) -> int:
        """Admit nothing more; the number of images that are admitted and not finished."""
        self.service.admission.closed = True
        return self.service.admission.images
