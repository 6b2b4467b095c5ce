"""What a benchmark prints about the machine, and how it times."""

import ctypes
import datetime
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe_machine(*threads: int) -> str:
    """One line: processor, `threads` that are measured (torch's unless they are given), torch, date."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    if torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}; {processor}"
    counts = "/".join(map(str, threads or [torch.get_num_threads()]))
    return (
        f"{processor}, {counts} threads ({torch.backends.cpu.get_cpu_capability()}),"
        f" torch {torch.__version__}, {datetime.date.today()}"
    )


def interleaved_medians(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, which run in turn, so that a busy neighbour slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def peak_extra_bytes(candidate: Callable[[], None], device: str, interval: float = 0.002) -> int:
    """The most memory of `device` that `candidate` held above what was held before it: CUDA's count, or sampled on Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        candidate()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The allocator keeps what earlier candidates gave back: return it to the system, or it would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = _resident_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident_bytes())
            time.sleep(interval)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        candidate()
    finally:
        done.set()
        sampler.join()
    return max(peak - before, 0)
