"""Files that no loader may swallow: damaged, mislabelled, and pickles that try to run something.

`hostile_files(folder)` writes them. Each payload would create `folder / MARKER` or a file that begins with it.
Everything is made by this program; nothing here is loaded with pickle.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

MARKER = "executed"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


# --- writing pickles opcode by opcode


def plain(value: object) -> bytes:
    """The opcodes that make a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def asked(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def asked_late(module: object, name: object) -> bytes:
    """STACK_GLOBAL."""
    return plain(module) + plain(name) + b"\x93"


def called(function: bytes, *args: object) -> bytes:
    return function + plain(args) + b"R"


def whole(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def storage(key: object = "0", size: object = 4, kind: bytes = b"", tail: bytes = b"") -> bytes:
    """MARK "storage", type, key, "cpu", size, TUPLE, BINPERSID. Legacy files have a view, mostly None, at its end."""
    kind = kind or asked("torch", "FloatStorage")
    return b"(" + plain("storage") + kind + plain(key) + plain("cpu") + plain(size) + tail + b"tQ"


def tensor(
    store: bytes = b"", offset: object = 0, size: object = (4,), stride: object = (1,), tail: bytes = b""
) -> bytes:
    hooks = asked("collections", "OrderedDict") + b")R"
    parts = (store or storage()) + plain(offset) + plain(size) + plain(stride) + plain(False) + hooks + tail
    return asked("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"tR"


def named(body: bytes) -> bytes:
    """A whole pickle of {"weight": body}."""
    return whole(b"}" + plain("weight") + body + b"s")


# --- containers


def zipped(
    pickled: bytes, storages: dict[str, bytes] | None = None, byteorder: bytes = b"little", method: int = 0
) -> bytes:
    """As torch.save writes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression=method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in (storages if storages is not None else {"0": bytes(16)}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def legacy(pickled: bytes, keys: object = ("0",), storages: bytes | None = None, little: object = True) -> bytes:
    """As torch.save(..., _use_new_zipfile_serialization=False) writes."""
    system = {"protocol_version": PROTOCOL, "little_endian": little, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    keys = list(keys) if isinstance(keys, tuple) else keys
    data = struct.pack("<q", 4) + bytes(16) if storages is None else storages
    return (
        b"".join(pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, system)) + pickled + pickle.dumps(keys, 2) + data
    )


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# --- what the files hold


def payloads(marker: Path) -> dict[str, bytes]:
    """Bodies of pickles that would create `marker` with a free unpickler, or do something else at once."""
    command, code = f"touch '{marker}'", f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": [command], "posix.system": [command], "nt.system": [command], "os.popen": [command],
        "subprocess.Popen": [["touch", str(marker)]], "subprocess.call": [["touch", str(marker)]],
        "subprocess.check_output": [["touch", str(marker)]], "subprocess.getoutput": [command],
        "builtins.eval": [code], "builtins.exec": [code], "__builtin__.eval": [code], "__builtin__.exec": [code],
        "builtins.open": [str(marker), "w"], "io.open": [str(marker), "w"], "pathlib.Path.touch": [str(marker)],
        "builtins.__import__": ["os"], "builtins.getattr": ["os", "system"], "builtins.setattr": ["a", "b", "c"],
        "builtins.compile": [code, "x", "exec"], "builtins.breakpoint": [], "builtins.globals": [],
        "builtins.map": [str, "ab"], "importlib.import_module": ["os"], "runpy.run_path": [str(marker)],
        "runpy.run_module": ["this"], "webbrowser.open": ["http://127.0.0.1:9/"], "torch.load": [str(marker)],
        "torch.save": [1, str(marker)], "torch.hub.load": ["a", "b"], "torch.jit.load": [str(marker)],
        "torch.storage._load_from_bytes": [b"x"], "torch.from_file": [str(marker)], "torch.set_num_threads": [1],
        "torch.serialization.load": [str(marker)], "torch._dynamo.guards.GuardBuilder.get": [code],
        "torch.utils.cpp_extension.load": ["a", str(marker)], "torch.utils.collect_env.run": [command],
        "torch._inductor.codecache.compile_file": [str(marker)], "torch.nn.Module": [],
        "functools.partial": [str, 1], "functools.reduce": [str, "ab"], "operator.attrgetter": ["system"],
        "operator.methodcaller": ["system", command], "itertools.starmap": [str, "ab"], "types.FunctionType": [1],
        "types.CodeType": [1], "code.interact": [], "timeit.timeit": [code], "cProfile.run": [code],
        "pdb.run": [code], "bdb.Bdb.run": [code], "pty.spawn": [["touch", str(marker)]], "ctypes.CDLL": ["libc.so.6"],
        "socket.create_connection": [["127.0.0.1", 9]], "shutil.copy": ["/dev/null", str(marker)],
        "pickle.loads": [b"N."], "_pickle.loads": [b"N."], "marshal.loads": [b"N"], "dill.loads": [b"N."],
        "cloudpickle.loads": [b"N."], "joblib.load": [str(marker)], "numpy.load": [str(marker), None, True],
        "numpy.core.multiarray.fromfile": [str(marker)], "numpy.testing._private.utils.runstring": [code, []],
        "sys.exit": [3], "os._exit": [3], "os.abort": [], "os.remove": [str(marker)], "signal.raise_signal": [9],
        "time.sleep": [600], "logging.config.listen": [], "asyncio.create_subprocess_shell": [command],
        "pip.main": [["install", "x"]], "__main__.main": [], "sfumato.cli.main.main": [["txt2img"]],
        "weakref.ref": [1], "codecs.open": [str(marker), "w"], "_codecs.decode": [b"x", "zlib"],
        "collections.namedtuple": ["a", "b"], "argparse.FileType": ["w"], "copyreg.__newobj__": [1],
        "copyreg.add_extension": ["os", "system", 1], "__builtin__.apply": [str, []], "lightnings.Thing": [],
    }  # fmt: skip
    return {name: called(asked(*name.rsplit(".", 1)), *args) for name, args in calls.items()}


def tricks(marker: Path) -> dict[str, bytes]:
    """Whole pickles that go round a naive list of allowed names, or that cost a naive reader its memory or life."""
    command, argv = f"touch '{marker}'", (["touch", str(marker)],)
    late = asked_late("posix", "system") + plain((command,)) + b"R"
    orders = asked("collections", "OrderedDict")
    deep, nested = b")" + b"\x85" * 60_000, b"]" * 500 + b"a" * 499
    laughs = b"]q\x00" + b"".join(b"0(h%ch%clq%c" % (n, n, n + 1) for n in range(60))
    names = [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("collections", "OrderedDict.__init__.__globals__"),
        ("torch", "_utils._rebuild_tensor_v2"), ("torch", "os.system"), ("torch", "serialization.os.system"),
        ("pytorch_lightning", "os.system"), ("pytorch_lightning.utilities", "os.system"), ("omegaconf", "a('os')"),
        ("omegaconf.omegaconf", "os.system"), ("pathlib", "os.system"), ("datetime", "sys.modules"),
        ("pathlib.os", "path.join"), ("numpy", "os"), ("numpy.core.multiarray", "scalar.__class__"),
        ("builtins", "object.__subclasses__"), ("", "eval"), ("builtins", ""), ("builtins\n", "eval"), (1, 2),
    ]  # fmt: skip
    pickles = {
        "stack_global": whole(late),
        "inst": b"(S'" + command.replace("'", '"').encode() + b"'\niposix\nsystem\n.",
        "obj": whole(b"(" + asked("posix", "system") + plain(command) + b"o"),
        "newobj": whole(asked("subprocess", "Popen") + plain(argv) + b"\x81"),
        "newobj_ex": whole(asked("subprocess", "Popen") + plain(argv) + plain({"shell": 0}) + b"\x92"),
        "inner": named(late),
        "as_key": whole(b"}" + late + plain(1) + b"s"),
        "as_state": whole(orders + b")R" + late + b"b"),
        "as_argument": named(tensor(offset=0, tail=late)),
        "as_storage": named(tensor(store=late)),
        "as_storage_type": named(tensor(store=storage(kind=asked("posix", "system")))),
        "as_persistent_id": named(late + b"Q"),
        "as_module": named(b"(" + plain("module") + asked("posix", "system") + plain("a.py") + plain("code") + b"tQ"),
        "by_rebuild": named(asked("torch._tensor", "_rebuild_from_type_v2") + b"(" + asked("posix", "system")
                            + asked("torch", "Tensor") + plain((command,)) + plain({}) + b"tR"),
        "by_rebuild_itself": named(asked("torch._tensor", "_rebuild_from_type_v2") + b"("
                                   + asked("torch._tensor", "_rebuild_from_type_v2") + b"NNNtR"),
        "by_reconstructor": named(asked("copyreg", "_reconstructor") + b"(" + asked("posix", "system") + b"NNtR"),
        "by_default_dict": named(asked("collections", "defaultdict") + b"(" + asked("posix", "system") + b"tR"),
        "by_getitem": named(asked("operator", "getitem") + b"(" + orders + b"NtR"),
        "ext1": named(b"\x82\x01"),
        "ext2": named(b"\x83\x01\x00"),
        "ext4": named(b"\x84\x01\x00\x00\x00"),
        "out_of_band": named(b"\x97"),
        "state_of_a_function": whole(orders + plain({"__globals__": 1}) + b"b"),
        "state_of_a_dtype": whole(asked("torch", "float32") + plain({"itemsize": 1}) + b"b"),
        "state_of_text": whole(plain("a") + plain({"b": 1}) + b"b"),
        "call_of_text": whole(plain("os.system") + plain((command,)) + b"R"),
        "call_of_a_storage_type": whole(called(asked("torch", "FloatStorage"), 1 << 40)),
        "call_of_a_tensor": whole(tensor() + b")R"),
        "call_without_a_tuple": whole(orders + b"]R"),
        "call_with_keywords": whole(orders + b")" + plain({"a": 1}) + b"\x92"),
        "bytes_of_a_number": whole(called(asked("builtins", "bytearray"), 1 << 40)),
        "encode_with_a_codec": whole(called(asked("_codecs", "encode"), "x", "zlib")),
        "persistent_text": whole(b"Pos.system\n"),
        "persistent_number": named(plain(7) + b"Q"),
        "persistent_short": named(plain(("storage",)) + b"Q"),
        "deep_key": whole(b"}" + deep + b"NsR"),
        "deep_set": whole(b"\x8f(" + deep + b"\x90"),
        "deep_nest": whole(nested),
        "billion_laughs": whole(laughs),
        "billion_laughs_called": whole(orders + b"(" + laughs + b"tR"),
        "cycle": whole(b"]q\x00h\x00a"),
        "cycle_in_dict": whole(b"}q\x09" + plain("a") + b"h\x09s"),
        "memo_bomb": whole(b"Nr\xff\xff\xff\x7f"),
        "long_bomb": whole(b"\x8b\xff\xff\xff\x7f"),
        "long_negative": whole(b"\x8b\xff\xff\xff\xff"),
        "digits_bomb": whole(b"L" + b"9" * 100_000 + b"L\n"),
        "bytes_bomb": whole(b"\x8e" + struct.pack("<Q", 1 << 60) + b"x"),
        "bytes_bomb_40": whole(b"\x8e" + struct.pack("<Q", 1 << 40) + b"x"),
        "text_bomb": whole(b"\x8d" + struct.pack("<Q", 1 << 63) + b"x"),
        "frame_bomb": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        "copy_bomb": whole(b"(" + b"N" * 50_000 + b"lq\x00" + asked("builtins", "list") + b"q\x01"
                           + b"h\x01h\x00\x85R" * 200 + b"t"),
        "nothing_on_the_stack": whole(b"R"),
        "nothing_at_all": b"\x80\x02........",
        "mark_left": whole(b"(N"),
        "two_results": whole(b"NN"),
        "memo_missing": whole(b"h\x05"),
        "unknown_opcode": whole(b"\xff"),
        "endless": b"\x80\x02" + b"N" * 100,
        "key_without_value": whole(b"}(NNNu"),
        "append_to_text": whole(plain("a") + b"Na"),
        "not_utf8": whole(b"X\x02\x00\x00\x00\xff\xff"),
        "bad_number": whole(b"Iabc\n"),
    }  # fmt: skip
    return pickles | {f"name_{place}": whole(asked_late(*name)) for place, name in enumerate(names)}


def tensors() -> dict[str, bytes]:
    """Whole pickles of tensors that do not lie within the storage "0" of four float32."""
    parameter = asked("torch._utils", "_rebuild_parameter")
    version_3 = asked("torch._utils", "_rebuild_tensor_v3")
    bodies = {
        "too_long": tensor(size=(5,)),
        "offset": tensor(offset=1),
        "offset_negative": tensor(offset=-1),
        "offset_huge": tensor(offset=1 << 70),
        "stride": tensor(size=(2, 2), stride=(3, 1)),
        "stride_negative": tensor(offset=3, stride=(-1,)),
        "stride_count": tensor(size=(2, 2), stride=(1,)),
        "size_negative": tensor(size=(-4,)),
        "size_huge": tensor(size=(1 << 62, 1 << 62), stride=(0, 0)),
        "size_huge_and_none": tensor(size=(0, 1 << 62, 1 << 62), stride=(1, 1, 1)),
        "size_repeats": tensor(size=(1 << 40,), stride=(0,)),
        "size_float": tensor(size=(4.0,)),
        "size_bool": tensor(size=(True,)),
        "size_text": tensor(size="4"),
        "size_of_many": tensor(size=(1,) * 1000, stride=(1,) * 1000),
        "conjugated": tensor(tail=plain({"conj": True})),
        "no_storage": tensor(store=plain("0")),
        "missing_storage": tensor(store=storage("1")),
        "path_storage": tensor(store=storage("../../../etc/passwd")),
        "number_storage": tensor(store=storage(0)),
        "storage_too_long": tensor(store=storage(size=5), size=(5,)),
        "storage_too_wide": tensor(store=storage(kind=asked("torch", "DoubleStorage"))),
        "storage_negative": tensor(store=storage(size=-4)),
        "storage_huge": tensor(store=storage(size=1 << 62), size=(1 << 61,)),
        "storage_text": tensor(store=storage(size="4")),
        "view_outside": tensor(store=storage(tail=plain(("1", 2, 3)))),
        "view_of_nothing": tensor(store=storage(tail=plain("view"))),
        "quantised": called(asked("torch._utils", "_rebuild_qtensor"), 1),
        "sparse": called(asked("torch._utils", "_rebuild_sparse_tensor"), 1),
        "parameter_of_nothing": called(parameter, None, True, None),
        "parameter_without": called(parameter),
        "version_3_without_type": version_3 + b"(" + storage() + plain(0) + plain((4,)) + plain((1,)) + b"NNNtR",
    }
    return {name: named(body) for name, body in bodies.items()}


def safetensors_files() -> Iterator[tuple[str, bytes]]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    data, text = bytes(8), json.dumps(entry)
    for name, change in {
        "dtype": {"dtype": "F128"}, "dtype_lines": {"dtype": "F\n32\x1b[2J" * 50}, "dtype_number": {"dtype": 32},
        "shape_wrong": {"shape": [3]}, "shape_negative": {"shape": [-2]}, "shape_float": {"shape": [2.0]},
        "shape_bool": {"shape": [True, 2]}, "shape_text": {"shape": "2"}, "shape_huge": {"shape": [1 << 62, 1 << 62]},
        "shape_overflow": {"shape": [1 << 63, 2]}, "shape_of_many": {"shape": [1] * 100_000 + [2]},
        "offsets_behind": {"data_offsets": [8, 16]}, "offsets_reversed": {"data_offsets": [8, 0]},
        "offsets_negative": {"data_offsets": [-8, 0]}, "offsets_three": {"data_offsets": [0, 8, 8]},
        "offsets_long": {"data_offsets": [0, 1 << 70]}, "offsets_none": {"data_offsets": None},
        "four_bits_odd": {"dtype": "F4", "shape": [15]}, "four_bits_scalar": {"dtype": "F4", "shape": []},
    }.items():  # fmt: skip
        yield name, safetensors({"a": entry | change}, data)
    for name, header in {
        "gap": {"a": entry, "b": entry | {"data_offsets": [16, 24]}},
        "overlap": {"a": entry, "b": entry | {"data_offsets": [4, 12]}},
        "twice_the_same": {"a": entry, "b": entry},
        "metadata_number": {"__metadata__": {"a": 1}, "a": entry},
        "metadata_list": {"__metadata__": [], "a": entry},
        "entry_list": {"a": [1]}, "entry_none": {"a": None}, "entry_empty": {"a": {}},
    }.items():  # fmt: skip
        yield name, safetensors(header, bytes(24))
    for name, header in {
        "duplicate": f'{{"a": {text}, "a": {text}}}', "duplicate_escaped": f'{{"a": {text}, "\\u0061": {text}}}',
        "nan": f'{{"a": {text}, "b": NaN}}', "comma": f'{{"a": {text},}}', "nul": f'{{"a": {text}}}\0',
        "surrogate": f'{{"\\ud800": {text}}}', "list": "[]", "open": f'{{"a": {text}', "deep": '{"a":' * 100_000,
        "deep_list": '{"a":' + "[" * 100_000, "digits": '{"a":' + "9" * 100_000 + "}",
    }.items():  # fmt: skip
        yield name, safetensors(header.encode(), data)
    yield "not_utf8", safetensors(b'{"\xff": 1}')
    yield "byte_order_mark", safetensors(b"\xef\xbb\xbf{}")
    yield "trailing", safetensors({"a": entry}, bytes(9))
    yield "no_data", safetensors({"a": entry})
    yield "length_absurd", safetensors({"a": entry}, data, length=(1 << 64) - 1)
    yield "length_long", safetensors({"a": entry}, data, length=99_999_999)
    yield "length_short", safetensors({"a": entry}, data, length=20)
    yield "length_zero", safetensors({"a": entry}, data, length=0)
    good = save({"a": torch.ones(2, 3), "b": torch.ones(4)}, {"format": "pt"})
    for cut in (*range(1, 12), 40, len(good) - 41, len(good) - 1):
        yield f"cut_{cut}", good[:cut]
    for bit in range(0, 64, 3):  # any other length is wrong
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"flipped_{bit}", bytes(flipped)


def torch_files() -> Iterator[tuple[str, bytes]]:
    for kind, new in (("zip", True), ("legacy", False)):
        out = io.BytesIO()
        torch.save({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, out, _use_new_zipfile_serialization=new)
        good = out.getvalue()
        for part in range(1, 40):
            yield f"{kind}_cut_{part}", good[: len(good) * part // 40]
        yield f"{kind}_cut_last", good[:-1]
    good = named(tensor())
    yield "zip_big_endian", zipped(good, byteorder=b"big")
    yield "zip_deflated", zipped(good, method=zipfile.ZIP_DEFLATED)
    yield "zip_bomb", zipped(bytes(100 << 20), method=zipfile.ZIP_DEFLATED)
    yield "zip_without_storages", zipped(good, {})
    yield "zip_short_storage", zipped(good, {"0": bytes(15)})
    script = io.BytesIO(zipped(good))
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("archive/constants.pkl", b"N.")
    yield "zip_script", script.getvalue()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    yield "zip_document", other.getvalue()
    yield "zip_with_nothing", b"PK\x05\x06" + bytes(18)
    whole_zip = zipped(good)
    central = whole_zip.index(b"PK\x01\x02")
    yield "zip_entry_elsewhere", whole_zip[: central + 42] + struct.pack("<I", 1) + whole_zip[central + 46 :]
    yield "zip_entry_outside", whole_zip[: central + 42] + struct.pack("<I", 1 << 31) + whole_zip[central + 46 :]
    yield "zip_encrypted", whole_zip[: central + 8] + b"\x01\x00" + whole_zip[central + 10 :]
    yield "zip_names_of_no_code", whole_zip.replace(b"archive/data/0", b"\xff\xfe\xfdhive/data/0")
    yield "zip_two_of_a_name", whole_zip.replace(b"archive/version", b"archive/data/00").replace(b"a/00", b"a/0\0")
    yield "legacy_big_endian", legacy(good, little=False)
    yield "legacy_keys", legacy(good, keys=("1",))
    yield "legacy_keys_none", legacy(good, keys=None)
    yield "legacy_keys_twice", legacy(good, keys=("0", "0"))
    yield "legacy_no_keys", legacy(good, keys=())
    yield "legacy_size", legacy(good, storages=struct.pack("<q", 5) + bytes(16))
    yield "legacy_size_negative", legacy(good, storages=struct.pack("<q", -1) + bytes(16))
    yield "legacy_short", legacy(good, storages=struct.pack("<q", 4) + bytes(15))
    yield "no_named_tensors", zipped(whole(tensor()))
    yield "two_of_a_name", zipped(whole(b"}(" + plain(1) + tensor() + plain("1") + tensor() + b"u"))
    yield "long_name", zipped(whole(b"}" + plain("a" * 5000) + tensor() + b"s"))


def other_files() -> Iterator[tuple[str, bytes]]:
    """By their whole names."""
    yield "empty.safetensors", b""
    yield "empty.ckpt", b""
    yield "text.ckpt", b"These are not weights.\n" * 40
    yield "text.safetensors", "Nor are these: äöü\n".encode() * 40
    yield "page.safetensors", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    yield "list.safetensors", b'{"a": 1}'
    yield "picture.ckpt", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "zeros.safetensors", bytes(4096)
    yield "ones.ckpt", b"\xff" * 4096
    yield "llama.safetensors", b"GGUF" + bytes(100)
    yield "tar.pt", b"a/b" + bytes(254) + b"ustar" + bytes(253)
    yield "old.ckpt", b"\x80\x02"
    yield "none.ckpt", pickle.dumps(None, 2)
    yield "bare.pt", pickle.dumps({"weights": [1.0, 2.0]}, 4)
    yield "protocol0.pt", pickle.dumps({"weights": [1.0, 2.0]}, 0)


def hostile_files(folder: Path) -> list[Path]:
    """Write all of them into `folder`; with a folder and a missing file, which are no files either."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    contents: dict[str, bytes] = dict(other_files())
    extensions = ("ckpt", "pt", "safetensors", "pth", "bin")
    for place, (name, body) in enumerate(payloads(marker).items()):
        ends = [extensions[(place + step) % len(extensions)] for step in range(3)]
        contents[f"{name}.bare.{ends[0]}"] = whole(body)
        contents[f"{name}.zip.{ends[1]}"] = zipped(named(body))
        contents[f"{name}.legacy.{ends[2]}"] = legacy(named(body))
    text = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    contents |= {"protocol0.ckpt": text, "protocol0.legacy.ckpt": legacy(text), "first.ckpt": text + legacy(b"N.")}
    for name, pickled in tricks(marker).items():
        contents[f"{name}.zip.ckpt"] = zipped(pickled)
        contents[f"{name}.legacy.pt"] = legacy(pickled, keys=(), storages=b"")
        contents[f"{name}.bare.safetensors"] = pickled
    for name, pickled in tensors().items():
        contents[f"tensor_{name}.zip.pt"] = zipped(pickled)
        contents[f"tensor_{name}.legacy.pt"] = legacy(pickled)
    contents |= {f"{name}.safetensors": data for name, data in safetensors_files()}
    contents |= {f"{name}.pt": data for name, data in torch_files()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "folder.safetensors").mkdir()
    return [*(folder / name for name in contents), folder / "folder.safetensors", folder / "missing.ckpt"]
