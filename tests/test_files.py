"""Files of tensors: both formats right to the bit, read lazily; nothing damaged is accepted, nothing hostile runs."""

from __future__ import annotations

import argparse
import copyreg
import datetime
import gc
import hashlib
import io
import json
import mmap
import os
import pathlib
import pickle
import random
import struct
import sys
import time
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sfumato.weights.files import (
    file_hash,
    hashes,
    load_safetensors,
    old_hash,
    open_tensors,
    save_safetensors,
    sha256,
)
from sfumato.weights.files.mapped import StoredTensor, dense, short
from sfumato.weights.files.pickle_names import Leftover
from sfumato.weights.files.pickles import open_pickle
from sfumato.weights.files.safetensors_header import DTYPES
from tests import hostile

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bits(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor, in the order of its indices, to the bit."""
    if not tensor.numel():
        return b""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bits(ours) == bits(theirs)


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits as a tensor; booleans are 0 or 1."""
    count = int(np.prod(shape)) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape)


def torch_file(path: Path, value: object, new: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


# --- safetensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_safetensors_of_every_dtype(tmp_path, dtype):
    tensors = {"a": some(dtype, (3, 4)), "b.c": some(dtype, (2, 1, 6), 1), "none": some(dtype, (0, 2))}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    file = open_tensors(tmp_path / "a.safetensors")
    assert (file.format, file.metadata, file.path) == ("safetensors", {"format": "pt"}, tmp_path / "a.safetensors")
    assert sorted(file.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), dtype)
        assert same(file.read(name), tensor)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
KINDS = st.sampled_from([dtype for dtype in DTYPES.values() if "float4" not in str(dtype)])


@QUICK
@given(
    st.dictionaries(
        st.text(max_size=9).filter(lambda name: name != "__metadata__"), st.tuples(KINDS, SHAPES), min_size=1
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5)) | st.none(),
)
def test_all_that_the_library_writes_is_read(tmp_path, kinds, metadata):
    tensors = {name: some(dtype, shape, place) for place, (name, (dtype, shape)) in enumerate(kinds.items())}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata)
    file = open_tensors(path)
    assert file.metadata == (metadata or {})
    assert sorted(file.names()) == sorted(tensors)
    assert all(same(file.read(name), tensor) for name, tensor in tensors.items())
    loaded, _ = load_safetensors(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def library(path: Path) -> dict[str, torch.Tensor] | None:
    """What the library reads, or None where it refuses."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=5), st.randoms())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_equal_contents_give_equal_bytes(tmp_path, metadata, random):
    names = list(metadata)
    random.shuffle(names)
    save_safetensors(tmp_path / "a", {"x": torch.ones(2)}, metadata)
    save_safetensors(tmp_path / "b", {"x": torch.ones(2)}, {name: metadata[name] for name in names})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert (file.metadata() or {}) == metadata


def test_a_file_of_no_tensors(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {}, {})
    file = open_tensors(tmp_path / "a.safetensors")
    assert (file.names(), file.metadata) == ([], {})


STRICTER = ("twice", "dimensions")  # what we refuse and the library does not


def check_against_library(path: Path) -> bool:
    """Whether both read the file, and alike; ours may only be stricter where it says so."""
    theirs = library(path)
    try:
        file = open_tensors(path)
    except ValueError as error:
        assert theirs is None or any(word in str(error) for word in STRICTER), error
        return False
    assert theirs is not None, path.read_bytes()
    assert sorted(theirs) == sorted(file.names())
    assert all(same(file.read(name), tensor) for name, tensor in theirs.items())
    return True


def test_damaged_headers_are_judged_as_by_the_library(tmp_path):
    rng = random.Random(1)
    entries = {"a": some(torch.float16, (2, 3)), "b": some(torch.int64, (2,)), "c": torch.zeros(0, 3)}
    path = tmp_path / "a.safetensors"
    save_file(entries, path, {"k": "v"})
    good, accepted = path.read_bytes(), 0
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(500):
        data = bytearray(good)
        place = rng.randrange(header)
        data[place] = rng.choice(b'0123456789"{}[]:, -.eabcFIU\\\x00\xff') if place >= 8 else rng.randrange(256)
        path.write_bytes(data)
        accepted += check_against_library(path)
    assert 10 < accepted < 250  # names and metadata may change; offsets, shapes and commas may not


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 1 << 31, (1 << 62) + 1, 1 << 63, (1 << 64) - 1, 1 << 64, -1, 2.0])


@QUICK
@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BOOL", "F4", "C64", "I4", ""]),
                "shape": st.lists(NUMBERS, max_size=3),
                "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
            },
            optional={"extra": st.integers()},
        ),
        max_size=3,
    ),
    st.integers(0, 16),
)
def test_made_up_headers_are_judged_as_by_the_library(tmp_path, header, size):
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile.safetensors(header, bytes(size)))
    check_against_library(path)


def test_spaces_around_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    text = b'  \n{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}} \t\n '
    path.write_bytes(hostile.safetensors(text, b"\x05\x06"))
    assert open_tensors(path).read("a").tolist() == [5, 6]


def test_data_off_its_grid_is_copied(tmp_path):
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]} for name, start in [("a", 0), ("b", 8)]
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4 + 3)
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile.safetensors(text, struct.pack("<4f", 1, 2, 3, 4)))
    tensor = open_tensors(path).read("b")
    assert tensor.tolist() == [3, 4] and tensor.data_ptr() % 4 == 0


# --- torch's files

TORCH_DTYPES = [
    *(dtype for dtype in DTYPES.values()),
    torch.complex128,
    torch.complex32,
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@FORMATS
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_file_of_every_dtype(tmp_path, dtype, new):
    tensors = {"a": some(dtype, (3, 4)), "b.c": some(dtype, (2, 1, 6), 1), "none": some(dtype, (0, 2))}
    file = open_tensors(torch_file(tmp_path / "a.ckpt", tensors, new))
    assert (file.format, file.metadata, file.names()) == ("pickle", {}, list(tensors))
    for name, tensor in tensors.items():
        assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), dtype)
        assert same(file.read(name), tensor)


def strided() -> dict[str, torch.Tensor]:
    base = torch.arange(120, dtype=torch.float32)
    grid = base.view(2, 3, 4, 5)
    return {
        "whole": base, "transposed": grid.transpose(1, 3), "sliced": grid[:, 1:, ::2, 1:4], "scalar": base[7],
        "expanded": base[:3, None].expand(3, 4), "last": base[-1:], "none": base[5:5], "again": base,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3)), "diagonal": grid[0, 0, :, :4].diagonal(),
    }  # fmt: skip


@FORMATS
def test_views_and_shared_storages(tmp_path, new):
    tensors = strided()
    file = open_tensors(torch_file(tmp_path / "a.pt", tensors, new))
    for name, tensor in tensors.items():
        ours = file.read(name)
        assert same(ours, tensor.detach()), name
        assert ours.stride() == tensor.stride(), name
    if new:  # legacy files have their data anywhere, so that these may be copies
        file.read("whole")[7] = -1
        assert file.read("scalar") == -1 and file.read("again")[7] == -1


@FORMATS
def test_as_torch_loads_it(tmp_path, new):
    """Random nests of containers and tensors, against torch's own reader of a file that we wrote ourselves."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    pool = [some(torch.float32, (4, 5)), some(torch.int64, (6,), 1)]
    tensors = st.sampled_from([pool[0], pool[1], pool[0][1:, ::2], pool[0].t(), pool[1][2:4], pool[1][3]])
    nests = st.recursive(
        scalars | tensors,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text(max_size=5) | st.integers(-(2**40), 2**40), inner, max_size=4)
            | st.dictionaries(st.text(max_size=5), inner, max_size=4).map(OrderedDict)
            | st.sets(st.text() | st.integers(-99, 99) | st.binary(), max_size=4)
        ),
        max_leaves=12,
    )

    def equal(ours: object, theirs: object) -> bool:
        if isinstance(theirs, torch.Tensor):
            return isinstance(ours, StoredTensor) and same(ours.read(), theirs)
        if isinstance(theirs, dict):
            assert isinstance(ours, dict) and list(ours) == list(theirs)
            return all(equal(ours[key], theirs[key]) for key in theirs)
        if isinstance(theirs, list | tuple):
            assert type(ours) is type(theirs) and len(ours) == len(theirs)
            return all(map(equal, ours, theirs))
        return type(ours) is type(theirs) and ours == theirs

    @QUICK
    @given(nests)
    def check(value: object) -> None:
        path = torch_file(tmp_path / "a.pt", value, new)
        assert equal(open_pickle(path), torch.load(path, weights_only=False))

    check()


# --- checkpoints as people have them


def foreign(name: str, **members: object) -> type:
    """A class that pretends to come from another package."""
    module, _, plain = name.rpartition(".")
    return type(plain, (), {"__module__": module, **members})


class Trainer:
    """Fake packages in sys.modules for as long as a file is written."""

    def __init__(self, *classes: type) -> None:
        self.classes, self.added = classes, []

    def __enter__(self) -> None:
        for cls in self.classes:
            parts = cls.__module__.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name not in sys.modules:
                    sys.modules[name] = types.ModuleType(name)
                    self.added.append(name)
            setattr(sys.modules[cls.__module__], cls.__name__, cls)

    def __exit__(self, *error: object) -> None:
        for name in self.added:
            del sys.modules[name]


def lightning_checkpoint() -> tuple[dict, tuple[type, ...]]:
    """What Stable Diffusion's own training wrote, small; and the classes in it that nobody has installed."""
    callback = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    attributes = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    config = foreign("omegaconf.dictconfig.DictConfig")
    node = foreign("omegaconf.nodes.AnyNode", __setstate__=lambda self, state: None)
    new_callback = foreign("lightning.pytorch.callbacks.early_stopping.EarlyStopping")
    layer = nn.Linear(4, 2)
    moments = {"step": 1, "exp_avg": torch.ones(2, 4), "exp_avg_sq": torch.ones(2, 4)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    tree = config()
    tree.__dict__ = {"_content": {"lr": node()}, "_parent": None, "flags": [1, {"a": (2,)}]}
    state = OrderedDict(
        [
            ("model.diffusion_model.out.2.weight", layer.weight.detach()),
            ("model.diffusion_model.out.2.bias", layer.bias.detach()),
            ("first_stage_model.x", torch.randn(2, 3, 3, 3).half()),
            ("cond_stage_model.position_ids", torch.arange(77).expand((1, -1))),
            ("model_ema.decay", torch.tensor(0.9999)),
        ]
    )
    state._metadata = {"": {"version": 1}}
    checkpoint = {
        "epoch": 12,
        "global_step": np.int64(470000),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {
            callback: {"best_model_score": torch.tensor(0.5), "dirpath": pathlib.PurePosixPath("/a"), "monitor": None},
            new_callback: {"wait": np.float64(0.25)},
        },
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"last_epoch": 3, "lambdas": [None], "rates": np.ones(3)}],
        "hparams_name": "kwargs",
        "hyper_parameters": attributes(
            unet_config=tree, when=datetime.datetime(2022, 8, 22), args=argparse.Namespace()
        ),
        "loss": np.float32(0.125),
        "counts": Counter("aab"),
        "lists": defaultdict(list, a=[1]),
        "seen": {1, 2},
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    return checkpoint, (callback, attributes, config, node, new_callback)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 5])
def test_lightning_checkpoint(tmp_path, new, protocol):
    checkpoint, classes = lightning_checkpoint()
    path = tmp_path / "sd-v1-4.ckpt"
    with Trainer(*classes):
        torch.save(checkpoint, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    modules = set(sys.modules)
    file = open_tensors(path)
    root = open_pickle(path)
    assert set(sys.modules) - modules == set()
    assert file.names() == list(checkpoint["state_dict"])
    assert all(same(file.read(name), tensor) for name, tensor in checkpoint["state_dict"].items())
    assert file.metadata == {
        "epoch": "12",
        "global_step": "470000",
        "pytorch-lightning_version": "1.4.2",
        "hparams_name": "kwargs",
        "loss": "0.125",
    }
    assert (root["counts"], root["lists"], root["seen"]) == ({"a": 2, "b": 1}, {"a": [1]}, {1, 2})
    assert (root["size"], root["dtype"]) == ((1, 2), torch.float16)
    callbacks = {key.name.rsplit(".", 1)[1]: value for key, value in root["callbacks"].items()}
    assert callbacks["EarlyStopping"] == {"wait": 0.25}
    assert callbacks["ModelCheckpoint"]["best_model_score"].read() == 0.5
    assert isinstance(root["hyper_parameters"], Leftover)
    assert root["optimizer_states"][0]["state"][0]["exp_avg"].read().shape == (2, 4)


def test_what_was_put_aside_is_logged(tmp_path, caplog):
    checkpoint, classes = lightning_checkpoint()
    with Trainer(*classes):
        path = torch_file(tmp_path / "a.ckpt", checkpoint)
    with caplog.at_level("INFO", "sfumato"):
        open_tensors(path)
    assert "put aside" in caplog.text and "ModelCheckpoint" in caplog.text


@FORMATS
def test_embeddings_and_hypernetworks(tmp_path, new):
    """Textual inversion's ParameterDict, and A1111's hypernetworks with whole numbers as names."""
    vector = torch.randn(2, 8)
    embedding = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": nn.ParameterDict({"*": nn.Parameter(vector)}),
        "name": "style",
        "step": 5000,
        "sd_checkpoint": None,
    }
    root = open_pickle(torch_file(tmp_path / "style.pt", embedding, new))
    assert same(root["string_to_param"]["*"].read(), vector)
    assert (root["name"], root["step"], root["sd_checkpoint"]) == ("style", 5000, None)
    file = open_tensors(tmp_path / "style.pt")
    assert file.names() == ["string_to_token.*", "string_to_param.*"]
    assert file.metadata == {"name": "style", "step": "5000"}

    pair = (nn.Linear(2, 3).state_dict(), nn.Linear(3, 2).state_dict())
    layers = {320: pair, "activation_func": "relu", "steps": [1]}
    file = open_tensors(torch_file(tmp_path / "hyper.pt", layers, new))
    assert file.names() == ["320.0.weight", "320.0.bias", "320.1.weight", "320.1.bias"]
    assert file.metadata == {"activation_func": "relu"}
    assert same(file.read("320.1.weight"), pair[1]["weight"])

    tuned = [torch.randn(4, 2), torch.randn(2, 4)]  # a list, as the first LoRA files
    file = open_tensors(torch_file(tmp_path / "lora.pt", tuned, new))
    assert [same(file.read(name), tensor) for name, tensor in zip(["0", "1"], tuned, strict=True)] == [True, True]


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path, protocol, new):
    value = {"a": torch.ones(2), "b": b"\x80\xff", "c": bytearray(b"x"), "d": frozenset("a"), "é": [2**70, -1, 1.5]}
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    root = open_pickle(path)
    assert root["a"].read().tolist() == [1, 1]
    assert (root["b"], bytes(root["c"]), root["d"], root["é"]) == (b"\x80\xff", b"x", {"a"}, [2**70, -1, 1.5])


def test_tensors_with_attributes_are_plain(tmp_path):
    tensor = torch.ones(2)
    tensor.note = {"a": 1}
    assert open_tensors(torch_file(tmp_path / "a.pt", {"a": tensor})).read("a").tolist() == [1, 1]


def test_storages_that_view_others(tmp_path):
    """Before torch 0.4 a storage could be a part of another one: ("its key", start, size) in the persistent id."""
    view = hostile.storage(size=4, tail=hostile.plain(("1", 1, 2)))
    pickled = hostile.named(hostile.tensor(store=view, size=(2,)))
    (tmp_path / "a.pt").write_bytes(hostile.legacy(pickled, storages=struct.pack("<q4f", 4, 1, 2, 3, 4)))
    assert open_tensors(tmp_path / "a.pt").read("weight").tolist() == [2, 3]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_the_files_that_hostile_makes_are_sound_without_the_trick(tmp_path):
    """Otherwise they would be refused for the wrong reason."""
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    pickled = hostile.named(hostile.tensor())
    (tmp_path / "zip").write_bytes(hostile.zipped(pickled, {"0": numbers}))
    pickled = hostile.named(hostile.tensor(store=hostile.storage(tail=hostile.plain(None))))
    (tmp_path / "legacy").write_bytes(hostile.legacy(pickled, storages=struct.pack("<q", 4) + numbers))
    for name in ("zip", "legacy"):
        assert open_tensors(tmp_path / name).read("weight").tolist() == [1, 2, 3, 4]
        assert torch.load(tmp_path / name, weights_only=True)["weight"].tolist() == [1, 2, 3, 4]


def test_state_changes_nothing_but_itself(tmp_path):
    """BUILD on what may be built: the state is dropped, no attribute of ours is set."""
    ordered = hostile.asked("collections", "OrderedDict") + b")R" + hostile.plain({"__class__": 1, "items": 2}) + b"b"
    left = hostile.asked("omegaconf", "DictConfig") + b")\x81" + hostile.plain({"name": "x"}) + b"b"
    tensor = hostile.tensor() + hostile.plain({"read": 1, "source": 2}) + b"b"
    body = b"}(" + hostile.plain("a") + ordered + hostile.plain("b") + left + hostile.plain("c") + tensor + b"u"
    (tmp_path / "a.pt").write_bytes(hostile.zipped(hostile.whole(body)))
    root = open_pickle(tmp_path / "a.pt")
    assert type(root["a"]) is dict and root["a"].items() is not None
    assert root["b"].name == "omegaconf.DictConfig"
    assert root["c"].read().tolist() == [0] * 4


# --- content, not extension


def test_content_decides(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    torch_file(tmp_path / "b.safetensors", {"a": torch.ones(2)})
    torch_file(tmp_path / "c", {"a": torch.ones(2)}, new=False)
    formats = [open_tensors(tmp_path / name).format for name in ("a.ckpt", "b.safetensors", "c")]
    assert formats == ["safetensors", "pickle", "pickle"]
    assert open_tensors(str(tmp_path / "a.ckpt")).read("a").tolist() == [1, 1]
    assert load_safetensors(tmp_path / "a.ckpt")[0]["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="not a readable .safetensors file"):
        load_safetensors(tmp_path / "b.safetensors")


def test_names_that_are_not_there(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    file = open_tensors(tmp_path / "a.safetensors")
    for look in (file.read, file.shape, file.dtype, file.release):
        with pytest.raises(ValueError, match=r"ckpt='.*a.safetensors': there is no tensor 'b'"):
            look("b")


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")  # opening it would wait for ever
    for look in (open_tensors, open_pickle, sha256, old_hash, load_safetensors):
        with pytest.raises(ValueError, match="not a regular file"):
            look(tmp_path / "pipe.ckpt")
        with pytest.raises(ValueError, match="a folder"):
            look(tmp_path)
        with pytest.raises(ValueError, match="no such file"):
            look(tmp_path / "none.ckpt")


# --- lazy


@FORMATS
def test_opening_reads_no_data(tmp_path, new):
    path = torch_file(tmp_path / "a.ckpt", {"a": torch.zeros(4096), "b": torch.full((4096,), 3.0)}, new)
    file = open_tensors(path)
    data = path.read_bytes()
    place = data.index(struct.pack("<f", 3) * 4096)
    with path.open("r+b") as other:
        other.seek(place)
        other.write(struct.pack("<f", 7) * 4096)
    assert (file.read("b") == 7).all()


def test_what_is_written_never_reaches_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(4096)}, path)
    before = path.read_bytes()
    path.chmod(0o400)
    file = open_tensors(path)
    file.read("a").fill_(5)
    assert (file.read("a") == 5).all()  # one map for all readers of a TensorFile
    assert (open_tensors(path).read("a") == 0).all() and path.read_bytes() == before


def test_views_outlive_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.full((100_000,), 2.0)}, path)
    with open_tensors(path) as file:
        tensor = file.read("a")
        part = tensor[5000:6000]
    file.close()
    for look in (file.read, file.shape, file.release):
        with pytest.raises(ValueError, match="closed"):
            look("a")
    del file, tensor
    gc.collect()
    path.unlink()
    assert (part == 2).all()
    assert part.add_(1).sum() == 3000


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


MEGABYTE = 1 << 20
measured = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="nothing to measure memory with")


def sparse_file(path: Path, megabytes: int) -> Path:
    """Two tensors of zeros, half of the file each, without writing them."""
    half = megabytes * MEGABYTE // 2
    spans = {name: [half * place, half * (place + 1)] for place, name in enumerate("ab")}
    header = {
        name: {"dtype": "F32", "shape": [half // 4096, 1024], "data_offsets": span} for name, span in spans.items()
    }
    text = json.dumps(header).encode()
    path.write_bytes(hostile.safetensors(text + b" " * (-len(text) % 8)))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2 * half)
    return path


@measured
def test_memory_of_opening_reading_and_releasing(tmp_path):
    path = sparse_file(tmp_path / "a.safetensors", 300)
    gc.collect()
    start = resident()
    file = open_tensors(path)
    tensors = {name: file.read(name) for name in file.names()}
    assert resident() - start < 5 * MEGABYTE
    assert tensors["a"].sum() == 0
    assert 140 * MEGABYTE < resident() - start < 160 * MEGABYTE
    file.release("a")
    assert resident() - start < 10 * MEGABYTE
    assert tensors["a"][-1, -1] == 0  # still there: read again when it is looked at
    tensors["b"][:1024] = 1
    assert resident() - start > 3 * MEGABYTE
    file.release("b")
    assert resident() - start < 10 * MEGABYTE and tensors["b"][500, 0] == 0  # as said: what was written is gone
    assert tensors["b"][0, 0] == 1  # but for the page that it shares with its neighbour


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files and their maps as Linux has them")
def test_a_file_larger_than_the_memory(tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        path = sparse_file(tmp_path / "a.safetensors", 3 * total // MEGABYTE // 2 * 2)
    except OSError:
        pytest.skip("no room for a sparse file of this size")
    tensor = open_tensors(path).read("b")
    tensor[-1, -1] = 2
    assert tensor.shape[1] == 1024 and tensor[-1, -5:].sum() == 2


@measured
@FORMATS
def test_memory_of_opening_a_torch_file(tmp_path, new):
    path = torch_file(tmp_path / "a.ckpt", {"state_dict": {"a": torch.zeros(12 * MEGABYTE)}}, new)  # 48 MB
    gc.collect()
    start = resident()
    file = open_tensors(path)
    assert resident() - start < 5 * MEGABYTE
    tensor = file.read("a")
    assert resident() - start < (5 if new else 110) * MEGABYTE  # legacy: a copy, and what was read to make it
    assert tensor.sum() == 0
    del tensor
    file.release("a")
    assert resident() - start < 10 * MEGABYTE


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the platform cannot release")
def test_release_leaves_the_neighbours(tmp_path):
    page = mmap.PAGESIZE
    sizes = {"a": 100, "b": 3 * page, "c": page // 2, "d": 5}
    path = tmp_path / "a.safetensors"
    header, place = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
        place += size
    path.write_bytes(hostile.safetensors(header, bytes(place)))
    file = open_tensors(path)
    for name in sizes:
        file.read(name).fill_(9)
    file.release("b")
    for name in "acd":
        assert (file.read(name) == 9).all()
    middle = file.read("b")
    assert (middle == 0).sum() >= 2 * page and (middle[0] == 9 or middle[-1] == 9)
    for name in "acd":
        file.release(name)  # smaller than a page, or the last one of the file
    assert (file.read("a") == 9).all()


# --- damaged and hostile files


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> list[Path]:
    return hostile.hostile_files(tmp_path_factory.mktemp("bad") / "files")


def snapshot(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_size) for path in folder.iterdir()}


def test_hostile_files_are_refused_in_one_line_and_nothing_runs(bad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(bad_files) > 500
    folder = bad_files[0].parent
    before, modules, start = snapshot(folder), set(sys.modules), time.monotonic()
    opened = []
    for path in bad_files:
        try:
            open_tensors(path)
            opened.append(path.name)
        except ValueError as error:
            line = str(error)
            assert line.startswith(f"ckpt={str(path)!r}: ") and line.isprintable() and len(line) <= 300, line
    assert not list(folder.glob(f"{hostile.MARKER}*"))
    assert opened == []
    assert set(sys.modules) - modules == set()
    assert snapshot(folder) == before and not list(tmp_path.iterdir())
    assert time.monotonic() - start < 60


def test_open_pickle_refuses_as_well(bad_files):
    allowed = {"no_named_tensors.pt", "two_of_a_name.pt", "long_name.pt"}  # nothing wrong but the names
    for path in bad_files[::5]:
        if path.name in allowed or path.name.startswith(("deep_set", "memo_bomb", "frame_bomb")):
            continue
        with pytest.raises(ValueError, match="^ckpt="):
            open_pickle(path)


def test_the_payloads_would_work(bad_files, tmp_path):
    """A free unpickler runs them: so they test something."""
    marker = tmp_path / "ran"
    for name in ("os.system", "builtins.exec", "io.open"):
        body = hostile.payloads(marker)[name]
        pickle.loads(hostile.whole(body))
        assert marker.is_file()
        marker.unlink()


@pytest.mark.parametrize("name", ["os.system", "posix.system", "subprocess.Popen", "torch.load", "functools.partial"])
def test_the_line_names_what_was_asked_for(tmp_path, name):
    path = tmp_path / "x.ckpt"
    path.write_bytes(hostile.zipped(hostile.named(hostile.payloads(tmp_path / "m")[name])))
    with pytest.raises(ValueError) as caught:
        open_tensors(path)
    assert str(caught.value) == (
        f"ckpt={str(path)!r}: the pickle asks for {name}, which no checkpoint needs: refused, nothing was run"
    )


def test_registered_extensions_are_not_used(tmp_path):
    copyreg.add_extension("os", "system", 0x42)
    try:
        body = b"\x82\x42" + hostile.plain((f"touch '{tmp_path / 'ran'}'",)) + b"R"
        pickle.loads(hostile.whole(b"\x82\x42"))  # now in pickle's cache, too, which find_class never sees
        (tmp_path / "a.pt").write_bytes(hostile.zipped(hostile.named(body)))
        with pytest.raises(ValueError, match="EXT1"):
            open_tensors(tmp_path / "a.pt")
    finally:
        copyreg.remove_extension("os", "system", 0x42)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_bytes_never_do_worse_than_a_line(tmp_path, kind):
    """Any byte of a file changed: another tensor, or one ValueError. Never another exception."""
    rng = random.Random(kind)
    path = tmp_path / "a.ckpt"
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4).half().expand(2, 4), "c": torch.zeros(0)}
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch_file(path, {"state_dict": tensors, "epoch": 3, "size": np.float64(2)}, kind == "zip")
    good, refused = path.read_bytes(), 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.choice((0, 0xFF, 0x2E, 0x52, 0x85, 0x94, rng.randrange(256)))
        path.write_bytes(data)
        try:
            file = open_tensors(path)
            for name in file.names():
                file.read(name).sum()
        except ValueError as error:
            assert str(error).startswith("ckpt=") and str(error).isprintable() and len(str(error)) <= 300
            refused += 1
    assert refused > 80


@QUICK
@given(
    st.lists(st.sampled_from([bytes([code]) for code in range(256)] + list(hostile.tensors().values())), max_size=30)
)
def test_random_opcodes_never_do_worse_than_a_line(tmp_path, parts):
    path = tmp_path / "a.pt"
    for data in (hostile.zipped(b"\x80\x02" + b"".join(parts) + b"."), b"\x80\x02" + b"".join(parts) + bytes(8)):
        path.write_bytes(data)
        try:
            open_tensors(path)
        except ValueError as error:
            assert str(error).isprintable()


def test_zip_names_lead_nowhere(tmp_path):
    """A name that climbs is a name like any other: nothing is unpacked."""
    data = hostile.zipped(hostile.named(hostile.tensor(store=hostile.storage("../../../b"))), {"../../../b": bytes(16)})
    (tmp_path / "a.pt").write_bytes(data)
    assert open_tensors(tmp_path / "a.pt").shape("weight") == (4,)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_short_never_looks_deep():
    nest: list = []
    for _ in range(100):
        nest = [nest, nest]
    texts = [short(value) for value in (nest, "a\nb" * 1000, b"\0" * 1000, 1 << 10**6, {1: 2}, (1, "a"), None, 2.5)]
    assert all(len(text) <= 80 and text.isprintable() for text in texts)
    assert texts[3:] == ["a huge number", "<dict>", "[1, 'a']", "None", "2.5"]


@given(SHAPES)
def test_dense_strides(shape):
    assert dense(shape) == torch.empty(shape).stride()


# --- hashes


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def digests(monkeypatch) -> list[Path]:
    """The files that were really read."""
    read: list[Path] = []
    original = hashes._digest
    monkeypatch.setattr(hashes, "_digest", lambda path: read.append(path) or original(path))
    return read


def settled(path: Path, data: bytes, age: float = 100) -> Path:
    path.write_bytes(data)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_hashes(tmp_path, cache):
    data = random.Random(0).randbytes(0x100000 + 0x18000)
    path = settled(tmp_path / "a.bin", data)
    assert sha256(path) == hashlib.sha256(data).hexdigest()
    assert file_hash(str(path)) == hashlib.sha256(data).hexdigest()[:10]
    assert old_hash(path) == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert old_hash(settled(tmp_path / "b.bin", b"x")) == hashlib.sha256(b"").hexdigest()[:8]


def test_hash_is_kept_until_the_file_changes(tmp_path, cache, digests):
    path = settled(tmp_path / "a.bin", b"one")
    (tmp_path / "link.bin").symlink_to(path)
    first = sha256(path)
    assert sha256(tmp_path / "link.bin") == first == sha256(path) and len(digests) == 1
    assert json.loads(cache.read_text())[str(path.resolve())]["sha256"] == first
    settled(path, b"two", age=50)
    assert sha256(path) == hashlib.sha256(b"two").hexdigest() and len(digests) == 2
    settled(path, b"three", age=50)
    assert sha256(path) == hashlib.sha256(b"three").hexdigest() and len(digests) == 3
    assert len(json.loads(cache.read_text())) == 1
    assert [entry.name for entry in cache.parent.iterdir()] == ["hashes.json"]


def test_hash_of_a_young_file_is_not_kept(tmp_path, cache, digests):
    path = tmp_path / "a.bin"
    for content in (b"one", b"two"):  # the same size, and with bad luck the same tick
        path.write_bytes(content)
        assert sha256(path) == hashlib.sha256(content).hexdigest()
    assert not cache.exists() and len(digests) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": 1}', b"\xff", b"[" * 100_000, b"HERE", b'{"HERE": {"sha256": "zz"}}',
     b'{"HERE": {"sha256": 3, "size": 3, "mtime_ns": 0}}', b'{"HERE": []}'],
)  # fmt: skip
def test_damaged_cache_is_no_error(tmp_path, cache, content):
    path = settled(tmp_path / "a.bin", b"one")
    cache.parent.mkdir()
    cache.write_bytes(content.replace(b"HERE", str(path).encode()))
    for _ in range(2):
        assert sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert json.loads(cache.read_text())[str(path)]["size"] == 3


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, digests):
    path = settled(tmp_path / "a.bin", b"one")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file" / "below"))
    assert sha256(path) == sha256(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "hashes.json").mkdir(parents=True)
    assert sha256(path) == hashlib.sha256(b"one").hexdigest() and len(digests) == 3
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["hashes.json"]


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SFUMATO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hashes.cache_folder() == tmp_path / "sfumato"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hashes.cache_folder() == tmp_path / "home" / ".cache" / "sfumato"


# --- writing


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_is_what_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_saving_what_was_read(tmp_path):
    """Views of a map, strided and shared ones among them, over the very file that they come from."""
    tensors = strided()
    file = open_tensors(torch_file(tmp_path / "a.safetensors", tensors))
    save_safetensors(tmp_path / "a.safetensors", {name: file.read(name) for name in file.names()}, {"k": "v"})
    saved, metadata = load_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"} and sorted(saved) == sorted(tensors)
    assert all(same(saved[name], tensor.detach()) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_shared_memory_is_written_twice(tmp_path):
    base = torch.arange(6.0)
    tensors = {"a": base, "b": base, "c": base[2:], "d": base.view(2, 3).t()}
    save_safetensors(tmp_path / "a.safetensors", tensors, {})
    saved, _ = load_safetensors(tmp_path / "a.safetensors")
    assert all(same(saved[name], tensor) for name, tensor in tensors.items())


def test_compressed_entries_are_refused_however_they_say_it(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", hostile.named(hostile.tensor()))
        archive.writestr(zipfile.ZipInfo("archive/data/0"), bytes(10_000), zipfile.ZIP_DEFLATED)
    (tmp_path / "a.pt").write_bytes(out.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        open_tensors(tmp_path / "a.pt")
