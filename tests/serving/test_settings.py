from dataclasses import fields

import pytest

from serving import settings
from serving.settings import Settings
from zoo.errors import BadInput


def test_the_environment_sets_fields_by_their_type() -> None:
    read = Settings.from_environment(
        {
            "MANYGATES_SERVE_THREADS": "3",
            "MANYGATES_SERVE_DRAIN_DELAY": "2.5",
            "MANYGATES_SERVE_ALLOW_SPINNING": "true",
            "MANYGATES_DATA": "/somewhere",
        }
    )
    assert read == Settings(threads=3, drain_delay=2.5, allow_spinning=True)
    assert Settings.from_environment({}) == Settings()


def test_threads_never_outnumber_the_cores_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.settings.usable_cores", lambda: 8)
    assert Settings().workers == 8
    assert Settings(intra_op=3).workers == 2
    assert Settings(intra_op=16).workers == 1
    assert Settings(threads=5, intra_op=16).workers == 5
    assert Settings(device="cuda").workers == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MANYGATES_SERVE_TREADS": "3"}, "MANYGATES_SERVE_TREADS is no setting; known: MANYGATES_SERVE_THREADS"),
        ({"MANYGATES_SERVE_THREADS": "two"}, "THREADS is 'two', expected a number"),
        ({"MANYGATES_SERVE_ALLOW_SPINNING": "yes"}, "is 'yes', expected true or false"),
        ({"MANYGATES_SERVE_MAX_BATCH": "0"}, "max_batch is 0, expected 1 to 65536"),
        ({"MANYGATES_SERVE_THREADS": "-1"}, "threads is -1, expected 0 to 1024"),
        ({"MANYGATES_SERVE_QUEUE_TIMEOUT": "0"}, "queue_timeout is 0.0, expected 0.001 to 86400"),
        ({"MANYGATES_SERVE_QUEUE_TIMEOUT": "nan"}, "queue_timeout is nan"),
        ({"MANYGATES_SERVE_DRAIN_DELAY": "nan"}, "drain_delay is nan, expected 0 to 86400"),
        ({"MANYGATES_SERVE_DRAIN_TIMEOUT": "inf"}, "drain_timeout is inf"),
        ({"MANYGATES_SERVE_KEEP_ALIVE_TIMEOUT": "inf"}, "keep_alive_timeout is inf"),
        ({"MANYGATES_SERVE_BODY_TIMEOUT": "1e300"}, "body_timeout is 1e+300"),
        ({"MANYGATES_SERVE_HEADER_TIMEOUT": "-inf"}, "header_timeout is -inf"),
        ({"MANYGATES_SERVE_THREADS": "9" * 30}, "expected 0 to 1024"),
        ({"MANYGATES_SERVE_MAX_BODY_BYTES": "2000000000"}, "max_total_body_bytes is 1073741824, expected at least"),
        ({"MANYGATES_SERVE_PORT": "8000"}, "MANYGATES_SERVE_PORT is no setting"),
        ({"MANYGATES_SERVE_SERVICE": "x"}, "MANYGATES_SERVE_SERVICE is no setting"),
        ({"MANYGATES_SERVE_DEVICE": "tpu"}, "device is 'tpu', expected cpu or cuda"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Settings.from_environment(environment)
    assert said in str(refusal.value)


def test_the_links_of_a_kubernetes_service_of_the_same_prefix_are_no_settings() -> None:
    for service in ("", "CANARY_2_"):
        links = {
            "SERVICE_HOST": "10.0.0.7",
            "SERVICE_PORT": "8000",
            "SERVICE_PORT_HTTP": "8000",
            "PORT": "tcp://10.0.0.7:8000",
            "PORT_8000_TCP": "tcp://10.0.0.7:8000",
            "PORT_8000_TCP_PROTO": "tcp",
            "PORT_8000_TCP_PORT": "8000",
            "PORT_8000_TCP_ADDR": "10.0.0.7",
        }
        environment = {f"MANYGATES_SERVE_{service}{name}": value for name, value in links.items()}
        assert Settings.from_environment({**environment, "MANYGATES_SERVE_THREADS": "3"}) == Settings(threads=3)


def test_every_number_among_the_settings_has_a_range() -> None:
    numbers = {field.name for field in fields(Settings) if type(field.default) in (int, float)}
    assert numbers == settings._RANGES.keys()
