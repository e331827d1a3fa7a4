import pytest

from serving.settings import Settings
from zoo.errors import BadInput


def test_the_environment_sets_fields_by_their_type() -> None:
    settings = Settings.from_environment(
        {
            "MANYGATES_SERVE_THREADS": "3",
            "MANYGATES_SERVE_DRAIN_DELAY": "2.5",
            "MANYGATES_SERVE_ALLOW_SPINNING": "true",
            "MANYGATES_DATA": "/somewhere",
        }
    )
    assert settings == Settings(threads=3, drain_delay=2.5, allow_spinning=True)
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
        ({"MANYGATES_SERVE_MAX_BATCH": "0"}, "max_batch is 0, expected at least 1"),
        ({"MANYGATES_SERVE_THREADS": "-1"}, "threads is -1, expected 0 or more"),
        ({"MANYGATES_SERVE_QUEUE_TIMEOUT": "0"}, "queue_timeout is 0.0, expected seconds above 0"),
        ({"MANYGATES_SERVE_QUEUE_TIMEOUT": "nan"}, "queue_timeout is nan"),
        ({"MANYGATES_SERVE_DEVICE": "tpu"}, "device is 'tpu', expected cpu or cuda"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Settings.from_environment(environment)
    assert said in str(refusal.value)
