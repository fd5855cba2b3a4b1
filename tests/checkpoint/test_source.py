"""References: local paths, and hf:// against a hub on loopback through the real huggingface_hub."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from fedqsn_cli.checkpoint import Checkpoint, resolve
from fedqsn_cli.errors import HubError, InputError
from support.fake_hub import FakeHub

MODEL = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": save({"weight": np.arange(6, dtype=np.float32)}),
    "tokenizer.json": b"{}",
    "vocab.txt": b"[PAD]\n",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same weights in another layout",
    "onnx/model.safetensors": b"the same weights for another framework",
}

# HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported, so each call gets a fresh process.
CALL = """
import sys
from pathlib import Path
from fedqsn_cli.checkpoint import push, resolve
from fedqsn_cli.errors import HubError
try:
    if sys.argv[1] == "resolve":
        source = resolve(sys.argv[2])
        print(source.path, source.revision, sep="\\n")
    else:
        print(push(Path(sys.argv[2]), sys.argv[3]))
except HubError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@dataclass
class Client:
    """Calls this package in a process whose hub is the fake one."""

    hub: FakeHub
    home: Path
    stderr: str = ""

    def __call__(self, *arguments: str, token: bool = True, **variables: str) -> tuple[int, list[str]]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = self.hub.environment(self.home, **({} if token else {"token": None}))
        done = subprocess.run(
            [sys.executable, "-c", CALL, *arguments],
            env=kept | environment | variables | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        self.stderr = done.stderr
        assert done.returncode in (0, 2), done.stderr
        return done.returncode, done.stdout.splitlines()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with FakeHub() as hub:
        yield Client(hub, tmp_path / "home")


def test_a_local_path_is_its_own_source(tmp_path: Path) -> None:
    source = resolve(str(tmp_path))
    assert (source.path, source.reference, source.revision) == (tmp_path, str(tmp_path), None)


def test_a_missing_local_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file or directory"):
        resolve(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "reference",
    [
        "hf://",
        "hf://gpt2",
        "hf://a/b/c",
        "hf://a/b@",
        "hf://a/../b",
        "hf://a/b@..",
        "hf://a b/c",
        "hf://a/b@x y",
        "hf://a/b\n",
    ],
)
def test_a_malformed_reference_is_refused_without_a_hub(reference: str) -> None:
    with pytest.raises(HubError, match="not a model reference"):
        resolve(reference)


def test_a_snapshot_holds_weights_and_tokenizer_but_no_pickle_code_or_second_copy(client: Client) -> None:
    commit = client.hub.add("lab/bert", MODEL)
    code, (path, revision) = client("resolve", "hf://lab/bert")
    assert (code, revision) == (0, commit)
    assert {file.name for file in Path(path).iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    }
    with Checkpoint.open(path) as checkpoint:  # through the links of the hub's cache
        assert checkpoint.read("weight").tolist() == [0, 1, 2, 3, 4, 5]
    assert client.stderr == ""  # no bars where there is no terminal


def test_a_branch_and_a_commit_are_honoured(client: Client) -> None:
    first = client.hub.add("lab/bert", MODEL)
    repository = client.hub.repositories["lab/bert"]
    second = repository.commit("dev", MODEL | {"config.json": b'{"model_type": "roberta"}'})
    assert client("resolve", "hf://lab/bert@dev")[1][1] == second
    path, revision = client("resolve", f"hf://lab/bert@{first}")[1]
    assert revision == first
    assert (Path(path) / "config.json").read_bytes() == MODEL["config.json"]


def test_a_snapshot_in_the_cache_is_found_offline(client: Client) -> None:
    commit = client.hub.add("lab/bert", MODEL)
    client("resolve", "hf://lab/bert")
    client.hub.requests.clear()
    code, lines = client("resolve", "hf://lab/bert", HF_HUB_OFFLINE="1")
    assert (code, lines[1]) == (0, commit)
    assert client.hub.requests == []


def test_a_private_repository_needs_the_token(client: Client) -> None:
    client.hub.add("lab/secret", MODEL, private=True)
    code, lines = client("resolve", "hf://lab/secret", token=False)
    assert code == 2
    assert lines == [
        "hf://lab/secret: no such repository, or it is private (HTTP 404); check the name, and set HF_TOKEN"
    ]
    assert client("resolve", "hf://lab/secret")[0] == 0


def test_every_failure_is_one_clear_line(client: Client) -> None:
    client.hub.add("lab/gated", MODEL, gated=True)
    client.hub.add("lab/bert", MODEL)
    assert "is gated (HTTP 403); ask for access" in client("resolve", "hf://lab/gated")[1][0]
    assert "has no such revision (HTTP 404)" in client("resolve", "hf://lab/bert@nothing")[1][0]
    assert "not a valid repository name" in client("resolve", "hf://lab/-bert-")[1][0]
    assert "not in the local cache" in client("resolve", "hf://lab/other", HF_HUB_OFFLINE="1")[1][0]
    client.hub.broken = True
    code, lines = client("resolve", "hf://lab/never")
    assert (code, len(lines)) == (2, 1)
    assert "the hub cannot be reached" in lines[0]


def test_a_hub_that_is_down_is_one_clear_line(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # free again at the end of this block
    code, lines = client("resolve", "hf://lab/bert", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert (code, len(lines)) == (2, 1)
    assert "the hub cannot be reached; check the connection, HF_ENDPOINT" in lines[0]


@pytest.fixture
def proxy(tmp_path: Path) -> Path:
    folder = tmp_path / "proxy"
    folder.mkdir()
    (folder / "proxy.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(MODEL["model.safetensors"])
    return folder


def test_a_push_makes_a_private_repository_and_names_its_commit(client: Client, proxy: Path) -> None:
    code, (reference,) = client("push", str(proxy), "hf://lab/round-1")
    repository = client.hub.repositories["lab/round-1"]
    assert (code, repository.private) == (0, True)
    assert reference == f"hf://lab/round-1@{repository.branches['main']}"
    files = client.hub.files("lab/round-1")
    assert files["model.safetensors"] == MODEL["model.safetensors"]
    assert files.keys() == {".gitattributes", "proxy.json", "model.safetensors"}
    assert client("resolve", reference)[0] == 0


def test_a_push_leaves_nothing_of_the_push_before(client: Client, proxy: Path) -> None:
    client.hub.add("lab/round-1", {".gitattributes": b"", "model-00001-of-00002.safetensors": b"old"}, private=True)
    client("push", str(proxy), "hf://lab/round-1")
    assert client.hub.files("lab/round-1").keys() == {".gitattributes", "proxy.json", "model.safetensors"}


def test_a_push_to_a_branch_leaves_main_alone(client: Client, proxy: Path) -> None:
    client.hub.add("lab/rounds", {".gitattributes": b""}, private=True)
    assert client("push", str(proxy), "hf://lab/rounds@round-2")[0] == 0
    assert client.hub.files("lab/rounds").keys() == {".gitattributes"}
    assert "proxy.json" in client.hub.files("lab/rounds", "round-2")


def test_a_push_to_a_public_repository_is_refused_before_a_byte_is_sent(client: Client, proxy: Path) -> None:
    client.hub.add("lab/public", {".gitattributes": b""})
    code, lines = client("push", str(proxy), "hf://lab/public")
    assert (code, len(lines)) == (2, 1)
    assert "hf://lab/public: is public; make it private" in lines[0]
    assert not any("preupload" in request or "commit" in request for request in client.hub.requests)


def test_a_push_without_a_token_is_refused(client: Client, proxy: Path) -> None:
    code, lines = client("push", str(proxy), "hf://lab/round-1", token=False)
    assert (code, len(lines)) == (2, 1)
    assert "HF_TOKEN" in lines[0]
    assert client.hub.repositories == {}


def test_importing_the_package_does_not_import_the_hub() -> None:
    code = (
        "import sys, fedqsn_cli.checkpoint;"
        "print([name for name in ('huggingface_hub', 'torch', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"
