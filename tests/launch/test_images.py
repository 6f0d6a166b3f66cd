"""Images, compose file and Kubernetes manifests: what they name is there, and every command in them is one that runs.

No container is built or started here.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from fastapi.testclient import TestClient

from flm_torchrec.cli.main import _parser
from flm_torchrec.cli.serve_options import allowed_hosts
from flm_torchrec.config.load import load_config
from flm_torchrec.config.options import options_from
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.serve.access import read_keys
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.service import Service
from launch.components import pretrain
from tests.conftest import ROOT
from tests.serve.fake_service import FakeService
from tests.test_packaging import PROJECT, pins

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
MANIFESTS = [
    manifest
    for file in sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
KINDS = {"Deployment": "V1Deployment", "Service": "V1Service", "PersistentVolumeClaim": "V1PersistentVolumeClaim"}
"""By kind, its type in the client of Kubernetes."""


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in MANIFESTS if manifest["kind"] == kind]


DEPLOYMENT = of_kind("Deployment")[0]
POD = DEPLOYMENT["spec"]["template"]["spec"]
SERVE = POD["containers"][0]


def flm_commands(command: list[str]) -> Iterator[list[str]]:
    """The arguments of every `flm` in a command, also in a script that it gives to a shell."""
    if command[0] == "flm":
        yield command[1:]
    elif command[0] == "bash":
        for line in command[-1].splitlines():
            yield from flm_commands(shlex.split(line) or [""])


def documented() -> Iterator[tuple[str, list[str]]]:
    for name, service in COMPOSE["services"].items():
        if "command" in service:
            yield from ((name, arguments) for arguments in flm_commands(service["command"]))
    yield from (("kubernetes", arguments) for arguments in flm_commands(SERVE["command"]))


COMMANDS = list(documented())


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[f"{place} {c[0]}" for place, c in COMMANDS])
def test_a_command_has_options_and_settings_that_are_there(place: str, arguments: list[str]) -> None:
    args = _parser()[0].parse_args(arguments)
    if args.command == "train":
        load_config(ROOT / args.config)
    if args.command == "prepare":
        options_from(PrepareOptions, args)


def test_the_commands_of_a_shop_are_all_found() -> None:
    assert [arguments[0] for _, arguments in COMMANDS] == [
        "prepare",
        "train",
        "export",
        "load",
        "follow",
        "serve",
        "serve",
    ]


def stages() -> list[str]:
    return re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)


def instructions() -> Iterator[str]:
    """The instructions of the Dockerfile, each in one line."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    yield from (line for line in text.splitlines() if line.strip())


def test_the_dockerfile_copies_what_is_there_and_what_the_ignore_file_lets_in() -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        part
        for line in instructions()
        if line.startswith("COPY ") and "--from" not in line
        for part in line.split()[1:-1]
    ]
    assert len(copied) >= 7
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert [name for name in copied if not any(fnmatch.fnmatch(name, pattern) for pattern in let_in)] == []


@pytest.mark.parametrize("file", [".gitignore", ".dockerignore"])
def test_secrets_that_the_documentation_names_are_kept_out(file: str) -> None:
    patterns = [line.removeprefix("**/") for line in (ROOT / file).read_text().splitlines() if line != "*"]
    secrets = ["serve.keys", "admin.key", "record.key", "key.pem", ".env", "secret"]
    assert [name for name in secrets if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_every_instruction_of_the_dockerfile_is_one() -> None:
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "CMD", "USER"}
    assert {line.split()[0] for line in instructions()} <= known
    from_stages = re.findall(r"--from=(\w+)", DOCKERFILE) + re.findall(r"^FROM (\w+) AS", DOCKERFILE, re.MULTILINE)
    assert set(from_stages) <= set(stages()), "a stage that is copied from comes before"
    last_users = re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)
    assert last_users == ["10001", "10001"], "neither image runs as root, which Kubernetes knows by a number alone"


def test_the_dockerfile_asks_for_lines_and_extras_that_are_there() -> None:
    for package, file in re.findall(r"grep '\^([\w-]+)==' /requirements/(\w+\.txt)", DOCKERFILE):
        assert package in pins(file)
    extras = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE)
    assert len(extras) == 2 and set(",".join(extras).split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_image_of_a_training_is_one_that_the_dockerfile_builds() -> None:
    image = inspect.signature(pretrain).parameters["image"].default
    built = dict(re.findall(r"docker build --target (\w+)\s+-t (\S+) \.", DOCKERFILE))
    assert built == {"cpu": "flm_torchrec:cpu", "cuda": image} and set(built) <= set(stages())
    ours = [container["image"] for container in (*POD["initContainers"], *POD["containers"])]
    ours += [COMPOSE["services"][name]["image"] for name in ("train", "follow", "serve")]
    assert set(ours) == {"flm_torchrec:cpu"}
    assert COMPOSE["services"]["train"]["build"]["target"] in stages()


def test_services_of_the_compose_file_name_what_is_there() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source.startswith(("./", "/")) or source in COMPOSE["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "nothing is open to a network"
        assert not str(service["image"]).endswith(":latest")
    assert {"train", "serve", "qdrant", "kafka"} <= set(services)


def test_who_writes_into_a_volume_may_and_does() -> None:
    """A new volume belongs to root unless the image has its folder; Kafka writes elsewhere unless it is told."""
    ((made, owned),) = re.findall(r"mkdir --parents ([/\w ]+) && chown flm ([/\w ]+)", DOCKERFILE)
    named = [volume.split(":")[1] for volume in COMPOSE["services"]["serve"]["volumes"] if not volume.startswith(".")]
    assert named and set(named) <= set(made.split()) & set(owned.split())
    kafka = COMPOSE["services"]["kafka"]
    assert [volume.split(":")[1] for volume in kafka["volumes"]] == [kafka["environment"]["KAFKA_LOG_DIRS"]]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
def test_a_manifest_has_fields_of_its_kind_alone(manifest: dict[str, Any]) -> None:
    """The typed client drops a field that it does not know, so nothing may be missing afterwards."""
    from kubernetes.client import ApiClient  # takes seconds, which processes of other tests need not spend

    client = ApiClient()

    typed = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), KINDS[manifest["kind"]])
    assert client.sanitize_for_serialization(typed) == manifest


def test_names_of_the_manifests_fit_each_other() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    service = of_kind("Service")[0]["spec"]
    assert service["selector"].items() <= labels.items()
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in SERVE["ports"]}
    assert service["ports"][0]["targetPort"] in ports
    args = _parser()[0].parse_args(SERVE["command"][1:])
    assert (args.port, args.host) == (ports["http"], "0.0.0.0")
    claims = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    named = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert named == claims
    for container in (*POD["initContainers"], SERVE):
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        assert container["securityContext"]["readOnlyRootFilesystem"] and container["resources"]["limits"]["memory"]
        if container is SERVE:
            folders = (args.export[0].parent, args.events.rpartition("/")[0], "/tmp")
            assert {str(folder) for folder in folders} == mounts


def serving(arguments: list[str]) -> TestClient:
    """The app as the command would serve it, with a key, over a service without an export."""
    keys = read_keys("admin 0123456789abcdef me", "test")
    limits = ServerLimits(keys=keys, hosts=allowed_hosts(_parser()[0].parse_args(arguments)))
    return TestClient(create_app(cast(Service, FakeService()), limits), raise_server_exceptions=False)


def test_probes_are_answered_without_a_key() -> None:
    served = serving(SERVE["command"][1:])
    probes = [SERVE[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [probe["path"] for probe in probes] == ["/livez", "/livez", "/readyz"]
    for probe in probes:
        for host in ("10.2.3.4:8000", "flm-serve:8000", "flm-serve.shop.svc.cluster.local"):
            assert served.get(probe["path"], headers={"Host": host}).status_code == 200
    assert served.get("/v1/items", headers={"Host": "flm-serve"}).status_code == 401
    assert served.get("/livez", headers={"Host": "elsewhere.example"}).status_code == 400


def test_the_health_check_of_the_compose_file_is_answered() -> None:
    arguments = COMPOSE["services"]["serve"]["command"][1:]
    script = COMPOSE["services"]["serve"]["healthcheck"]["test"][-1]
    ((host, port, path),) = re.findall(r"urlopen\('http://([\d.]+):(\d+)(/\w+)'", script)
    assert int(port) == _parser()[0].parse_args(arguments).port
    assert serving(arguments).get(path, headers={"Host": f"{host}:{port}"}).status_code == 200


def test_the_secret_is_lines_of_keys() -> None:
    lines = re.findall(
        r'keys="([^"]+)"|FLM_SERVE_KEYS=([^"]+)"',
        "\n".join(map(str, [(ROOT / "launch/kubernetes/serve.yaml").read_text(), (ROOT / "compose.yaml").read_text()])),
    )
    assert len(lines) == 2
    for line in ("".join(pair).replace("$(openssl rand -hex 16)", "0" * 32) for pair in lines):
        assert read_keys(line, "the head of the file")
