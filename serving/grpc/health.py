"""gRPC's own health protocol, by the library's own servicer, which is told here what the statuses are."""

from typing import Any, Final

from grpc_health.v1 import health, health_pb2

from serving.errors import RequestError, shown
from serving.protocol.messages import SERVICE
from serving.scheduling.administration import Administration
from serving.scheduling.service import Service

HEALTH_SERVICE: Final = health.SERVICE_NAME

_STATUSES: Final = health_pb2.HealthCheckResponse


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Knows the server (an empty name), the protocol's service and every model of the index."""

    def __init__(self, service: Service, administration: Administration) -> None:
        super().__init__()
        self._service = service
        self._administration = administration
        self._told: dict[str, int] = {}

    async def check(self, request: Any, context: Any) -> Any:
        """Answer a `HealthCheckRequest` with what is so now; 404 for a name that there is not."""
        await self.refresh()
        name = request.service
        if self._told.get(name, _STATUSES.SERVICE_UNKNOWN) == _STATUSES.SERVICE_UNKNOWN:
            raise RequestError(404, "unknown_service", f"no service and no model has the name {shown(name)}")
        return await self.Check(request, context)

    async def refresh(self) -> None:
        """Tell the servicer, and so whoever watches, of what has changed."""
        names = {*self._service.names, *(entry["name"] for entry in self._administration.index())}
        ready = {name: self._service.is_ready(name) for name in names}
        ready |= dict.fromkeys(("", SERVICE), self._service.ready)
        statuses = {name: _STATUSES.SERVING if each else _STATUSES.NOT_SERVING for name, each in ready.items()}
        gone = dict.fromkeys(self._told.keys() - statuses.keys(), _STATUSES.SERVICE_UNKNOWN)
        for name, status in (statuses | gone).items():
            if self._told.get(name) != status:
                self._told[name] = status
                await self.set(name, status)
