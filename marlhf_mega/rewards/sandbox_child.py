"""The process that creates a sandbox; started by `sandbox.py`, standard library only.

    this process    new user, mount, network, process, ipc and host-name namespaces; time limit
      first         process 1 of the sandbox: its own root, read-only except for a small /tmp
        program     no capabilities, another user where possible, resource limits

After a time-out the first process is killed, and the kernel ends all its descendants.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x2, 0x4, 0x8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 0x1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
NOBODY = 65534
SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def main(settings_path: str, answers: int) -> None:
    """Run one program according to the settings file; report its end as JSON on `answers`."""
    settings = json.loads(Path(settings_path).read_text())
    try:
        is_other_user = _enter_namespaces() if settings["isolate"] else False
        outcome = _run_first_process(settings, answers, is_other_user)
    except OSError as error:
        outcome = {"problem": str(error)}
    if outcome is not None:
        os.write(answers, json.dumps(outcome).encode())


def _run_first_process(
    settings: dict[str, Any], answers: int, is_other_user: bool
) -> dict[str, Any] | None:
    """Fork process 1 and wait for it; None if it has reported a problem itself."""
    first = os.fork()
    if first == 0:
        try:
            _first_process(settings, is_other_user, answers)
        except OSError as error:
            os.write(answers, json.dumps({"problem": str(error)}).encode())
        os._exit(125)
    handle = os.pidfd_open(first)
    ended = select.select([handle], [], [], settings["wall_seconds"])[0]
    if not ended:
        # Without a namespace this leaves the program, which `sandbox.py` ends with its session.
        os.kill(first, signal.SIGKILL)
    _, status = os.waitpid(first, 0)
    if not ended:
        return {"timeout": True}
    code = os.waitstatus_to_exitcode(status)
    return None if code == 125 else {"code": code}


def _enter_namespaces() -> bool:
    """Enter new namespaces for all but files; return whether a second user is mapped."""
    outside_read, inside_write = os.pipe()
    inside_read, outside_write = os.pipe()
    target, uid, gid = os.getpid(), os.geteuid(), os.getegid()
    helper = os.fork()
    if helper == 0:  # stays outside, since only from there more than one user can be mapped
        os.read(outside_read, 1)
        os.write(outside_write, _map_users(Path(f"/proc/{target}"), uid, gid))
        os._exit(0)
    spaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    try:
        _check(libc.unshare(CLONE_NEWUSER | spaces), "unshare")
    finally:
        os.write(inside_write, b"x")
        answer = os.read(inside_read, 200)
        os.waitpid(helper, 0)
    if answer not in (b"one", b"two"):
        raise OSError(f"user map: {answer.decode()}")
    # Nested namespaces would give the program capabilities again, if only over its own resources.
    with contextlib.suppress(OSError):
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    return answer == b"two"


def _map_users(process: Path, uid: int, gid: int) -> bytes:
    """Map the namespace's root to the caller, and its user 1 to nobody if that is allowed."""
    try:
        try:
            (process / "uid_map").write_text(f"0 {uid} 1\n1 {NOBODY} 1\n")
            (process / "gid_map").write_text(f"0 {gid} 1\n1 {NOBODY} 1\n")
        except PermissionError:
            (process / "setgroups").write_text("deny")
            (process / "uid_map").write_text(f"0 {uid} 1\n")
            (process / "gid_map").write_text(f"0 {gid} 1\n")
            return b"one"
    except OSError as error:
        return str(error).encode()[:200]
    return b"two"


def _first_process(settings: dict[str, Any], is_other_user: bool, answers: int) -> None:
    """Set up the root, run the program, wait for it, and end this process."""
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if settings["isolate"]:
        _new_root(Path(settings["root"]), settings)
        folder = Path("/tmp")
    else:
        folder = Path(settings["root"])
    for name, text in settings["files"].items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
    os.chdir(folder)
    program = os.fork()
    if program == 0:
        os.close(answers)
        if settings["isolate"]:
            _drop_privileges(is_other_user)
        _limit(settings)
        environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
        os.execve(settings["command"][0], settings["command"], environment)
    while True:
        ended, status = os.wait()  # also for orphans, which become children of process 1
        if ended == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if 0 <= code < 125 else 124)


def _new_root(root: Path, settings: dict[str, Any]) -> None:
    """Make `root` the root: system and Python read-only, /tmp in memory, nothing else."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", str(root), "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in (*SYSTEM_FOLDERS, *settings["folders"]):
        outside, inside = Path(name), root / name.lstrip("/")
        if outside.is_symlink():
            inside.symlink_to(outside.readlink())
        elif outside.is_dir() and not inside.exists():
            inside.mkdir(parents=True)
            _mount(name, str(inside), None, MS_BIND | MS_REC)
    for name in (*DEVICES, "/etc/ld.so.cache"):
        inside = root / name.lstrip("/")
        if Path(name).exists():
            inside.parent.mkdir(exist_ok=True)
            inside.touch()
            _mount(name, str(inside), None, MS_BIND)
    for name in ("proc", "tmp"):
        (root / name).mkdir()
    # Containers that hide parts of /proc do not allow mounting a complete one.
    with contextlib.suppress(OSError):
        _mount("proc", str(root / "proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    number = SYS_PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"no sandbox for {platform.machine()} processors")
    _check(libc.syscall(number, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), 32),
        "mount_setattr",
    )
    size = settings["disk_bytes"]
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=1777")


def _drop_privileges(is_other_user: bool) -> None:
    """Give up all privileges of the namespace's root for good."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text()) if _has_proc() else 40
    for capability in range(last + 1):
        _check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl")
    if is_other_user:  # the limit on processes does not apply to the machine's root
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def _has_proc() -> bool:
    return Path("/proc/sys/kernel/cap_last_cap").exists()


def _limit(settings: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: settings["cpu_seconds"],
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if settings["isolate"]:  # elsewhere it would count all processes of the user
        limits[resource.RLIMIT_NPROC] = settings["processes"]
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    texts = [None if x is None else x.encode() for x in (source, target, kind, data)]
    result = libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(result, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
