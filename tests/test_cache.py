"""Models by name: brought from the hub or its cache, loaded once, freed before the next. No network is asked."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import save_file

from sfumato.engine import Engine
from sfumato.families import Family, Model
from sfumato.models.unet import UNetConfig
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete
from sfumato.tasks.decoding import decode
from sfumato.types import Job
from sfumato.weights.cache import ModelCache
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.hub import needed, resolve
from sfumato.weights.layouts.diffusers_configs import components, folder_files
from sfumato.weights.layouts.folder import table_of
from sfumato.weights.layouts.tables import to_layout
from sfumato.weights.parts import build
from tests.tiny import TINIES, random_parts

# As the published folders have them; without these a scheduler of diffusers that is made from the config clips latents.
PUBLISHED = {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False}


def write_folder(folder: Path, kind: str) -> Path:
    """A tiny model of the kind, random, as a diffusers folder."""
    family = TINIES[kind]
    for name, text in folder_files(family).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | PUBLISHED), encoding="utf-8")
    parts = random_parts(family)
    for part, component in components(family).items():
        keys = table_of(family, part)
        state = to_layout({name: tensor for name, tensor in parts[part].items() if name in keys}, keys)
        stem = "diffusion_pytorch_model" if component in ("unet", "vae") else "model"
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, str(folder / component / f"{stem}.safetensors"), {"format": "pt"})
    return folder


# -- the cache --------------------------------------------------------------------------------------------------------


def use(model: Model) -> None:
    """Draw one picture in one step, so that every weight is read."""
    job = complete(Job(prompt="x", steps=1), model.family)
    [latents] = Engine(model).drive([txt2img.start(job, model)])
    assert latents is not None
    decode(latents, 0.0, model)


def test_the_same_checkpoint_is_the_same_object(tiny_checkpoint, tmp_path):
    cache = ModelCache(max_models=3)
    model = cache.get(tiny_checkpoint)
    beside = tmp_path / "link.safetensors"
    beside.symlink_to(tiny_checkpoint)
    assert cache.get(str(beside)) is model is cache.get(tiny_checkpoint, torch.device("cpu"), torch.float32)
    half = cache.get(tiny_checkpoint, "cpu", torch.bfloat16)
    other = cache.get(tiny_checkpoint, vae=tiny_checkpoint)
    assert len({id(each) for each in (model, half, other)}) == 3 == len(cache)
    assert cache.get(tiny_checkpoint, vae=str(tiny_checkpoint)) is other
    cache.get(tiny_checkpoint, "cpu", torch.float16)
    assert len(cache) == 3 and cache.get(tiny_checkpoint, vae=tiny_checkpoint) is other
    assert cache.get(tiny_checkpoint) is not model, "it was the longest unused"
    cache.clear()
    assert len(cache) == 0


def test_a_file_that_was_written_anew_is_loaded_anew(tiny_checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny_checkpoint.read_bytes())
    cache = ModelCache(max_models=4)
    model = cache.get(path)
    os.utime(path, ns=(1, 1))
    assert cache.get(path) is not model and len(cache) == 1


def test_a_folder_s_files_count(tmp_path):
    loaded = []
    cache = ModelCache(load=lambda *a, **k: loaded.append(a) or object())
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "weights"
    weights.write_text("1")
    assert cache.get(tmp_path) is cache.get(tmp_path)
    weights.write_text("22")
    cache.get(tmp_path)
    assert len(loaded) == 2


def test_an_error_of_loading_passes_and_leaves_nothing(tiny_checkpoint, tmp_path):
    cache = ModelCache()
    cache.get(tiny_checkpoint)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such file"):
            cache.get(tmp_path / "none.safetensors")
    assert len(cache) == 0, "room was made for it"
    assert cache.get(tiny_checkpoint).name == "tiny"
    with pytest.raises(ValueError, match="^max_models=0: 1 or more are needed$"):
        ModelCache(0)


class Slow:
    """A loader that counts what is alive while it loads, and takes a while."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.calls: list[str] = []
        self.most = 0

    def __call__(self, path: Path, *_: Any, **__: Any) -> Any:
        self.calls.append(path.name)
        self.most = max(self.most, len(self.alive) + 1)
        time.sleep(0.02)
        model = type("Fake", (), {})()
        model.itself = model  # as networks are held by their hooks
        self.alive.add(model)
        return model


def test_two_threads_that_ask_at_once_load_once(tmp_path):
    slow = Slow()
    cache = ModelCache(load=slow)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(cache.get(tmp_path / "a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.calls == ["a"] and len(got) == 8 and len({id(model) for model in got}) == 1


def test_never_two_at_a_time_unless_somebody_holds_one(tmp_path):
    slow = Slow()
    cache = ModelCache(load=slow)
    threads = [threading.Thread(target=cache.get, args=(tmp_path / str(index % 3),)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.most == 1
    held = cache.get(tmp_path / "held")
    cache.get(tmp_path / "next")
    gc.collect()
    assert slow.most == 2 and held in slow.alive


def test_one_that_is_there_can_be_had_while_another_is_loaded(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def load(path: Path, *_: Any, **__: Any) -> Any:
        if path.name == "slow":
            entered.set()
            assert leave.wait(10)
        return object()

    cache = ModelCache(max_models=2, load=load)
    model = cache.get(tmp_path / "quick")
    thread = threading.Thread(target=cache.get, args=(tmp_path / "slow",))
    thread.start()
    assert entered.wait(10)
    assert cache.get(tmp_path / "quick") is model
    leave.set()
    thread.join()
    assert len(cache) == 2


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, list[Path]]:
    """Ten checkpoints of 60 MB: one file, and copies that differ in one byte of their header."""
    from tests.conftest import TINY

    unet = UNetConfig(
        channels=128, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), context_dim=16, num_heads=2
    )
    family = replace(TINY, name="medium-0", unet=unet)
    folder = tmp_path_factory.mktemp("medium")
    first = folder / "0.safetensors"
    parts = {part: module.state_dict() for part, module in build(family).items()}
    save_checkpoint(first, family, parts, torch.float32)
    data = first.read_bytes()
    assert 50e6 < len(data) < 80e6
    paths = [first]
    for index in range(1, 10):
        paths.append(folder / f"{index}.safetensors")
        paths[-1].write_bytes(data.replace(b"medium-0", f"medium-{index}".encode(), 1))
    return family, paths


def resident() -> float:
    """MiB of this process in memory that are not of a file's map: a map's pages are the system's to take back."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize() / 2**20


def whole() -> float:
    """MiB of this process in memory, maps of files among them."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc/self/statm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["mapped", "converted"])
def test_ten_models_in_turn_take_the_memory_of_one(medium, dtype):
    family, paths = medium
    cache = ModelCache()
    dead: list[weakref.ref[Any]] = []
    sizes: list[tuple[float, float]] = []
    for path in paths:
        model = cache.get(path, "cpu", dtype)
        assert model.family.name == f"medium-{path.stem}"
        if dtype == torch.float32:
            use(model)
        dead += [weakref.ref(network) for network in model.networks.values()]
        sizes.append((resident(), whole()))
        del model
    cache.clear()
    assert not any(ref() is not None for ref in dead)
    for kind in range(2):
        second, tenth = sizes[1][kind], sizes[-1][kind]
        assert tenth < 1.3 * second and tenth - second < 40, sizes  # MiB; each model is 60, or 30 in half precision


# -- the hub ----------------------------------------------------------------------------------------------------------

FOLDER = [
    "README.md", "model_index.json", "v1-5.ckpt", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
    "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack",
    "text_encoder/openvino_model.bin",
]  # fmt: skip
CONFIGS = {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
CONFIGS |= {"unet/config.json", "vae/config.json", "text_encoder/config.json"}


def test_only_what_is_needed_is_brought():
    assert set(needed(FOLDER)) - CONFIGS == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
    }
    assert set(needed(FOLDER, "fp16")) - CONFIGS == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    assert set(needed(FOLDER)) >= CONFIGS
    assert needed(["README.md", "config.json", "vae.safetensors"]) == ["vae.safetensors"]
    only = ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert needed(only) == only


@pytest.mark.parametrize(
    "names, variant, message",
    [
        (FOLDER, "bf16", "^variant='bf16': text_encoder has|^variant='bf16': unet has the plain one, fp16, non_ema$"),
        (["model_index.json", "unet/config.json"], None, "^variant=None: unet has no weights$"),
        (["a.ckpt", "b.safetensors"], None, "^it has no model_index.json; name one of its files, .*: a.ckpt, b.safe"),
        (["README.md"], None, "^it has no model_index.json; it holds no checkpoint$"),
    ],
)
def test_what_a_repository_lacks_is_said_before_it_is_brought(names, variant, message):
    with pytest.raises(ValueError, match=message):
        needed(names, variant)


def test_a_path_is_itself(tiny_checkpoint, tmp_path, monkeypatch):
    assert resolve(tiny_checkpoint) == tiny_checkpoint == resolve(str(tiny_checkpoint))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "no/such.safetensors",
        "/no/such",
        "./no/such",
        "a/b/c",
        "no/such.ckpt",
        "../no-such-checkpoint",
        "C:\\a\\b",
        "",
    ],
)
def test_a_path_that_is_not_there_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # it is not even asked for
    if not name:
        return  # Path("") is the folder one is in
    with pytest.raises(ValueError) as caught:
        resolve(name)
    assert str(caught.value) == f"ckpt={name!r}: no such file"
    with pytest.raises(ValueError, match="^vae="):
        resolve(Path(name), field="vae")


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError) as caught:
        resolve("owner/name-1.0")
    assert str(caught.value) == (
        "ckpt='owner/name-1.0': no such file; to ask the hub for it: pip install \"sfumato[hub]\""
    )


class FakeHub(ModuleType):
    """The three functions that are used, on a repository of names alone; what is asked is noted."""

    errors = huggingface_hub.errors

    def __init__(self, folder: Path, names: list[str], error: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.names, self.error = folder, names, error
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def _answer(self, what: str, options: dict[str, Any]) -> None:
        self.asked.append((what, options))
        if options.get("local_files_only"):
            raise self.errors.LocalEntryNotFoundError("not there")
        if self.error:
            raise self.error

    def model_info(self, repo: str, **options: Any) -> SimpleNamespace:
        self._answer(f"list {repo}", options)
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self._answer(f"folder {repo}", options)
        return str(self.folder)

    def hf_hub_download(self, repo: str, file: str, **options: Any) -> str:
        self._answer(f"file {repo} {file}", options)
        return str(self.folder / file)


def fake(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> FakeHub:
    hub = FakeHub(*arguments)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_a_folder_of_the_hub(monkeypatch, tmp_path):
    hub = fake(monkeypatch, tmp_path, FOLDER)
    assert resolve("owner/name-1.0", revision="main", variant="fp16", token="t") == tmp_path
    asked = {"revision": "main", "token": "t"}
    brought = {"revision": "c0ffee", "token": "t", "allow_patterns": needed(FOLDER, "fp16")}
    assert hub.asked == [("list owner/name-1.0", asked), ("folder owner/name-1.0", brought)]


def test_a_file_of_the_hub(monkeypatch, tmp_path):
    hub = fake(monkeypatch, tmp_path, ["x.safetensors"])
    assert resolve("owner/name:sub/x.safetensors", token=True) == tmp_path / "sub/x.safetensors"
    assert hub.asked == [("file owner/name sub/x.safetensors", {"revision": None, "token": True})]
    assert resolve("owner/name") == tmp_path / "x.safetensors"


def http(kind: type[Exception], text: str = "GET https://hub/x\nmore lines") -> Exception:
    """An error of the hub without the response that it usually carries."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    "error, message",
    [
        (http(huggingface_hub.errors.GatedRepoError), "its licence must be accepted on huggingface.co, and a token"),
        (http(huggingface_hub.errors.RepositoryNotFoundError), "no such file here and no such repository on the hub"),
        (
            http(huggingface_hub.errors.RevisionNotFoundError),
            "revision='v9': the hub has no such branch, tag or commit",
        ),
        (http(huggingface_hub.errors.EntryNotFoundError), "the repository has no file 'x.ckpt'"),
        (ConnectionError("no route to host\nmore"), r"could not be reached \(no route to host\)$"),
        (TimeoutError(), r"not a path here, not in the cache, and the hub could not be reached \(TimeoutError\)$"),
        (RuntimeError("odd"), r"could not be reached \(odd\)$"),
        (huggingface_hub.errors.HFValidationError("Repo id must be ..."), "Repo id must be"),
    ],
)
def test_what_the_hub_says_is_one_line(monkeypatch, tmp_path, error, message):
    fake(monkeypatch, tmp_path, [], error)
    with pytest.raises(ValueError, match=message) as caught:
        resolve("owner/name:x.ckpt", revision="v9")
    assert str(caught.value).startswith("ckpt='owner/name:x.ckpt': ") and "\n" not in str(caught.value)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path) -> Path:
    """A cache as huggingface_hub leaves it: blobs, a snapshot of links, a ref. No network may be asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache: Path, repo: str, files: dict[str, bytes]) -> Path:
    home = cache / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = home / "snapshots" / commit
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "blobs").mkdir()
    for index, (name, data) in enumerate(files.items()):
        (home / "blobs" / f"{index:040x}").write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(home / "blobs" / f"{index:040x}")
    return snapshot


def test_without_a_network_the_cache_serves(hub_cache, tiny_checkpoint):
    snapshot = put(hub_cache, "owner/name", dict.fromkeys(FOLDER, b"{}"))
    assert resolve("owner/name") == snapshot == resolve("owner/name", variant="fp16")
    with pytest.raises(ValueError, match="^ckpt='owner/name': it is in the cache, but incomplete: variant='bf16': "):
        resolve("owner/name", variant="bf16")
    single = put(hub_cache, "owner/single", {"tiny.safetensors": tiny_checkpoint.read_bytes()})
    path = resolve("owner/single:tiny.safetensors")
    assert path == single / "tiny.safetensors" == resolve("owner/single")
    assert load_model(path).family.name == "tiny"


def test_a_folder_in_the_cache_is_loaded(hub_cache, tmp_path_factory):
    from sfumato import Pipeline, StableDiffusionPipeline

    folder = write_folder(tmp_path_factory.mktemp("sd1"), "sd1")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    put(hub_cache, "owner/sd1", files)
    assert Pipeline.from_pretrained("owner/sd1", "cpu")("x", steps=1, width=64, height=64).images.shape == (
        1,
        64,
        64,
        3,
    )
    pipe = StableDiffusionPipeline.from_pretrained("owner/sd1", revision="main", use_auth_token=None)
    assert pipe.scheduler.config["_class_name"] == "PNDMScheduler"
    assert json.loads(files["model_index.json"])["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", ["owner/other", "owner/other:x.safetensors"])
def test_what_is_neither_here_nor_in_the_cache_is_one_line(hub_cache, name):
    with pytest.raises(ValueError) as caught:
        resolve(name)
    line = f"ckpt={name!r}: not a path here, not in the cache, and the hub could not be reached (HF_HUB_OFFLINE is set)"
    assert str(caught.value) == line
