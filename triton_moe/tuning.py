"""Which launch configuration a kernel gets: one tuned for this GPU, or its default. The only reader and writer of the files.

A launcher works out its default and hands it to `lookup`, which returns it as it is or with tuned values in it. A file holds
data only. Its values must be among those that the kernel's own search space declares (`SPACE` beside its `CONFIGS`), so
nothing else ever reaches a launch; anything unexpected in a file is a ConfigError that names the file, entry and key.

NOTE [Ladder]
    An entry serves a kernel, a kind of dtype, exact widths (constants of a model), and token counts of about its size: the same
    power of two, else a neighbouring one. It is looked for in TRITON_MOE_CONFIG_DIR, the user's folder and the package, first
    for this very device, then for others of its architecture ("borrowed"). Where there is none the default stays, and a default
    that wants more shared memory than a block has is launched with fewer stages (`launch` in kernels/common.py). An entry is
    stale, and not used, when its kernel's source has changed since.
"""

import hashlib
import importlib
import inspect
import io
import json
import os
import re
import stat
import tempfile
import tokenize
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

SCHEMA = 1
OPS = ("attention", "gating", "mlp", "projection", "sets")  # the files and folders of kernels/ that declare a SPACE
MAX_BYTES = 1 << 20
MAX_ENTRIES = 4096
MAX_VALUE = 1 << 40


class ConfigError(ValueError):
    """A file of launch configurations that cannot be trusted; the message names the file, the entry and the key."""


class Key(NamedTuple):
    """What an entry is for."""

    kernel: str  # "gather" is _gather_kernel
    dtype: str  # "half" (float16 and bfloat16) or "float32"
    widths: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]  # token counts and the like, matched by their powers of two


class Entry(NamedTuple):
    key: Key
    source: str  # of the kernel: `source_hash`
    config: dict[str, int]
    triton: str
    ns: int  # measured, and the default beside it
    default_ns: int
    noise_ns: int


class Device(NamedTuple):
    name: str
    arch: str  # "sm_90"
    shared: int  # bytes a block may have


class File(NamedTuple):
    path: Path
    device: Device
    entries: list[Entry]


class Found(NamedTuple):
    """The answer of `resolve`: config is None for the default; kind is exact, borrowed or default."""

    config: dict[str, int] | None
    kind: str
    why: str
    stale: int = 0


# ---- lookup

# What `lookup` asks instead, with (kernel, key, default), when it is set: the tuner forces configurations with it.
override: Callable[[Any, Key, dict[str, int]], dict[str, int]] | None = None
_resolved: dict[tuple, dict[str, int] | None] = {}
generation = 0  # of the files read


def lookup(kernel, default: dict[str, int], x: torch.Tensor, sizes: tuple[int, ...] = (), **widths: int) -> dict[str, int]:
    """`default`, or with the values tuned for `kernel` on x's device. Not to be changed by the caller."""
    if override is not None:
        return override(kernel, _key(kernel, x, sizes, widths), default)
    device = x.device
    if device.index is None:  # of a CPU, for the interpreter, or meta
        return default
    at = (kernel.fn, x.dtype, device.index, *[n.bit_length() for n in sizes], *widths.values())
    try:
        config = _resolved[at]
    except KeyError:
        config = _resolved[at] = resolve(kernel, _key(kernel, x, sizes, widths), this_device(device)).config
    return default if config is None else default | config


@contextmanager
def overriding(function: Callable[[Any, Key, dict[str, int]], dict[str, int]]):
    global override
    before, override = override, function
    try:
        yield
    finally:
        override = before


def reload() -> None:
    """Read the files again at the next lookup."""
    global generation
    generation += 1
    _resolved.clear()
    files.cache_clear()


def _key(kernel, x: torch.Tensor, sizes: tuple[int, ...], widths: dict[str, int]) -> Key:
    dtype = "float32" if x.dtype == torch.float32 else "half"
    return Key(kernel_name(kernel), dtype, tuple(sorted((k, int(v)) for k, v in widths.items())), tuple(sizes))


def kernel_name(kernel) -> str:
    return kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")


def op_of(kernel) -> str:
    return kernel.fn.__module__.removeprefix(f"{__package__}.kernels.").partition(".")[0]


@cache
def this_device(device: torch.device) -> Device:
    p = torch.cuda.get_device_properties(device)
    arch = p.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return Device(p.name, arch, getattr(p, "shared_memory_per_block_optin", 0))


def resolve(kernel, key: Key, device: Device) -> Found:
    """NOTE [Ladder]"""
    source, stale, none = source_hash(kernel), 0, f"nothing tuned for {device.name} or another {device.arch} at these widths"
    for kind in ("exact", "borrowed"):
        for file in files(op_of(kernel)):
            if file.device.arch != device.arch or (file.device.name == device.name) != (kind == "exact"):
                continue
            near = []
            for entry in file.entries:
                if entry.key[:3] != key[:3] or len(entry.key.sizes) != len(key.sizes):
                    continue
                pairs = zip(key.sizes, entry.key.sizes, strict=True)
                apart = max((abs(a.bit_length() - b.bit_length()) for a, b in pairs), default=0)
                if apart > 1:
                    none = f"tuned at these widths for sizes {entry.key.sizes} only, these are {key.sizes}"
                elif entry.source != source:
                    stale += 1
                    none = f"the entry in {file.path} is stale: the kernel has changed since"
                else:
                    near.append((apart, entry))
            if near:
                _, entry = min(near, key=lambda pair: pair[0])
                return Found(entry.config, kind, f"{file.path}, tuned on {file.device.name}", stale)
    return Found(None, "default", none, stale)


@cache
def source_hash(kernel) -> str:
    """Of the tokens of a kernel and all that it calls of ours: comments, docstrings and layout do not count."""
    seen: dict[str, str] = {}

    def visit(fn):
        if fn.__qualname__ in seen:
            return
        seen[fn.__qualname__] = _tokens(inspect.getsource(fn))
        for name in sorted(_names(fn.__code__)):
            value = fn.__globals__.get(name)
            inner = getattr(value, "fn", None)
            if inspect.isfunction(inner) and inner.__module__.startswith(__package__ + "."):
                visit(inner)
            elif hasattr(value, "value") or isinstance(value, (int, float, str)):
                seen[name] = repr(getattr(value, "value", value))

    visit(kernel.fn)
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _names(code) -> set[str]:
    inner = (c for c in code.co_consts if inspect.iscode(c))
    return set(code.co_names).union(*map(_names, inner))


def _tokens(source: str) -> str:
    words, statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + source)).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if token.type != tokenize.NEWLINE or not statement:  # a docstring leaves an empty statement
                words.append({tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}[token.type])
            statement = True
            continue
        if token.type == tokenize.STRING and statement:
            continue
        words.append(token.string)
        statement = False
    return " ".join(words)


# ---- files


def folders() -> list[Path]:
    """Where configurations are looked for, first wins."""
    package = Path(__file__).parent
    shipped = package / "autotune_configs"
    first = os.environ.get("TRITON_MOE_CONFIG_DIR")
    return [*([Path(first)] if first else []), user_folder(), shipped if shipped.is_dir() else package.parent / shipped.name]


def user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triton_moe" / "autotune_configs"


@cache
def files(op: str) -> list[File]:
    """The valid files of an op; the others are warned of, once."""
    found = []
    for path, problem in _candidates(op):
        try:
            if problem:
                raise ConfigError(problem)
            found.append(read(path))
        except ConfigError as error:
            warnings.warn(f"launch configurations ignored: {error}", stacklevel=2)
    return found


def _candidates(op: str) -> Iterable[tuple[Path, str]]:
    for folder in folders():
        try:
            paths = sorted(folder.glob(f"{op}.*.json"))
            shared = folder == user_folder() and stat.S_IMODE(folder.stat().st_mode) & 0o022
        except OSError:
            continue
        for path in paths:
            yield path, f"{path}: others may write to {folder}; chmod go-w {folder}" if shared else ""


def read(path: Path) -> File:
    """A file, every value of which has been checked; ConfigError if anything is not as `save` writes it."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return parse(path, data)


def parse(path: Path, data: bytes) -> File:
    def fail(where: str, what: str):
        raise ConfigError(f"{path}: {where}: {what}" if where else f"{path}: {what}")

    def pairs(items):
        keys = [key for key, _ in items]
        if len(keys) != len(set(keys)):
            fail("", f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return dict(items)

    def fields(where: str, value, *names: str) -> list:
        if type(value) is not dict:
            fail(where, f"must be an object, got {_short(value)}")
        for name in value:
            if name not in names:
                fail(where, f"unknown key {_short(name)}")
        for name in names:
            if name not in value:
                fail(where, f"key {name!r} is missing")
        return [value[name] for name in names]

    def integer(where: str, value, low: int, high: int = MAX_VALUE) -> int:
        if type(value) is not int or not low <= value <= high:
            fail(where, f"must be an integer from {low} to {high}, got {_short(value)}")
        return value

    def text(where: str, value, pattern: str) -> str:
        if type(value) is not str or not re.fullmatch(pattern, value, re.ASCII):
            fail(where, f"must look like {pattern}, got {_short(value)}")
        return value

    if len(data) > MAX_BYTES:
        fail("", f"larger than {MAX_BYTES} bytes")
    try:
        raw = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_float=lambda number: fail("", f"only integers are allowed, got {_short(number)}"),
            parse_constant=lambda number: fail("", f"only integers are allowed, got {number}"),
        )
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        fail("", f"not JSON: {_short(str(error))}")
    schema, op, device, entries = fields("", raw, "schema", "op", "device", "entries")
    integer("schema", schema, SCHEMA, SCHEMA)
    if type(op) is not str or op not in OPS:
        fail("op", f"must be one of {', '.join(OPS)}, got {_short(op)}")
    name, arch, shared = fields("device", device, "name", "arch", "shared")
    where = Device(
        text("device: name", name, r"[\w ()/.+-]{1,80}"),
        text("device: arch", arch, r"[a-z0-9_]{2,16}"),
        integer("device: shared", shared, 0, 1 << 24),
    )
    if path.name != file_name(op, where):
        fail("", f"must be called {file_name(op, where)}, by its op and device")
    if type(entries) is not list or len(entries) > MAX_ENTRIES:
        fail("entries", f"must be a list of at most {MAX_ENTRIES}")
    spaces, found = space(op), {}
    for i, item in enumerate(entries):
        at = f"entry {i}"
        kernel, source, dtype, widths, sizes, config, triton, *times = fields(at, item, *ENTRY)
        if type(kernel) is not str or kernel not in spaces:
            fail(f"{at}: kernel", f"must be one of {', '.join(spaces)}, got {_short(kernel)}")
        if dtype not in ("half", "float32"):
            fail(f"{at}: dtype", f"must be half or float32, got {_short(dtype)}")
        names = widths if type(widths) is dict else [""]
        if len(names) > 16 or not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,15}", name) for name in names):
            fail(f"{at}: widths", f"must be an object of at most 16 names, got {_short(widths)}")
        if type(sizes) is not list or len(sizes) > 4:
            fail(f"{at}: sizes", f"must be a list of at most 4, got {_short(sizes)}")
        values = fields(f"{at}: config", config, *spaces[kernel])
        for (key, allowed), value in zip(spaces[kernel].items(), values, strict=True):
            if type(value) is not int or value not in allowed:
                fail(f"{at}: config: {key}", f"must be one of {', '.join(map(str, allowed))}, got {_short(value)}")
        identity = Key(
            kernel,
            dtype,
            tuple(sorted((k, integer(f"{at}: widths: {k}", v, 0)) for k, v in widths.items())),
            tuple(integer(f"{at}: sizes", n, 0) for n in sizes),
        )
        if (same := _identity(identity)) in found:
            fail(at, "an earlier entry is for the same widths and sizes")
        found[same] = Entry(
            identity,
            text(f"{at}: source", source, "[0-9a-f]{16}"),
            dict(config),
            text(f"{at}: triton", triton, r"[\w.+-]{1,40}"),
            *(integer(f"{at}: {key}", value, 0) for key, value in zip(ENTRY[-3:], times, strict=True)),
        )
    return File(path, where, list(found.values()))


ENTRY = ("kernel", "source", "dtype", "widths", "sizes", "config", "triton", "ns", "default_ns", "noise_ns")


def space(op: str) -> dict[str, dict[str, list[int]]]:
    return importlib.import_module(f"{__package__}.kernels.{op}").SPACE


def kernels(op: str) -> dict[str, Any]:
    """Those that may be tuned."""
    module = importlib.import_module(f"{__package__}.kernels.{op}")
    return {name: getattr(module, f"_{name}_kernel") for name in module.SPACE}


def file_name(op: str, device: Device) -> str:
    return f"{op}.{re.sub(r'[^A-Za-z0-9]+', '_', device.name).strip('_')}.json"


def _identity(key: Key) -> tuple:
    return *key[:3], tuple(n.bit_length() for n in key.sizes)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def save(folder: Path, op: str, device: Device, entries: list[Entry]) -> Path:
    """Put `entries` into the op's file in `folder` beside those that others wrote, all or none of them."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    path = folder / file_name(op, device)
    with _locked(folder):
        kept = {_identity(e.key): e for e in read(path).entries} if path.exists() else {}
        kept |= {_identity(e.key): e for e in entries}
        write_atomically(path, dump(op, device, sorted(kept.values(), key=lambda e: e.key), path))
    return path


def dump(op: str, device: Device, entries: list[Entry], path: Path) -> bytes:
    rows = [
        {
            **dict(zip(ENTRY, (e.key.kernel, e.source, e.key.dtype, dict(e.key.widths), e.key.sizes), strict=False)),
            "config": e.config,
        }
        | {"triton": e.triton, "ns": e.ns, "default_ns": e.default_ns, "noise_ns": e.noise_ns}
        for e in entries
    ]
    head = json.dumps({"schema": SCHEMA, "op": op, "device": device._asdict()})[:-1]
    data = (head + ', "entries": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n").encode()
    parse(path, data)  # what could not be read again is not written
    return data


@contextmanager
def _locked(folder: Path):
    import fcntl

    path = folder / ".lock"
    while True:
        with open(path, "a") as file:  # the lock goes with the process
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                held = False
            if held:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)  # whoever waits for it finds it gone, and makes another
                return


def write_atomically(path: Path, data: bytes) -> None:
    """Either the whole file or what was there before, whatever happens in between."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


# ---- what would be used


def explain(op: str, dtype: str = "bfloat16", device: Device | None = None, **shape) -> list[str]:
    """For every launch of an op's forward and backward at `shape`, the configuration it gets and why, a line each.

    tuning.explain("projection", H=4, E=4, TOP_K=2, P=128, D=1024)
    """
    from .compiler import lookups

    if device is None and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU: say for which device=tuning.Device(name, arch, shared)")
    device = this_device(torch.device("cuda", torch.cuda.current_device())) if device is None else device
    lines = []
    for kernel, key, default in lookups(op, device.arch, dtype, shape):
        found = resolve(kernel, key, device)
        values = " ".join(f"{k}={v}" for k, v in (default | (found.config or {})).items())
        widths = " ".join(f"{k}={v}" for k, v in key.widths)
        lines.append(f"{key.kernel} ({widths}; sizes {key.sizes}): {values}. {found.kind}: {found.why}")
    return lines


def digest(device: Device | None = None) -> str:
    """Of this architecture, the kernels, and the entries that lookups on this device could find: where it is equal, two machines
    with the same version of the package choose alike."""
    device = this_device(torch.device("cuda", torch.cuda.current_device())) if device is None else device
    sources = {name: source_hash(kernel) for op in OPS for name, kernel in kernels(op).items()}
    rows = [
        (op, file.device.name == device.name, entry.key, sorted(entry.config.items()))
        for op in OPS
        for file in files(op)
        if file.device.arch == device.arch
        for entry in file.entries
        if entry.source == sources[entry.key.kernel]
    ]
    return hashlib.sha256(json.dumps([device.arch, sources, rows]).encode()).hexdigest()[:16]
