import dataclasses
import re
import subprocess
import sys
from argparse import ArgumentParser
from math import inf
from pathlib import Path
from typing import Any

import pytest

import manygates
from serving.operations.fields import meaning_of
from serving.operations.settings import ModelSettings, Settings, setting_fields
from serving.operations.settings_help import add_flags, flags_in, markdown_table, to_toml, with_table
from serving.operations.sources import PREFIX, flag_of
from zoo.errors import BadInput

ROOT = Path(__file__).parents[3]
NAMES = list(setting_fields())
OTHER: dict[str, Any] = {
    "models": ("a", "local-dir:b c"),
    "model_repository": "shelf",
    "mode": "random",
    "draws": 4,
    "gate_scope": "batch",
    "precision": "int8",
    "confidence": (0.9, inf),
    "allow_mode_choice": True,
    "allow_exit_choice": True,
    "demo": True,
    "host": "0.0.0.0",
    "port": 1,
    "grpc_port": 0,
    "threads": 3,
    "intra_op": 2,
    "max_batch": 16,
    "bulk_images": 4,
    "device": "cuda",
    "allow_cpu_fallback": True,
    "allow_spinning": True,
    "max_queue": 7,
    "max_body_bytes": 1000,
    "max_image_pixels": 12_000_000,
    "max_total_body_bytes": 2000,
    "max_connections": 5,
    "queue_timeout": 1.5,
    "header_timeout": 2.5,
    "body_timeout": 3.5,
    "keep_alive_timeout": 4.5,
    "drain_delay": 5.5,
    "drain_timeout": 6.5,
    "reload_seconds": 7.5,
    "allow_repository_changes": True,
    "allow_empty": True,
    "api_keys_file": 'a "quoted" \\ file é',
    "admin_keys_file": "admin",
    "tls_certificate": "certificate",
    "tls_key": "key",
    "tls_client_ca": "authority",
    "cors_origins": ("https://example.org", "http://localhost:3000"),
    "log_format": "json",
    "log_level": "debug",
    "log_requests": True,
    "tracing": "otlp",
}
"""A value for each setting but `exit`, which excludes `confidence`, that is not its default."""


def as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(*words: str, environment: dict[str, str] | None = None, file: Path | None = None) -> Settings:
    parser = ArgumentParser()
    add_flags(parser)
    return Settings.resolve(flags_in(parser.parse_args(words)), environment or {}, file)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "serve.toml"
    file.write_text(text, encoding="utf-8")
    return file


# --- every setting is a flag, a variable, a key and a line of the docs ---


def test_the_examples_of_this_file_cover_every_setting() -> None:
    assert {*OTHER, "exit"} == set(NAMES)
    assert all(getattr(Settings(), name) != value for name, value in OTHER.items())


def test_every_setting_can_be_set_by_its_variable() -> None:
    environment = {PREFIX + name.upper(): as_text(value) for name, value in OTHER.items()}
    assert Settings.resolve({}, environment) == Settings(**OTHER)
    assert Settings.resolve({}, {"MANYGATES_SERVE_EXIT": "2", "MANYGATES_DATA": "/x"}) == Settings(exit=2)
    assert Settings.resolve({}, {}) == Settings()


def test_every_setting_can_be_set_by_its_flag() -> None:
    words = []
    for name, value in OTHER.items():
        if name == "models":
            words += list(value)
        elif isinstance(value, bool):
            words.append(flag_of(name))
        else:
            words += [flag_of(name), as_text(value)]
    assert command(*words) == Settings(**OTHER)
    assert command() == Settings()


def test_what_is_printed_gives_the_same_settings_again(tmp_path: Path) -> None:
    tables = (
        {"source": "a", "name": "a-4", "mode": "random", "draws": 4, "weight": 2.5, "precision": "fp32"},
        {"source": "a", "name": "a-1", "mode": "single", "exit": 1, "allow_mode_choice": False},
        {"source": "other", "confidence": [0.5, inf], "gate_scope": "image"},
    )
    for settings in (Settings(), Settings(exit=3), Settings(**OTHER), Settings(**OTHER, model_tables=tables)):
        printed = to_toml(settings)
        again = Settings.resolve({}, {}, written(tmp_path, printed))
        assert again == settings
        assert Settings.resolve({}, {}, written(tmp_path, to_toml(again))) == settings


def test_the_table_in_the_docs_is_current() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert with_table(page) == page, "run `python -m serving.operations.settings_help docs/serving.md`"
    assert all(f"| `{name}` |" in markdown_table() for name in NAMES)


def test_the_command_that_writes_the_table_leaves_a_current_page_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- settings: start -->\nold\n<!-- settings: end -->\nafter\n")
    subprocess.run([sys.executable, "-m", "serving.operations.settings_help", str(page)], cwd=ROOT, check=True)
    once = page.read_text(encoding="utf-8")
    assert once == f"before\n<!-- settings: start -->\n{markdown_table()}<!-- settings: end -->\nafter\n"
    assert with_table(once) == once
    with pytest.raises(BadInput, match="the page has no <!-- settings: start -->"):
        with_table("nothing")


def test_every_number_among_the_settings_has_a_range() -> None:
    for name, field in setting_fields().items():
        if type(field.default) in (int, float):
            lowest, highest = meaning_of(field).lowest, meaning_of(field).highest
            assert lowest is not None
            assert lowest <= field.default <= highest, name
            for wrong in (lowest - 1, highest + 1):
                with pytest.raises(
                    BadInput, match=f"{name} is {wrong}(.0)?, expected .*, {lowest:g} to {highest:.0f}$"
                ):
                    Settings(**{name: type(field.default)(wrong)})


# --- which value holds ---


def test_flags_go_before_the_environment_that_before_the_file_and_that_before_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "threads = 1\nmax_batch = 1\nport = 1\n")
    environment = {"MANYGATES_SERVE_MAX_BATCH": "2", "MANYGATES_SERVE_PORT": "2"}
    settings = command("--port", "3", environment=environment, file=file)
    assert (settings.threads, settings.max_batch, settings.port, settings.intra_op) == (1, 2, 3, 1)
    printed = to_toml(settings).splitlines()
    for line in (
        f"threads = 1  # file {file}",
        "max_batch = 2  # environment MANYGATES_SERVE_MAX_BATCH",
        "port = 3  # flag --port",
        "intra_op = 1  # default",
    ):
        assert line in printed
    assert "intra_op = 4  # given" in to_toml(dataclasses.replace(settings, intra_op=4))


def test_the_environment_may_name_the_file_and_a_flag_names_another(tmp_path: Path) -> None:
    (tmp_path / "named.toml").write_text("threads = 5")
    environment = {"MANYGATES_SERVE_CONFIG": str(tmp_path / "named.toml")}
    assert Settings.resolve({}, environment).threads == 5
    assert command(environment=environment, file=written(tmp_path, "threads = 6")).threads == 6
    assert Settings.resolve({}, {"MANYGATES_SERVE_CONFIG": ""}) == Settings()


def test_a_switch_of_the_file_can_be_turned_off_by_a_flag(tmp_path: Path) -> None:
    file = written(tmp_path, "demo = true\nallow_spinning = true\n")
    settings = command("--no-demo", file=file)
    assert (settings.demo, settings.allow_spinning) == (False, True)


def test_an_exit_by_flag_takes_the_place_of_the_files_confidence(tmp_path: Path) -> None:
    file = written(tmp_path, "confidence = 0.9\n")
    assert command("--exit", "1", file=file) == Settings(exit=1)
    assert command(file=file) == Settings(confidence=(0.9,))
    with pytest.raises(BadInput, match="were both given; leave one out"):
        command("--exit", "1", "--confidence", "0.9")


def test_models_of_the_command_are_all_that_is_served_and_the_file_says_how(tmp_path: Path) -> None:
    file = written(
        tmp_path, 'models = ["a", "b"]\n[[model]]\nsource = "b"\nmode = "ensemble"\n[[model]]\nsource = "c"\n'
    )
    served = [(model.source, model.mode) for model in command(file=file).model_settings]
    assert served == [("a", ""), ("b", "ensemble"), ("c", "")]
    served = [(model.source, model.mode) for model in command("d", "b", file=file).model_settings]
    assert served == [("d", ""), ("b", "ensemble")]
    by_variable = command(environment={"MANYGATES_SERVE_MODELS": "b"}, file=file)
    assert [(model.source, model.mode) for model in by_variable.model_settings] == [("b", "ensemble")]


# --- single models ---


def test_a_model_is_served_as_all_are_but_for_what_its_table_says(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        models = ["a"]
        mode = "random"
        draws = 3
        precision = "int8"
        [[model]]
        source = "b"
        name = "bee"
        mode = "ensemble"
        weight = 2
        precision = "fp32"
        """,
    )
    shared = ModelSettings(source="a", mode="random", draws=3, precision="int8")
    own = ModelSettings(source="b", name="bee", mode="ensemble", draws=3, weight=2.0)
    assert command(file=file).model_settings == (shared, own)


def test_one_bundle_can_be_served_twice_under_two_names(tmp_path: Path) -> None:
    text = '[[model]]\nsource = "a"\nname = "fixed"\n[[model]]\nsource = "a"\nname = "moving"\nmode = "random"\n'
    served = command(file=written(tmp_path, text)).model_settings
    assert [(model.source, model.name, model.mode) for model in served] == [
        ("a", "fixed", ""),
        ("a", "moving", "random"),
    ]


def test_the_exit_of_a_model_takes_the_place_of_the_confidence_of_all() -> None:
    tables = ({"source": "b", "exit": 2}, {"source": "c", "confidence": [0.5, 0.6]})
    a, b, c = Settings(models=("a",), confidence=(0.9,), model_tables=tables).model_settings
    assert [(m.exit, m.confidence) for m in (a, b, c)] == [(0, (0.9,)), (2, ()), (0, (0.5, 0.6))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[model]]\nmode = 'random'", "source is '', expected a model"),
        (
            "[[model]]\nsource = 'a'\nmodes = 'random'",
            "'a': modes is no setting; did you mean mode? known: ",
        ),
        ("[[model]]\nsource = 'a'\nmode = 'all'", "'a': mode is 'all', expected single, ensemble or random"),
        ("[[model]]\nsource = 'a'\ndraws = 2", "'a': draws is 2, but no mode is random"),
        ("[[model]]\nsource = 'a'\nweight = 0", "'a': weight is 0, expected"),
        ("[[model]]\nsource = 'a'\nweight = 'much'", "weight is 'much', expected a number"),
        ("[[model]]\nsource = 'a'\nname = '../b'", "name is '../b', expected up to 128 letters"),
        ("[[model]]\nsource = 'a'\n[[model]]\nsource = 'a'", "'a' is there twice; give each a name of its own"),
        (
            "[[model]]\nsource = 'a'\nname = 'x'\n[[model]]\nsource = 'b'\nname = 'x'",
            "the name 'x' is given to two models",
        ),
        ("model = 'a'", "model_tables is 'a', expected tables; write [[model]]"),
        ("[[model]]\nsource = 'a'\nexit = 1\nconfidence = 0.5", "exit 1 and confidence (0.5,) were both given"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Settings.resolve({}, {}, written(tmp_path, text))
    assert said in str(refusal.value)


# --- what is refused ---


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"TREADS": "3"},
            "MANYGATES_SERVE_TREADS is no setting; did you mean MANYGATES_SERVE_THREADS? known: MANYGATES_",
        ),
        ({"threads": "3"}, "MANYGATES_SERVE_threads is no setting; did you mean MANYGATES_SERVE_THREADS? known"),
        (
            {"THREADS": "two"},
            "threads is 'two', expected a whole number, 0 to 1024 (from environment MANYGATES_SERVE_THREADS)",
        ),
        ({"ALLOW_SPINNING": "yes"}, "is 'yes', expected true or false"),
        (
            {"MAX_BATCH": "0"},
            "max_batch is 0, expected a whole number, 1 to 65536 (from environment MANYGATES_SERVE_MAX_BATCH)",
        ),
        ({"THREADS": "-1"}, "threads is -1, expected"),
        ({"QUEUE_TIMEOUT": "0"}, "queue_timeout is 0.0, expected a number, 0.001 to 86400"),
        ({"QUEUE_TIMEOUT": "nan"}, "queue_timeout is nan"),
        ({"DRAIN_DELAY": "nan"}, "drain_delay is nan, expected"),
        ({"DRAIN_TIMEOUT": "inf"}, "drain_timeout is inf"),
        ({"BODY_TIMEOUT": "1e300"}, "body_timeout is 1e+300"),
        ({"HEADER_TIMEOUT": "-inf"}, "header_timeout is -inf"),
        ({"THREADS": "9" * 30}, "threads is 9999999999"),
        ({"MAX_BODY_BYTES": "2000000000"}, "max_total_body_bytes is 1073741824, expected at least"),
        ({"PORT": "80000"}, "port is 80000, expected"),
        ({"PORT": "9", "GRPC_PORT": "9"}, "port and grpc_port are both 9"),
        ({"HOST": ""}, "host is '', expected an address"),
        ({"SERVICE": "x"}, "MANYGATES_SERVE_SERVICE is no setting"),
        ({"DEVICE": "tpu"}, "device is 'tpu', expected cpu or cuda"),
        ({"MODE": "all"}, "mode is 'all', expected single, ensemble or random"),
        ({"PRECISION": "int4"}, "precision is 'int4', expected fp32 or int8"),
        ({"DRAWS": "2"}, "draws is 2, but no mode is random"),
        ({"DRAWS": "2", "MODE": "ensemble"}, "draws is 2, but no mode is random"),
        ({"CONFIDENCE": "high"}, "confidence is 'high', expected numbers"),
        ({"CONFIDENCE": "1.5"}, "confidence is (1.5,), expected numbers above 0 and up to 1"),
        ({"CONFIDENCE": "inf"}, "confidence is (inf,), expected"),
        ({"CONFIDENCE": "0.9,nan"}, "confidence is (0.9, nan), expected"),
        ({"TLS_CERTIFICATE": "a"}, "tls_certificate is 'a', but tls_key is empty; TLS needs both"),
        ({"TLS_KEY": "a"}, "tls_key is 'a', but tls_certificate is empty; TLS needs both"),
        ({"TLS_CLIENT_CA": "a"}, "tls_client_ca is 'a', but tls_certificate and tls_key are empty"),
        ({"CORS_ORIGINS": "example.org"}, "cors_origins is ('example.org',), expected"),
        ({"CORS_ORIGINS": "https://a.org/path"}, "cors_origins is ('https://a.org/path',), expected"),
        ({"API_KEYS_FILE": "a\nb"}, "api_keys_file is 'a\\nb', expected text without control characters"),
        ({"MODELS": "a,b\x1b"}, "models is ('a', 'b\\x1b'), expected"),
        ({"ALLOW_REPOSITORY_CHANGES": "1", "HOST": "0.0.0.0"}, "so anybody could load and unload models"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Settings.resolve({}, {PREFIX + name: value for name, value in environment.items()})
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thread = 1", "thread is no setting; did you mean threads? known: models, "),
        ("threads = '1'", "threads is '1', expected"),
        ("threads = 1.5", "threads is 1.5, expected"),
        ("threads = true", "threads is True, expected"),
        ("queue_timeout = true", "queue_timeout is True, expected"),
        ("demo = 1", "demo is 1, expected true or false"),
        ("host = 1", "host is 1, expected"),
        ("models = 'a'", "models is 'a', expected a list of texts"),
        ("models = [1]", "models is [1], expected a list of texts"),
        ("confidence = ['0.9']", "confidence is ['0.9'], expected numbers"),
        ("threads = ", "is no TOML"),
        ("\udcff", "is no TOML"),
        ("[serve]\nthreads = 1", "serve is no setting"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_its_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput) as refusal:
        Settings.resolve({}, {}, file)
    assert said in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_a_flag_that_is_no_setting_is_refused() -> None:
    with pytest.raises(BadInput, match=r"thread is no setting; did you mean threads\?"):
        Settings.resolve({"thread": "1"}, {})


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read the settings file .*nowhere\.toml \(No such file"):
        Settings.resolve({}, {}, tmp_path / "nowhere.toml")


def test_models_of_the_repository_are_served_as_all_are() -> None:
    table = {"source": "a", "mode": "single"}
    assert Settings(model_repository="shelf", mode="random", draws=4, model_tables=(table,)).draws == 4
    with pytest.raises(BadInput, match="draws is 4, but no mode is random"):
        Settings(mode="random", draws=4, model_tables=(table,))


def test_clients_may_change_models_here_or_with_a_key() -> None:
    assert not Settings(allow_repository_changes=True).exposed
    assert not Settings(allow_repository_changes=True, host="::1").exposed
    assert not Settings(allow_repository_changes=True, host="localhost").exposed
    assert Settings(allow_repository_changes=True, host="0.0.0.0", admin_keys_file="keys").exposed
    assert Settings(host="::").exposed
    assert Settings(host="example.org").exposed


# --- the environment's and the machine's own ---


def test_threads_never_outnumber_the_cores_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.operations.settings.usable_cores", lambda: 8)
    assert Settings().workers == 8
    assert Settings(intra_op=3).workers == 2
    assert Settings(intra_op=16).workers == 1
    assert Settings(threads=5, intra_op=16).workers == 5
    assert Settings(device="cuda").workers == 1


def test_the_links_of_a_kubernetes_service_of_the_same_prefix_are_no_settings() -> None:
    for service in ("", "CANARY_2_", "GRPC_"):
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
        assert Settings.resolve({}, {**environment, "MANYGATES_SERVE_THREADS": "3"}) == Settings(threads=3)
    assert Settings.resolve({}, {"MANYGATES_SERVE_PORT": "8001"}).port == 8001


# --- the command ---


def test_the_command_prints_its_settings_and_where_they_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:the-secret\n")
    file = written(tmp_path, f'api_keys_file = "{keys}"\n[[model]]\nsource = "b"\nmode = "ensemble"\n')
    monkeypatch.setenv("MANYGATES_SERVE_THREADS", "2")
    assert manygates.main(["serve", "a", "b", "--config", str(file), "--port", "0", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "the-secret" not in printed
    again = Settings.resolve({}, {}, written(tmp_path, printed))
    assert again == Settings(
        models=("a", "b"),
        port=0,
        threads=2,
        api_keys_file=str(keys),
        model_tables=({"source": "b", "mode": "ensemble"},),
    )


def test_the_server_is_started_with_the_settings_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Settings] = []
    monkeypatch.setattr("serving.server.serve", started.append)
    assert manygates.main(["serve", "a", "--mode", "random", "--port", "1", "--no-allow-spinning"]) == 0
    assert started == [Settings(models=("a",), mode="random", port=1)]


def test_without_models_all_bundled_ones_that_can_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Settings] = []
    monkeypatch.setattr("serving.server.serve", started.append)
    assert manygates.main(["serve", "--mode", "random"]) == 0
    assert "eio-resnet20-cifar10" in started[0].models
    assert "standard-resnet20-cifar10" not in started[0].models
    assert manygates.main(["serve", "--model-repository", "shelf"]) == 0
    assert started[1].models == ()


def test_the_settings_file_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    settings = Settings.resolve({}, {}, written(tmp_path, example))
    random, fixed = settings.model_settings
    assert (random.mode, random.draws, random.weight) == ("random", 4, 2.0)
    assert (fixed.source, fixed.weight) == ("standard-resnet20-cifar10", 1.0)
