"""Programs that try to read, reach, keep or use more than they are allowed to."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from marlhf_mega.rewards import sandbox
from marlhf_mega.rewards.rule import RuleReward
from marlhf_mega.rewards.sandbox import MIB, Limits, run_python, sandbox_problem

PROBLEM = sandbox_problem()
isolated = pytest.mark.skipif(PROBLEM is not None, reason=f"no namespaces here: {PROBLEM}")


def run(program, **options):
    return run_python({"main.py": program}, **options)


@isolated
def test_a_program_gets_its_input_and_its_output_comes_back():
    outcome = run("print(input().upper())", stdin="word\n")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "WORD\n", "")


@isolated
def test_files_outside_cannot_be_read_or_even_seen(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    secret.chmod(0o644)
    outcome = run(f"print(open({str(secret)!r}).read())")
    assert outcome.code == 1
    assert "FileNotFoundError" in outcome.stderr
    listing = run("import os; print(sorted(os.listdir('/')))").stdout
    assert "home" not in listing
    assert "var" not in listing
    assert Path.home().name not in run("import os; print(os.listdir('/home'))").stdout


@isolated
def test_environment_and_processes_outside_cannot_be_seen(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "the secret")
    program = """
import os, pathlib
print(dict(os.environ))
for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
        print(path, path.read_bytes())
    except OSError as error:
        print(path, error)
"""
    outcome = run(program)
    assert outcome.code == 0
    assert "secret" not in outcome.stdout
    assert f"/proc/{os.getpid()}/" not in outcome.stdout


@isolated
def test_no_socket_reaches_even_this_machine():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    program = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
    outcome = run(program)
    assert outcome.code == 1
    assert "Network is unreachable" in outcome.stderr or "refused" in outcome.stderr
    server.settimeout(0.1)
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


@isolated
def test_only_tmp_is_writable_and_is_gone_afterwards():
    program = """
import os, sys
for folder in ("/", "/usr", sys.base_prefix, sys.base_prefix + "/lib", "/dev", "/etc"):
    try:
        open(folder + "/left_behind", "w")
    except OSError:
        continue
    print("wrote to", folder)
open("/tmp/fits", "w").write("x")
"""
    assert run(program).stdout == ""
    assert "fits" not in run("import os; print(os.listdir('/tmp'))").stdout
    assert not Path("/tmp/fits").exists()
    assert not Path(sys.base_prefix, "left_behind").exists()


@isolated
def test_the_disk_cannot_be_filled():
    program = """
import os
total = 0
try:
    for number in range(100):
        with open(f"/tmp/{number}", "wb", buffering=0) as file:
            for _ in range(4):
                total += file.write(b"x" * (1 << 20))
except OSError as error:
    print(error.strerror, total >> 20)
"""
    outcome = run(program, limits=Limits(disk_bytes=16 * MIB))
    assert outcome.stdout.startswith("No space left on device 1")


@isolated
def test_the_size_of_files_and_output_is_limited():
    outcome = run("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert outcome.code != 0
    assert len(outcome.stdout) <= Limits().file_bytes


@isolated
def test_memory_is_limited():
    outcome = run("x = bytearray(2 << 30)")
    assert outcome.code == 1
    assert "MemoryError" in outcome.stderr


@isolated
def test_processes_are_limited_and_all_end_with_the_program():
    name, rename = _own_name()
    program = f"""{rename}
import os, time
count = 0
try:
    while count < 1000:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        count += 1
except OSError as error:
    print(type(error).__name__, count)
"""
    outcome = run(program)
    error, count = outcome.stdout.split()
    assert error == "BlockingIOError"
    assert int(count) < Limits().processes
    assert _processes_called(name) == []


@isolated
def test_a_time_out_ends_a_program_and_all_its_descendants():
    name, rename = _own_name()
    program = f"""{rename}
import os, signal, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
time.sleep(600)
"""
    start = time.monotonic()
    outcome = run(program, limits=Limits(wall_seconds=0.7))
    assert outcome.code is None
    assert time.monotonic() - start < 5
    assert _processes_called(name) == []


def _own_name():
    """Return a name for this test's processes, and the code that takes it: others run beside."""
    name = f"left-{os.getpid()}"
    return name, f"import ctypes; assert not ctypes.CDLL(None).prctl(15, {name.encode()})"


def _processes_called(name):
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == name:
                found.append(path)
    return found


@isolated
def test_there_is_no_capability_and_no_way_to_get_one():
    program = """
import ctypes, os
status = open("/proc/self/status").read()
print([line for line in status.splitlines() if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))])
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
"""
    lines = run(program).stdout.splitlines()
    assert lines[0].count("0000000000000000") == 2
    assert "NoNewPrivs:\\t1" in lines[0]
    assert lines[1] == "-1 -1"


@isolated
def test_concurrent_programs_do_not_interfere():
    results = {}

    def one(number):
        results[number] = run(
            f"open('/tmp/n', 'w').write('{number}'); print(open('/tmp/n').read())"
        )

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[n].stdout for n in range(8)] == [f"{n}\n" for n in range(8)]


def test_without_isolation_limits_still_hold():
    assert run("print(1)", mode="off").stdout == "1\n"
    assert "MemoryError" in run("x = bytearray(2 << 30)", mode="off").stderr
    assert run("while True: pass", mode="off", limits=Limits(wall_seconds=0.5)).code is None


NO_NAMESPACES = "sandbox: [Errno 1] unshare: Operation not permitted"
CODE = "marlhf_mega.rewards.code:compiler_signal"


def test_untrusted_code_is_refused_without_namespaces(monkeypatch):
    monkeypatch.setattr("marlhf_mega.rewards.rule.sandbox_problem", lambda: NO_NAMESPACES)
    with pytest.raises(ValueError, match="needs user namespaces") as caught:
        RuleReward(CODE)
    assert str(caught.value) == (
        f"reward.source={CODE}: needs user namespaces to isolate untrusted programs; "
        f"{NO_NAMESPACES}. Allow user namespaces on this machine, or add sandbox: off to the "
        "source to run these programs with all rights of this user."
    )
    RuleReward(CODE, sandbox="off").close()


def _as_another_user(program):
    """Run Python as the only user of a namespace, without rights outside it."""
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


nested = pytest.mark.skipif(
    PROBLEM is not None or _as_another_user("").returncode != 0, reason="needs unshare(1)"
)


@nested
def test_a_kernel_that_forbids_namespaces_is_detected():
    program = (
        "from pathlib import Path\n"
        "Path('/proc/sys/user/max_user_namespaces').write_text('0')\n"
        "from marlhf_mega.rewards.sandbox import sandbox_problem\n"
        "print(sandbox_problem())\n"
    )
    expected = "sandbox: [Errno 28] unshare: No space left on device"
    assert _as_another_user(program).stdout.startswith(expected)


@nested
def test_a_user_without_rights_can_isolate_too():
    inner = "print(__import__('os').listdir('/tmp')); open('/usr/x', 'w')"
    program = (
        "from marlhf_mega.rewards.sandbox import run_python\n"
        f"print(run_python({{'main.py': {inner!r}}}))\n"
    )
    done = _as_another_user(program)
    assert "code=1" in done.stdout, done.stderr
    assert "['main.py']" in done.stdout
    assert "Read-only file system" in done.stdout


def test_a_child_without_an_answer_is_an_error(monkeypatch, tmp_path):
    silent = tmp_path / "silent.py"
    silent.write_text("")
    monkeypatch.setattr(sandbox, "CHILD", silent)
    with pytest.raises(RuntimeError, match="sandbox: was killed"):
        run("print(1)")
