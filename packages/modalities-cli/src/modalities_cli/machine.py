"""What this machine and this installation are: facts, and findings with advice. Nothing is changed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("modalities-core", "modalities-data", "modalities-models", "modalities-parallel", "modalities-cli")
GIB = 1 << 30
TIME_ERROR = 5
"""What adjtimex(2) gives for a clock that nothing keeps in time."""


class Finding(NamedTuple):
    """Something to look at: what it is, and what to do about it."""

    what: str
    advice: str


def facts(folder: Path) -> dict[str, Any]:
    """Everything `modalities doctor` tells, as JSON values by section; bytes and seconds."""
    return {
        "versions": versions(),
        "extras": extras(),
        "devices": devices(),
        "cpu": cpu(),
        "memory": memory(),
        "limits": {"open_files": open_files()},
        "clock": {"utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "synchronised": clock_is_synchronised()},
        "disk": disk(folder),
        "network": network(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, the packages, torch and what torch was built with."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: installed(name) for name in (*PACKAGES, "torch")}
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def extras() -> list[dict[str, Any]]:
    """Each extra of our packages: what of it is missing, and the line that installs it."""
    found: list[dict[str, Any]] = []
    for package in PACKAGES:
        needs: dict[str, list[str]] = {}
        for line in requires(package) or [] if installed(package) else []:
            name = re.match(r"[A-Za-z0-9._-]+", line)
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
            if name and extra:
                needs.setdefault(extra[1], []).append(name[0])
        for extra, names in needs.items():
            missing = [name for name in names if installed(name) is None]
            found.append(
                {"extra": f"{package}[{extra}]", "missing": missing, "pip": f'pip install "{package}[{extra}]"'}
            )
    return found


def devices() -> list[dict[str, Any]]:
    """The GPUs: name, memory, compute capability, bfloat16, and clocks in MHz where nvidia-smi tells them."""
    import torch

    if not torch.cuda.is_available():
        return []
    clocks = _gpu_clocks()
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        found.append(
            {
                "name": properties.name,
                "memory": total,
                "free": free,
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "bf16": capability >= (8, 0),
                "uuid": (uuid := f"GPU-{properties.uuid}"),
                "clock_mhz": clocks.get(uuid),
            }
        )
    return found


def _gpu_clocks() -> dict[str, dict[str, int]]:
    """By UUID: clock now and at most."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, "--query-gpu=uuid,clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
        return {row[0]: {"now": int(row[1]), "most": int(row[2])} for row in rows}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def cpu() -> dict[str, Any]:
    """Model, cores of the machine and for this process, torch's threads, and the instructions that bfloat16 needs."""
    import torch

    from modalities_parallel.launch import cores

    text = _read("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    names = set(flags[1].split()) if flags else set()
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "avx512": "avx512f" in names,
        "avx512_bf16": "avx512_bf16" in names,
        "amx_bf16": "amx_bf16" in names,
    }


def memory() -> dict[str, int | None]:
    """Bytes of the machine, of /dev/shm, what is free of both, and this container's limit; None where unknown."""
    rows = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "total": int(rows["MemTotal"]) << 10 if "MemTotal" in rows else None,
        "available": int(rows["MemAvailable"]) << 10 if "MemAvailable" in rows else None,
        "container_limit": int(limit) if limit.isdecimal() else None,
        "shared": shared.total if shared else None,
        "shared_free": shared.free if shared else None,
    }


def open_files() -> dict[str, int] | None:
    """The soft and the hard limit of open files; None where there is no such thing."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"soft": soft, "hard": hard}


def clock_is_synchronised() -> bool | None:
    """Whether the kernel says that something keeps its clock in time; None where it does not say."""
    import ctypes

    try:
        # Zeros ask for the state and set nothing; the structure has 208 bytes.
        return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) != TIME_ERROR
    except (AttributeError, OSError, TypeError):
        return None


def disk(folder: Path) -> dict[str, Any]:
    """Bytes of the disk that ``folder`` is on, and whether it can be written to."""
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "total": usage.total, "free": usage.free, "writable": os.access(folder, os.W_OK)}


def network() -> dict[str, Any]:
    """Interfaces, InfiniBand devices, what this host's name resolves to, and what gloo and NCCL are told."""
    interfaces = []
    for _, name in socket.if_nameindex() if hasattr(socket, "if_nameindex") else []:
        speed = _read(f"/sys/class/net/{name}/speed").strip()
        # -1 is what the kernel says of interfaces without a speed.
        known = int(speed) if speed.isdecimal() else None
        state = _read(f"/sys/class/net/{name}/operstate").strip() or None
        interfaces.append({"name": name, "state": state, "megabits_per_second": known})
    infiniband = Path("/sys/class/infiniband")
    told = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA")
    return {
        "interfaces": interfaces,
        "infiniband": sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else [],
        "host": socket.gethostname(),
        "address": _address(),
        "environment": {name: os.environ[name] for name in told if name in os.environ},
    }


def _address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def findings(known: dict[str, Any]) -> list[Finding]:
    """What of the facts stands in the way of a run, or slows it down."""
    return [finding for check in (_of_installation, _of_devices, _of_host) for finding in check(known)]


def _of_installation(known: dict[str, Any]) -> list[Finding]:
    of = {known["versions"].get(name) for name in PACKAGES}
    if len(of) == 1 and None not in of:
        return []
    listed = ", ".join(f"{name} {known['versions'].get(name) or 'missing'}" for name in PACKAGES)
    return [Finding(f"the packages do not belong together: {listed}", "pip install --upgrade modalities-cli")]


def _of_devices(known: dict[str, Any]) -> list[Finding]:
    found = []
    if not known["devices"] and shutil.which("nvidia-smi"):
        found.append(
            Finding(
                "nvidia-smi is here, but torch sees no GPU",
                "is CUDA_VISIBLE_DEVICES empty, torch a CPU build (versions.cuda), or the driver older than it needs?",
            )
        )
    for number, device in enumerate(known["devices"]):
        if not device["bf16"]:
            found.append(Finding(f"GPU {number} has no bfloat16", "train with param_dtype: fp16, or fp32"))
        if device["free"] < 0.9 * device["memory"]:
            used = (device["memory"] - device["free"]) / GIB
            found.append(Finding(f"{used:.1f} GiB of GPU {number} are in use", "nvidia-smi shows by which process"))
    return found


def _of_host(known: dict[str, Any]) -> list[Finding]:
    found = []
    memory, processor, limit = known["memory"], known["cpu"], known["limits"]["open_files"]
    if memory["shared"] is not None and memory["shared"] < GIB:
        size = f"/dev/shm has {memory['shared'] / GIB:.2f} GiB, which NCCL and data workers share"
        found.append(Finding(size, "start the container with --shm-size=8g, or --ipc=host"))
    if limit and 0 <= limit["soft"] < 4096:
        found.append(Finding(f"a process may open {limit['soft']} files", f"ulimit -n {min(limit['hard'], 65536)}"))
    if processor["torch_threads"] > processor["usable_cores"]:
        threads = f"torch has {processor['torch_threads']} threads on {processor['usable_cores']} cores"
        found.append(Finding(threads, f"export OMP_NUM_THREADS={processor['usable_cores']}"))
    if not known["devices"] and not (processor["avx512_bf16"] or processor["amx_bf16"]):
        found.append(Finding("this CPU has no bfloat16 instructions", "precision fp32 is the faster one here"))
    if known["clock"]["synchronised"] is False:
        found.append(Finding("nothing keeps the clock in time", "start chrony or systemd-timesyncd; logs need it"))
    if not known["disk"]["writable"]:
        found.append(Finding(f"{known['disk']['folder']} cannot be written to", "run elsewhere, or use --folder"))
    if known["disk"]["free"] < 10 * GIB:
        free = f"{known['disk']['free'] / GIB:.1f} GiB are free in {known['disk']['folder']}"
        found.append(Finding(free, "a checkpoint takes 12 bytes per parameter: use --folder on another disk"))
    address = known["network"]["address"]
    if address is None:
        found.append(Finding("this host's name resolves to no address", "add it to /etc/hosts; gloo looks there"))
    elif address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in known["network"]["environment"]:
        loop = f"this host's name resolves to {address}, where other nodes do not reach it"
        found.append(Finding(loop, "for several nodes: export GLOO_SOCKET_IFNAME=<interface>, likewise for NCCL"))
    return found
