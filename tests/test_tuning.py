"""Launch configurations: the ladder, and what becomes of files that are wrong, half-written, hostile or contended for."""

import json
import os
import random
import subprocess
import sys
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from triton_moe import tuning
from triton_moe.compiler import candidates
from triton_moe.kernels import attention, common, gating, sets
from triton_moe.tuning import ConfigError, Device, Entry, Key

HERE = Device("Test GPU 9000 (rev. 2)", "sm_90", 232448)
SISTER = Device("Test GPU 9001", "sm_90", 232448)
OTHER = Device("Test GPU 8000", "sm_80", 166912)
DEFAULT = {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
TUNED = {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
WIDTHS = {"H": 4, "P": 128}


def key(n=4096, dtype="half", **widths) -> Key:
    return Key("gather", dtype, tuple(sorted((WIDTHS | widths).items())), (n,))


def entry(n=4096, source=None, config=None, **widths) -> Entry:
    source = source or tuning.source_hash(sets._gather_kernel)
    return Entry(key(n, **widths), source, config or TUNED, "3.6.0", 90_000, 100_000, 1_000)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The only place where configurations are looked for, as the first of the three."""
    monkeypatch.setenv("TRITON_MOE_CONFIG_DIR", str(tmp_path / "first"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "folders", lambda: [tmp_path / "first", tuning.user_folder()])
    tuning.reload()
    yield tmp_path / "first"
    tuning.reload()


def found(n=4096, device=HERE, **widths):
    tuning.reload()
    return tuning.resolve(sets._gather_kernel, key(n, **widths), device)


# ---- the ladder


def test_this_device_first_then_its_architecture_then_the_default(folder):
    assert found().kind == "default"
    tuning.save(folder, "sets", SISTER, [entry()])
    assert (found().kind, found().config) == ("borrowed", TUNED) and SISTER.name in found().why
    tuning.save(folder, "sets", HERE, [entry(config=TUNED | {"num_stages": 3})])
    assert (found().kind, found().config["num_stages"]) == ("exact", 3)
    assert found(device=OTHER).kind == "default"


def test_the_callers_folder_comes_before_the_users(folder):
    tuning.save(tuning.user_folder(), "sets", HERE, [entry(config=TUNED | {"num_stages": 3})])
    assert found().config["num_stages"] == 3
    tuning.save(folder, "sets", HERE, [entry()])
    assert found().config == TUNED


def test_widths_are_exact_and_sizes_about_right(folder):
    tuning.save(folder, "sets", HERE, [entry(4096), entry(32768, config=TUNED | {"num_stages": 3})])
    assert found(5000).config == found(8191).config == found(2048).config == TUNED
    assert found(65536).config["num_stages"] == found(16384).config["num_stages"] == 3
    assert "sizes" in found(1 << 20).why and found(1 << 20).config is found(1000).config is None
    assert found(P=100).config is None


def test_an_entry_of_another_source_is_stale(folder):
    tuning.save(folder, "sets", HERE, [entry(source="0" * 16)])
    assert found()[:2] == (None, "default") and found().stale == 1 and "stale" in found().why


FOLDERS = tuning.folders


def test_the_folders_are_the_callers_the_users_and_the_packages(folder, tmp_path, monkeypatch):
    first, user, shipped = FOLDERS()
    assert (first, user, user) == (folder, tmp_path / "cache" / "triton_moe" / "autotune_configs", tuning.user_folder())
    assert (shipped / "README.md").exists() and shipped.name == "autotune_configs"
    monkeypatch.delenv("TRITON_MOE_CONFIG_DIR")
    assert FOLDERS() == [user, shipped]


def test_the_layers_do_not_even_import_the_tuner():
    code = "import sys, triton_moe.nn; print([m for m in sys.modules if m.endswith(('.autotune', '.measure'))])"
    env = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert result.stdout.strip() == "[]", result.stderr
    kernels = Path(common.__file__).parent
    assert not [path for path in kernels.rglob("*.py") if "@triton.autotune" in path.read_text()]


def test_lookup_asks_the_files_once(folder, monkeypatch):
    tuning.save(folder, "sets", HERE, [entry()])
    monkeypatch.setattr(tuning, "this_device", lambda device: HERE)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    args = sets._gather_kernel, DEFAULT | {"PARTS": 2}, x, (4096,)
    assert tuning.lookup(*args, **WIDTHS) == TUNED | {"PARTS": 2}
    monkeypatch.setattr(tuning, "resolve", None)
    assert tuning.lookup(*args, **WIDTHS) == TUNED | {"PARTS": 2}
    seconds = min(timeit.repeat(lambda: tuning.lookup(*args, **WIDTHS), number=1000, repeat=9)) / 1000
    assert seconds < 50e-6


def test_the_interpreter_and_meta_tensors_keep_the_default():
    for device in ("cpu", "meta"):
        assert tuning.lookup(sets._gather_kernel, DEFAULT, torch.empty(1, device=device), (4096,), **WIDTHS) is DEFAULT


def test_a_default_that_needs_too_much_shared_memory_runs_with_fewer_stages():
    class Kernel:
        __name__ = "_kernel"

        def __init__(self, name):
            self.name, self.tried = name, []

        def __getitem__(self, grid):
            def run(*args, num_stages, **meta):
                self.tried.append((grid, args, num_stages, meta))
                if num_stages > 2:
                    raise OutOfResources(147456, 101376, self.name)

            return run

    kernel = Kernel("shared memory")
    with pytest.warns(UserWarning, match="autotune"):
        common.compile_and_start(kernel, (3,), ("x",), {"num_stages": 4, "BLOCK_M": 64})
    assert kernel.tried == [((3,), ("x",), stages, {"BLOCK_M": 64}) for stages in (4, 3, 2)]
    common.compile_and_start(kernel, (3,), (), {"num_stages": 4})  # said once
    with pytest.raises(OutOfResources):
        common.compile_and_start(Kernel("threads"), (3,), (), {"num_stages": 4})


def test_digest_tells_what_may_be_chosen(folder):
    nothing = tuning.digest(HERE)
    tuning.save(folder, "sets", OTHER, [entry()])
    tuning.reload()
    assert tuning.digest(HERE) == nothing
    tuning.save(folder, "sets", HERE, [entry()])
    tuning.reload()
    assert tuning.digest(HERE) != nothing


def test_the_source_hash_is_of_the_program():
    hashes = {tuning.source_hash(k) for k in (sets._gather_kernel, sets._spread_kernel, attention._attention_fwd_kernel)}
    assert len(hashes) == 3
    a = tuning._tokens('def f(x):\n    """Text."""\n    # words\n    return x + 1\n')
    assert a == tuning._tokens("def f(x):\n    return x+1") != tuning._tokens("def f(x):\n    return x + 2")
    code = "from triton_moe import tuning; from triton_moe.kernels import gating as g; "
    code += "print(tuning.source_hash(g._gating_fwd_kernel))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(Path(__file__).parents[1])}
    compiled = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert compiled.stdout.strip() == tuning.source_hash(gating._gating_fwd_kernel), compiled.stderr


def test_no_shipped_entry_is_invalid_or_stale():
    root = Path(__file__).parents[1] / "autotune_configs"
    for path in root.glob("*.*"):
        assert path.name == "README.md" or path.suffix == ".json"
    for path in root.glob("*.json"):
        file = tuning.read(path)
        assert file.entries
        op = path.name.partition(".")[0]
        kernels, spaces = tuning.kernels(op), tuning.space(op)
        assert [e.key for e in file.entries if e.source != tuning.source_hash(kernels[e.key.kernel])] == []
        for e in file.entries:  # the tuner would find it again
            space = spaces[e.key.kernel]
            assert e.config in candidates(space, e.key, {name: values[0] for name, values in space.items()})


def test_every_space_names_a_kernel_and_its_parameters():
    for op in tuning.OPS:
        module = __import__(f"triton_moe.kernels.{op}", fromlist=[op])
        for name, space in module.SPACE.items():
            arguments = getattr(module, f"_{name}_kernel").arg_names
            assert all(k in arguments or k in ("num_warps", "num_stages") for k in space), name
            assert all(v > 0 and v & (v - 1) == 0 for k, values in space.items() if k != "num_stages" for v in values)


# ---- files


def valid() -> bytes:
    return tuning.dump("sets", HERE, [entry(), entry(9000), entry(P=64)], Path(tuning.file_name("sets", HERE)))


def harmless(data: bytes) -> bool:
    """Whether `data` was accepted; anything but acceptance of allowed values or a ConfigError is a failure."""
    try:
        file = tuning.parse(Path(tuning.file_name("sets", HERE)), data)
    except ConfigError as error:
        assert str(error).startswith("sets.Test_GPU_9000_rev_2.json: ")
        return False
    for e in file.entries:
        space = sets.SPACE[e.key.kernel]
        assert list(e.config) == list(space) and all(type(v) is int and v in space[k] for k, v in e.config.items())
        assert all(type(n) is int and n >= 0 for n in (*e.key.sizes, *dict(e.key.widths).values(), e.ns, e.default_ns))
    return True


def test_a_valid_file_comes_back(folder):
    path = tuning.save(folder, "sets", HERE, [entry(), entry(9000)])
    file = tuning.read(path)
    assert (file.device, file.entries) == (HERE, [entry(), entry(9000)])
    assert path.name == "sets.Test_GPU_9000_rev_2.json" and [p.name for p in folder.iterdir()] == [path.name]


def test_ten_thousand_broken_files():
    data, faults, accepted = valid(), 0, 0
    for cut in range(len(data) - 1):
        accepted += harmless(data[:cut])
        faults += 1
    for place in range(len(data)):
        for bit in range(8):
            accepted += harmless(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            faults += 1
    rng = random.Random(0)
    while faults < 12_000:
        a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(40)
        accepted += harmless(data[:a] + data[b : b + n] + data[a + rng.randrange(n + 1) :])
        faults += 1
    assert 0 < accepted < faults / 2  # some bits make another valid number or device name


HOSTILE = {
    "another kernel's code": {"config": TUNED | {"ir_override": "/tmp/x.ptx"}},
    "assembler options": {"config": TUNED | {"ptx_options": "-optf /etc/hostname"}},
    "a library": {"config": TUNED | {"extern_libs": {"libdevice": "x.bc"}}},
    "a missing value": {"config": {k: v for k, v in TUNED.items() if k != "num_warps"}},
    "a string": {"config": TUNED | {"num_warps": "4"}},
    "a float": {"config": TUNED | {"num_warps": 4.0}},
    "a bool": {"config": TUNED | {"num_warps": True}},
    "stages that take hours": {"config": TUNED | {"num_stages": 10**9}},
    "no power of two": {"config": TUNED | {"BLOCK_M": 48}},
    "a tile larger than the table's": {"config": TUNED | {"BLOCK_M": 256}},
    "a negative tile": {"config": TUNED | {"BLOCK_M": -64}},
    "another kernel": {"kernel": "../../x"},
    "no kernel": {"kernel": ["gather"]},
    "a wrong dtype": {"dtype": "float64"},
    "a list as dtype": {"dtype": ["half"]},
    "a negative width": {"widths": {"P": -1}},
    "a nested width": {"widths": {"P": {"P": 1}}},
    "an odd name of a width": {"widths": {"P\n": 1}},
    "a size that is not whole": {"sizes": [1.5]},
    "too many sizes": {"sizes": [1] * 5},
    "no source": {"source": "abc"},
    "a long source": {"source": "0" * 17},
    "an unknown field": {"run": "x"},
    "null": {"config": None},
    "a time that is not one": {"ns": -5},
}


@pytest.mark.parametrize("what", HOSTILE, ids=str)
def test_a_hostile_entry_is_refused_by_name(what):
    document = json.loads(valid())
    document["entries"][1] |= HOSTILE[what]
    with pytest.raises(ConfigError, match=r"entry 1|only integers are allowed"):
        tuning.parse(Path(tuning.file_name("sets", HERE)), json.dumps(document).encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema": NaN}', "only integers"),
        (b'{"schema": 1e999}', "only integers"),
        (b'{"schema": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"schema": 1, "schema": 1}', "twice"),
        (b'{"schema": 2, "op": "sets", "device": {}, "entries": []}', "schema"),
        (b'{"schema": 1, "op": "os", "device": {}, "entries": []}', "op"),
        (b'{"schema": 1, "op": "sets", "device": [], "entries": []}', "device"),
        (b"[]", "object"),
        (b" " * (1 << 20) + b"{}", "larger than"),
    ],
)
def test_a_document_that_is_none(data, message):
    with pytest.raises(ConfigError, match=message):
        tuning.parse(Path(tuning.file_name("sets", HERE)), data)


def test_a_file_under_another_name_or_twice_the_same(folder):
    path = tuning.save(folder, "sets", HERE, [entry()])
    with pytest.raises(ConfigError, match="must be called"):
        tuning.read(path.rename(folder / "sets.Other.json"))
    with pytest.raises(ConfigError, match="entry 1: an earlier entry"):
        tuning.dump("sets", HERE, [entry(4096), entry(5000)], Path(tuning.file_name("sets", HERE)))
    with pytest.raises(ConfigError, match="No such file"):
        tuning.read(folder / "sets.Nothing.json")


def test_an_invalid_file_is_said_once_and_not_used(folder):
    tuning.save(folder, "sets", SISTER, [entry()])
    path = tuning.save(folder, "sets", HERE, [entry()])
    path.write_bytes(path.read_bytes()[:-9])
    tuning.reload()
    with pytest.warns(UserWarning, match="ignored.*sets.Test_GPU_9000"):
        assert tuning.resolve(sets._gather_kernel, key(), HERE).kind == "borrowed"
    assert tuning.resolve(sets._gather_kernel, key(), HERE).kind == "borrowed"  # and no warning
    before = path.read_bytes()
    with pytest.raises(ConfigError):  # nor is it overwritten
        tuning.save(folder, "sets", HERE, [entry()])
    assert path.read_bytes() == before


def test_a_folder_that_others_may_write_to_is_refused():
    folder = tuning.user_folder()
    tuning.save(folder, "sets", HERE, [entry()])
    assert found().kind == "exact"
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="chmod go-w"):
        assert found().kind == "default"


@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_a_disk_that_cannot_be_written_leaves_the_file_as_it_was(folder, monkeypatch, step):
    path = tuning.save(folder, "sets", HERE, [entry()])

    def fail(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tuning.tempfile if step == "mkstemp" else tuning.os, step, fail)
    with pytest.raises(OSError, match="Read-only"):
        tuning.save(folder, "sets", HERE, [entry(100)])
    monkeypatch.undo()
    assert tuning.read(path).entries == [entry()]
    assert [p.name for p in folder.iterdir()] == [path.name]


# Run without pytest's threads: writers that are killed at any moment, that run out of disk, or that are two.
WRITERS = """
import os, random, resource, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_tuning import HERE, entry
from triton_moe import tuning

folder = Path(sys.argv[1])
path = folder / tuning.file_name("sets", HERE)

def child(work):
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            work(lambda: os.write(write, b"."))
        finally:
            os._exit(0)
    os.close(write)
    return pid, read

def committed(read):
    count = 0
    while part := os.read(read, 1 << 16):
        count += len(part)
    os.close(read)
    return count

def writer(start, stop=40):
    def work(done):
        for i in range(start, stop):
            tuning.save(folder, "sets", HERE, [entry(1, P=i)])
            done()
    return work

rng = random.Random(0)
for trial in range(60):
    path.unlink(missing_ok=True)
    pid, read = child(writer(0))
    time.sleep(rng.random() * 0.03)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    n = committed(read)
    assert n <= (len(tuning.read(path).entries) if path.exists() else 0) <= n + 1, (trial, n)

path.unlink(missing_ok=True)
pids = [child(writer(a, a + 30)) for a in (0, 100, 200)]
for pid, read in pids:
    assert committed(read) == 30
    os.waitpid(pid, 0)
assert len(tuning.read(path).entries) == 90

def full(done):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        tuning.save(folder, "sets", HERE, [entry(7)])
    except OSError:
        done()
pid, read = child(full)
assert committed(read) == 1
os.waitpid(pid, 0)
assert len(tuning.read(path).entries) == 90
print("survived")
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_writers_that_are_killed_or_two_or_out_of_disk_lose_nothing(folder):
    folder.mkdir()
    here = Path(__file__).parent
    command = [sys.executable, "-c", WRITERS, str(folder), str(here), str(here.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout == "survived\n", result.stderr
