"""The HTTP API: jobs from order to picture; nothing from a request is a path or breaks it; keys and limits."""

import base64
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sfumato.images import load_png
from sfumato.pipeline import Pipeline
from sfumato.server.app import check_bind, create_app
from sfumato.server.desk import Desk, Settings
from sfumato.server.keys import Keys
from sfumato.types import Job

LOCAL = "http://localhost"
MIB = 1024 * 1024


def open_desk(checkpoint: Path, data: Path, **settings) -> Desk:
    pipeline = Pipeline.from_pretrained(checkpoint, "cpu", adapters=[data.parent])
    return Desk(pipeline, Settings(data, **settings))


@pytest.fixture(scope="module")
def desk(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return open_desk(tiny_checkpoint, tmp_path_factory.mktemp("serve") / "data", deterministic=True)


@pytest.fixture(scope="module")
def client(desk: Desk) -> Iterator[TestClient]:
    with TestClient(create_app(desk, max_body=MIB), LOCAL, raise_server_exceptions=False) as client:
        yield client


def ended(client: TestClient, id: str, headers: dict | None = None) -> dict:
    """A job once it is over."""
    for _ in range(600):
        found = client.get(f"/v1/jobs/{id}", headers=headers).json()
        if found["state"] in ("done", "failed", "cancelled"):
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def png(width: int = 16, height: int = 16, colour: tuple = (200, 30, 30)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(written, "PNG")
    return written.getvalue()


def test_a_job_is_drawn_as_the_pipeline_draws_it(client: TestClient, desk: Desk, tmp_path: Path) -> None:
    order = {"prompt": "a red apple", "steps": 3, "seed": 5, "count": 2}
    answer = client.post("/v1/jobs", json=order)
    assert answer.status_code == 202 and answer.json()["state"] in ("queued", "running")
    job = ended(client, answer.json()["id"])
    assert job["state"] == "done" and job["progress"] == {"done": 6, "total": 6} and len(job["results"]) == 2
    expected = desk.pipeline.draw(Job(**order)).images
    for result, pixels in zip(job["results"], expected, strict=True):
        answer = client.get(result["url"])
        assert answer.headers["content-type"] == "image/png"
        (tmp_path / "picture.png").write_bytes(answer.content)
        found, recipe = load_png(tmp_path / "picture.png")
        assert np.array_equal(found, pixels) and recipe["job"]["seed"] == 5


def test_pictures_are_sent_first_or_inline(client: TestClient, desk: Desk) -> None:
    sent = client.post("/v1/pictures", content=png())
    assert sent.status_code == 201 and (sent.json()["width"], sent.json()["height"]) == (16, 16)
    name = sent.json()["name"]
    inline = "data:image/png;base64," + base64.b64encode(png()).decode()
    found = []
    for image in (name, sent.json()["sha256"], inline):
        order = {"prompt": "a", "image": image, "strength": 0.5, "steps": 4}
        job = client.post("/v1/jobs", json=order).json()
        assert job["job"]["image"] == name
        found.append(ended(client, job["id"])["results"])
    assert found[0] == found[1] == found[2] and found[0]


def test_events_tell_progress_previews_and_the_end(client: TestClient, desk: Desk) -> None:
    desk.service.preview = lambda x0: np.zeros((len(x0), 4, 4, 3), np.uint8)
    id = client.post("/v1/jobs", json={"prompt": "a", "steps": 200, "seed": 9}).json()["id"]
    names, last = [], {}
    with client.stream("GET", f"/v1/jobs/{id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                last[names[-1]] = json.loads(line.removeprefix("data: "))
    assert names[-1] == "state" and last["state"]["state"] == "done"
    assert {"progress", "preview"} <= set(names)
    with Image.open(io.BytesIO(base64.b64decode(last["preview"]["png"]))) as shown:
        assert shown.size == (16, 16)
    assert client.get("/v1/jobs/none/events").status_code == 404


def test_cancelling_over_http(client: TestClient) -> None:
    id = client.post("/v1/jobs", json={"prompt": "a", "steps": 200, "count": 20}).json()["id"]
    assert client.delete(f"/v1/jobs/{id}").status_code == 200
    job = ended(client, id)
    assert job["state"] == "cancelled" and job["progress"]["done"] < 200 * 20
    assert client.delete("/v1/jobs/none").status_code == 404


def test_an_idempotency_key_orders_once(client: TestClient) -> None:
    headers = {"Idempotency-Key": "one"}
    first, second = (client.post("/v1/jobs", json={"prompt": "k", "steps": 2}, headers=headers) for _ in "ab")
    assert first.json()["id"] == second.json()["id"]
    other = client.post("/v1/jobs", json={"prompt": "l", "steps": 2}, headers=headers)
    assert other.status_code == 409 and "another job" in other.json()["error"]["message"]


def test_lists(client: TestClient) -> None:
    ids = [client.post("/v1/jobs", json={"prompt": "x", "steps": 1, "seed": n}).json()["id"] for n in range(3)]
    page = client.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["jobs"]] == ids[:0:-1]
    after = client.get("/v1/jobs", params={"limit": 1, "before": page["next"]}).json()
    assert after["jobs"][0]["id"] == ids[0]
    for id in ids:
        ended(client, id)
    assert all(job["state"] == "done" for job in client.get("/v1/jobs", params={"state": "done"}).json()["jobs"])


WRONG = {
    "steps": [
        ({"steps": 0}, "steps"), ({"steps": "many"}, "steps"), ({"steps": 10**400}, None), ({"steps": 999}, "steps"),
    ],
    "names": [
        ({"sampler": "magic"}, "sampler"), ({"like": "/etc/passwd"}, "like"), ({"model": "../box"}, "model"),
        ({"controls": [{"model": "/etc/passwd", "image": "a" * 64}]}, None), ({"unknown": 1}, "unknown"),
        ({"controls": [{"model": "m", "path": 1}]}, "controls.0.path"), ({"controls": [3]}, "controls.0"),
        ({"prompt": "<lora:../../../etc/passwd:1>"}, None), ({"prompt": "<hypernet:/etc/passwd:1>"}, None),
    ],
    "pictures": [
        ({"image": "/etc/passwd"}, "image"), ({"image": "a" * 64}, "image"), ({"image": "https://host/a.png"}, "image"),
        ({"image": "file:///etc/passwd"}, "image"), ({"image": "base64,AAAA"}, "image"), ({"mask": "../x"}, "mask"),
        ({"image": "base64,%%%"}, "image"), ({"depth": "/tmp/net.onnx"}, "depth"), ({"image": 5}, "image"),
    ],
    "sizes": [
        ({"width": 10**9}, "width"), ({"width": 17}, "width"), ({"width": 8192, "height": 8192, "count": 2}, "pixels"),
        ({"count": 5000}, "count"), ({"count": 0}, "count"), ({"prompt": "a" * 30_000}, "prompt"),
        ({"hires": {"scale": 100}}, "hires.scale"), ({"guidance": float("nan")}, "guidance"),
        ({"sampler": "euler", "options": {"s_churn": float("inf")}}, None), ({"priority": 1000}, "priority"),
    ],
    "texts": [
        ({"prompt": 5}, "prompt"), ({"prompt": "\ud800"}, "prompt"), ({"prompt": None}, "prompt"),
        ({"\ud800": 1}, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_orders_are_4xx_with_the_field(client: TestClient, kind: str) -> None:
    for order, field in WRONG[kind]:
        answer = client.post("/v1/jobs", content=json.dumps(order), headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (order, answer.text)
        error = answer.json()["error"]
        assert error["message"] and (field is None or error["field"] == field), (order, error)
        assert "root:" not in answer.text


def test_an_upscaler_is_a_name_never_a_file(client: TestClient, tmp_path: Path) -> None:
    image = client.post("/v1/pictures", content=png()).json()["name"]
    file = tmp_path / "net.pth"
    file.write_bytes(b"")
    answer = client.post("/v1/jobs", json={"image": image, "upscale": 2, "upscaler": str(file)})
    assert answer.status_code == 422 and answer.json()["error"]["field"] == "upscaler"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"seed": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_order_is_4xx(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]


def test_what_is_no_picture_is_refused_before_it_is_decoded(client: TestClient, desk: Desk) -> None:
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]
    for content in (b"", b"GIF89a", b"<svg/>", png()[:60], bomb, b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        answer = client.post("/v1/pictures", content=content)
        assert answer.status_code == 422 and answer.json()["error"]["field"] == "image", answer.text
        assert str(desk.settings.data) not in answer.text
    assert client.post("/v1/pictures", content=b"0" * (MIB + 1)).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(1025):
            yield b"0" * 1024

    assert client.post("/v1/pictures", content=endless()).status_code == 413


@pytest.mark.parametrize("name", ["..%2f..%2fqueue.db", "A" * 64, "a" * 64, "a", "%00"])
def test_results_are_found_by_their_hash_alone(client: TestClient, name: str) -> None:
    answer = client.get(f"/v1/results/{name}.png")
    assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_strangers_pages_and_names_are_refused(client: TestClient) -> None:
    assert client.get("/v1/jobs", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/v1/jobs", headers={"Origin": "null"}).status_code == 403
    assert client.get("/v1/jobs", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/v1/jobs", headers={"Origin": "http://localhost"}).status_code == 200
    for header in ("Host", "Origin"):
        assert client.get("/v1/jobs", headers={header: "http://[" if header == "Origin" else "["}).status_code == 403
    assert client.get("/v1/jobs/%00").status_code == 404
    answer = client.options(
        "/v1/jobs", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in answer.headers


def test_health_metrics_models_and_the_document(client: TestClient, desk: Desk) -> None:
    assert client.get("/healthz").json()["ok"] and client.get("/readyz").status_code == 200
    desk.queue.pause()
    assert client.get("/readyz").status_code == 503
    desk.queue.pause(False)
    answer = client.get("/v1/models", headers={"X-Request-Id": "abc"})
    assert answer.headers["x-request-id"] == "abc" and answer.json()["models"][0]["family"] == "tiny"
    text = client.get("/metrics").text
    assert 'sfumato_jobs{state="done"}' in text
    assert 'sfumato_requests_total{method="GET",route="/v1/models",status="200"}' in text
    document = client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["JobOrder"]["properties"]
    assert {"prompt", "steps", "priority", "controls", "hires"} <= set(fields)
    assert document["paths"]["/v1/jobs"]["post"]["responses"]["202"]["content"]["application/json"]["schema"]


def test_keys_open_ones_own_jobs_and_have_limits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    desk = open_desk(tiny_checkpoint, tmp_path / "data")
    keys = Keys(tmp_path / "data" / "keys.json")
    ann = keys.add("ann", requests=100, pixels=512, steps=5)
    bob = keys.add("bob", requests=2)
    assert ann not in (tmp_path / "data" / "keys.json").read_text()
    with TestClient(
        create_app(desk, only_local=False), "http://pictures.example", raise_server_exceptions=False
    ) as client:
        as_ann, as_bob = ({"Authorization": f"Bearer {key}"} for key in (ann, bob))
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {ann}"}):
            assert client.get("/v1/jobs", headers=headers).status_code == 401
        assert client.get("/healthz").status_code == 200 and client.get("/metrics").status_code == 401
        job = client.post("/v1/jobs", json={"prompt": "a", "steps": 2}, headers=as_ann).json()
        sha256 = ended(client, job["id"], as_ann)["results"][0]["sha256"]
        assert client.get(f"/v1/results/{sha256}.png", headers=as_ann).status_code == 200
        for order, field in (({"steps": 6}, "steps"), ({"width": 32, "height": 32}, "pixels")):
            refused = client.post("/v1/jobs", json=order, headers=as_ann)
            assert refused.status_code == 422 and refused.json()["error"]["field"] == field
        assert client.get(f"/v1/jobs/{job['id']}", headers=as_bob).status_code == 404
        assert client.get(f"/v1/results/{sha256}.png", headers=as_bob).status_code == 404
        often = client.get("/v1/jobs", headers=as_bob)
        assert often.status_code == 429 and int(often.headers["retry-after"]) <= 61
        keys.remove("ann")
        assert client.get("/v1/jobs", headers=as_ann).status_code == 401


def test_only_with_a_key_may_others_reach_it(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    for host in ("127.0.0.1", "localhost", "::1"):
        check_bind(host, keys)
    for host in ("0.0.0.0", "::", "192.168.1.2", "pictures.example", ""):
        with pytest.raises(ValueError, match="without a key"):
            check_bind(host, keys)
    keys.add("ann")
    check_bind("0.0.0.0", keys)


def test_one_server_at_a_time_has_a_folder_and_the_next_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = open_desk(tiny_checkpoint, tmp_path / "data")
    with pytest.raises(ValueError, match="another server"):
        open_desk(tiny_checkpoint, tmp_path / "data")
    with TestClient(create_app(first, grace=0.0), LOCAL) as client:
        id = client.post("/v1/jobs", json={"prompt": "a", "steps": 150}).json()["id"]
        while client.get(f"/v1/jobs/{id}").json()["progress"]["done"] == 0:
            time.sleep(0.02)
    second = open_desk(tiny_checkpoint, tmp_path / "data")
    assert second.queue.get(id).crashes == 0, "it was given back in order"
    assert [thread.name for thread in threading.enumerate()].count("sfumato worker") >= 1
    with TestClient(create_app(second, grace=0.0), LOCAL) as client:
        assert ended(client, id)["state"] == "done"


def test_what_fails_while_drawing_says_so_without_the_servers_folders(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "broken.safetensors").write_bytes(b"no tensors")
    desk = open_desk(tiny_checkpoint, tmp_path / "data")
    with TestClient(create_app(desk), LOCAL) as client:
        job = ended(client, client.post("/v1/jobs", json={"prompt": "a <lora:broken:1>"}).json()["id"])
    assert job["state"] == "failed" and job["error"]["message"] and job["attempts"] == 1
    assert str(tmp_path) not in json.dumps(job)
