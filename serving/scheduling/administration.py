"""What clients may see and change of the models that are served, on every protocol."""

from serving.errors import RequestError, bad_request
from serving.scheduling.repository import Repository
from serving.scheduling.service import Service


class Administration:
    """The model repository extension: an index for everybody, changes where the operator allows them."""

    def __init__(self, service: Service, repository: Repository | None) -> None:
        """Prepare for the models of `service`; `repository` is where they come from, None if they stay as they are."""
        self._service = service
        self._repository = repository

    def index(self, *, only_ready: bool = False) -> list[dict[str, str]]:
        """Return what is served and, if there is a repository, what could be: name, version, state, reason."""
        if self._repository is not None:
            entries = self._repository.index()
        else:
            entries = [
                {"name": served.name, "version": served.version, "state": "READY", "reason": ""}
                for served in self._service.everything()
            ]
        return [entry for entry in entries if entry["state"] == "READY" or not only_ready]

    def check_changes(self) -> Repository:
        """Return the repository, if clients may load and unload models; 403 if they may not."""
        if self._repository is None or not self._service.settings.allow_repository_changes:
            raise RequestError(
                403,
                "not_allowed",
                "this server loads and unloads nothing on request (the operator may allow it with "
                "MANYGATES_SERVE_ALLOW_REPOSITORY_CHANGES=true)",
            )
        return self._repository

    async def load(self, name: str, *, parameters: object = None) -> list[str]:
        """Load a model, again if it is served already; returns the versions that have gone from the repository.

        Raises:
            RequestError: 403 if clients may not, 400 if there are parameters, 404 for a model that there is not.
        """
        repository = self.check_changes()
        if parameters:
            raise bad_request("a model is loaded as the operator configured it; send no parameters")
        return await repository.load(self._service, name)

    async def unload(self, name: str) -> None:
        """Serve a model no longer, until it is loaded again; 403 if clients may not, 404 if it is not served."""
        await self.check_changes().unload(self._service, name)
