"""The same application as a Ray Serve deployment: replicas on several machines, autoscaling, rolling updates.

    serve run serving.ray_app:app
    serve run serving.ray_app:app models=NAME mode=random
    serve deploy deploy/ray.yaml

Settings come from the arguments, then the environment, then its settings file, as everywhere; they are read where the
application is built. Ray itself decides on which address it listens, TLS, how many replicas there are and where.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from serving.operations.settings import Settings
from zoo.errors import BadInput

# Enough requests in a replica to fill its batches while the next ones are on their way; more would wait in it rather
# than go to another one. Ray starts a further replica where on average more than half of that is going on.
_ONGOING = 64
_MOST_REPLICAS = 8

# What would not work, or would not mean what it says, where Ray stands between the clients and several replicas.
_RAYS_OWN = {
    "grpc_port": "replicas on one machine cannot share a port; clients of Ray speak HTTP here",
    "tls_certificate": "Ray's proxy takes the connections, so give it to Ray (ssl_certfile in its http_options)",
    "tls_client_ca": "Ray's proxy takes the connections, so give it to Ray (ssl_ca_certs in its http_options)",
    "allow_repository_changes": "a client's change would reach one replica of several; deploy again instead",
    "demo": "its sessions live in one process; use `manygates demo`",
}


def app(arguments: Mapping[str, Any]) -> Any:
    """Return the Ray Serve application; its replicas load their models when Ray starts them.

    Args:
        arguments: setting -> value, as `serve run` and the `args` of a Ray Serve config file give them.

    Raises:
        BadInput: if Ray is missing, or a setting makes no sense, here or at all.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise BadInput(f"this needs {error.name!r}; install it with `pip install 'manygates[ray]'`") from error
    settings = replica_settings(Settings.resolve(arguments))

    def application() -> Any:
        """Load the models; called once in each replica."""
        from ray import get_runtime_context

        from serving.server import build

        return build(with_cores(settings, get_runtime_context().get_assigned_resources().get("CPU", 0)))

    class Replica:
        """One process that serves all models of the settings."""

        def check_health(self) -> None:
            """Tell Ray whether to keep this replica: it asks every few seconds, and replaces one that fails thrice."""
            if not self.app.service.healthy:  # type: ignore[attr-defined]  # what `application` returned; Ray puts it there
                raise RuntimeError("a model of this replica takes no requests")

    deployment = serve.deployment(
        serve.ingress(application)(Replica),
        name="manygates",
        max_ongoing_requests=_ONGOING,
        max_queued_requests=settings.max_queue,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": _MOST_REPLICAS,
            "target_ongoing_requests": _ONGOING // 2,
        },
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.device == "cuda" else 0},
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_timeout + 5,
    )
    return deployment.bind()


def replica_settings(settings: Settings) -> Settings:
    """Return a replica's settings, with the bundled models if none is named; BadInput for what Ray rules out."""
    defaults = Settings()
    for name, reason in _RAYS_OWN.items():
        if getattr(settings, name) != getattr(defaults, name):
            raise BadInput(f"{name} is {getattr(settings, name)!r}, which a Ray Serve deployment has not: {reason}")
    if settings.model_settings or settings.model_repository:
        return settings
    from zoo.hub.source import list_bundled
    from zoo.vocabulary import VARIANT_OF_MODE

    variant = VARIANT_OF_MODE[settings.mode or "single"]
    models = tuple(card.name for card in list_bundled() if variant in card.variants)
    if not models:
        raise BadInput(f"no bundled model has the variant {variant!r}; name one: models=NAME")
    return dataclasses.replace(settings, models=models)


def with_cores(settings: Settings, cores: float) -> Settings:
    """Let a replica use the processor cores that Ray reserved for it, unless the settings say how many.

    Several replicas share a machine, and each would take all of its cores otherwise.
    """
    if settings.threads or settings.device == "cuda" or cores < 1:
        return settings
    return dataclasses.replace(settings, threads=max(1, int(cores) // settings.intra_op))
