"""Adapters over HTTP: names from flags and from requests, and paths that lead nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from serve.conftest import Server
from serve.fake_finetune import ADAPTER_FILE, UNFORESEEN

StartServer = Callable[..., Server]


def adapter(path: Path) -> Path:
    """A directory that the closed-form engine takes for an adapter."""
    path.mkdir(parents=True)
    (path / ADAPTER_FILE).write_text("{}")
    return path


def load(http: httpx.Client, name: str, path: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)}
    return http.post("/v1/load_lora_adapter", json=body)


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def complete(client: openai.OpenAI, model: str) -> str:
    """The model that the answer names."""
    return client.completions.create(model=model, prompt="a", max_tokens=2).model


def names(server: Server) -> list[str]:
    return [model.id for model in server.openai().models.list()]


def test_adapters_come_and_go(start_server: StartServer, tmp_path: Path) -> None:
    root = tmp_path / "root"
    adapter(root / "one")
    start = adapter(tmp_path / "elsewhere" / "zero")
    server = start_server(lora_modules=[f"my/zero={start}"], adapter_root=str(root))
    client = server.openai()
    with server.http() as http:
        card = http.get("/v1/models/my/zero").json()
        assert (card["id"], card["parent"], card["root"]) == ("my/zero", "fake/model", "fake/model")
        assert http.get("/v1/models/fake/model").json()["parent"] is None
        assert (
            client.completions.create(model="my/zero", prompt="a", max_tokens=2).model == "my/zero"
        )
        with pytest.raises(openai.NotFoundError):
            complete(client, "one")
        assert load(http, "one", "one").status_code == 200
        assert names(server) == ["fake/model", "alias", "my/zero", "one"]
        assert complete(client, "one") == "one"
        again = load(http, "one", "one")
        assert again.status_code == 400
        assert "already" in again.json()["error"]["message"]
        assert unload(http, "one").status_code == 200
        assert unload(http, "one").status_code == 404
        with pytest.raises(openai.NotFoundError):
            complete(client, "one")
        assert load(http, "one", root / "one").status_code == 200
        assert unload(http, "my/zero").status_code == 200
        assert names(server) == ["fake/model", "alias", "one"]


def test_running_answers_keep_an_unloaded_adapter(
    start_server: StartServer, tmp_path: Path
) -> None:
    adapter(tmp_path / "one")
    server = start_server(adapter_root=str(tmp_path), builder="build_slow")
    with server.http() as http:
        assert load(http, "one", "one").status_code == 200
        stream = server.openai().completions.create(
            model="one", prompt="hello", max_tokens=40, stream=True
        )
        next(stream)
        assert unload(http, "one").status_code == 200
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert load(http, "one", "one").status_code == 200


def test_no_path_leaves_the_root(start_server: StartServer, tmp_path: Path) -> None:
    root = tmp_path / "root"
    adapter(root / "one")
    outside = adapter(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    (root / "into").mkdir()
    (root / "into" / ADAPTER_FILE).symlink_to(outside / ADAPTER_FILE)
    server = start_server(adapter_root=str(root))
    with server.http() as http:
        for path in ("../outside", outside, "one/../../outside", "link", "into", ".", "", "/"):
            answer = load(http, "x", path)
            assert answer.status_code == (400 if path == "" else 403), path
        for path in ("missing", f"one/{ADAPTER_FILE}"):
            assert load(http, "x", path).status_code == 400, path
        for path in ("x" * 500, "one\0"):
            assert load(http, "x", path).status_code in (400, 403)
        (root / "empty").mkdir()
        broken = load(http, "x", "empty")
        assert broken.status_code == 400
        assert broken.json()["error"]["code"] == "invalid_adapter"
        assert load(http, "alias", "one").status_code == 400
        assert names(server) == ["fake/model", "alias"]


def test_an_adapter_that_nobody_foresaw_ends_no_engine(
    start_server: StartServer, tmp_path: Path
) -> None:
    (adapter(tmp_path / "one") / UNFORESEEN).touch()
    adapter(tmp_path / "two")
    server = start_server(adapter_root=str(tmp_path))
    with server.http() as http:
        answer = load(http, "one", "one")
        assert answer.status_code == 500
        assert UNFORESEEN not in answer.text
        assert load(http, "two", "two").status_code == 200
        assert complete(server.openai(), "two") == "two"


def test_names_of_fine_tuned_models_are_not_taken(
    start_server: StartServer, tmp_path: Path
) -> None:
    adapter(tmp_path / "one")
    server = start_server(adapter_root=str(tmp_path))
    with server.http() as http:
        answer = load(http, "ft:fake/model:weft::1", "one")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")
        assert names(server) == ["fake/model", "alias"]


def test_without_a_root_nothing_is_loaded(server: Server, tmp_path: Path) -> None:
    path = adapter(tmp_path / "one")
    with server.http() as http:
        for answer in (load(http, "one", path), unload(http, "one")):
            assert answer.status_code == 403
            assert "--adapter-root" in answer.json()["error"]["message"]


def test_a_tenant_sees_its_own_adapters_only(start_server: StartServer, tmp_path: Path) -> None:
    adapter(tmp_path / "root" / "one")
    keys = tmp_path / "keys.json"
    keys.write_text('{"key-a": "a", "key-b": "b"}')
    server = start_server(adapter_root=str(tmp_path / "root"), key_file=str(keys))
    with server.http() as http:
        http.headers["Authorization"] = "Bearer key-a"
        assert load(http, "one", "one").status_code == 200
        assert http.get("/v1/models/one").status_code == 200
        http.headers["Authorization"] = "Bearer key-b"
        assert http.get("/v1/models/one").status_code == 404
        assert unload(http, "one").status_code == 404
        body = {"model": "one", "prompt": "a", "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 404
        # What another tenant calls its own is no other's business.
        assert load(http, "one", "one").status_code == 200
        assert http.post("/v1/completions", json=body).status_code == 200
        assert unload(http, "one").status_code == 200
        assert http.get("/v1/models/one").status_code == 404
        http.headers["Authorization"] = "Bearer key-a"
        assert http.post("/v1/completions", json=body).status_code == 200


def test_no_tenant_unloads_what_all_are_served(start_server: StartServer, tmp_path: Path) -> None:
    start = adapter(tmp_path / "root" / "one")
    keys = tmp_path / "keys.json"
    keys.write_text('{"key-a": "a", "key-b": "b"}')
    root = str(tmp_path / "root")
    server = start_server(lora_modules=[f"one={start}"], adapter_root=root, key_file=str(keys))
    with server.http() as http:
        http.headers["Authorization"] = "Bearer key-b"
        answer = unload(http, "one")
        assert (answer.status_code, answer.json()["error"]["param"]) == (403, "lora_name")
        http.headers["Authorization"] = "Bearer key-a"
        assert http.get("/v1/models/one").status_code == 200


@pytest.mark.parametrize("given", ["name", "=path", "name=", "name=/no/such/directory"])
def test_flags_are_checked_before_the_model_loads(start_server: StartServer, given: str) -> None:
    with pytest.raises(RuntimeError, match="--lora-modules"):
        start_server(lora_modules=[given])


def test_a_broken_adapter_of_a_flag_stops_the_start(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match=f"{ADAPTER_FILE} is missing"):
        start_server(lora_modules=[f"x={tmp_path / 'empty'}"])
