"""Speed and memory of packed models beside other engines, on this machine's CPU.

    python benchmarks/inference.py [--models deit_small_patch16_224] [--batch_sizes 1] [--threads 1] [--rounds 7]
    python benchmarks/inference.py --products

Each engine runs in a process of its own, where its threads disturb no other's. The processes take turns: in each round
every one times a few passes while the others wait. The table holds the median of all passes, its ratio to torch's in
float32, eager, and the most memory that the process took beyond its imports. Weights are random: speed does not depend
on them. ONNX Runtime and OpenVINO need `pip install onnx onnxruntime onnxscript openvino`; int8 in OpenVINO is the QDQ file
of ONNX Runtime.
`--products` times the matrix products alone, on one thread, as a share of the most that the multiplying instructions allow.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _arguments import positive
from _machine import describe_machine

from quantformer_hf.report import format_table


MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
BASELINE = "torch fp32 eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--products", action="store_true", help="the matrix products alone")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    engines = parser.add_argument_group("without --products")
    engines.add_argument("--models", nargs="+", default=list(MODELS), help="timm's names")
    engines.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 8])
    engines.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    engines.add_argument("--passes", type=positive, default=3, help="of each engine in a round")
    engines.add_argument("--engines", nargs="+", help="by default all that are installed")
    engines.add_argument("--folder", type=Path, help="to keep the models in for the next time")
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
    elif arguments.products:
        from _products import print_products

        print(describe_machine(1))
        print_products(arguments.rounds)
    else:
        # Not at the top: the workers, whose memory is measured, run this file too.
        from quantformer_hf.checkpoint_timm import did_you_mean, registered_name

        for name in arguments.models:
            if registered_name(name) is None:
                parser.error(f"--models: {name!r} is not known to timm{did_you_mean(name)}")
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from _engines import available_engines, prepare
    from checkpoint_size import full_precision

    available = available_engines()
    engines = arguments.engines or available
    missing = [engine for engine in engines if engine not in available]
    if missing:
        sys.exit(f"there is no engine {missing[0]!r} here: choose from {', '.join(map(repr, available))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        print(describe_machine(*arguments.threads))
        for name in arguments.models:
            for batch in arguments.batch_sizes:
                (folder / name).mkdir(parents=True, exist_ok=True)
                model = full_precision(name, folder / name)
                prepare(model, folder / name, batch, engines)
                shape = (batch, 3, model.config.image_size, model.config.image_size)
                for threads in arguments.threads:
                    rows = race(engines, folder / name, shape, threads, arguments.rounds, arguments.passes)
                    print(f"\n{name}, batch {batch}, threads {threads}\n")
                    print(format_table(["", "speed", "median", "memory"], rows), flush=True)


def race(
    engines: list[str], folder: Path, shape: tuple[int, ...], threads: int, rounds: int, passes: int
) -> list[list[str]]:
    """Rows of the table: engine, speed as a ratio to the baseline's, milliseconds, memory."""
    workers = {
        engine: subprocess.Popen(
            [sys.executable, __file__, "--worker", engine, str(folder), str(threads), *map(str, shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for engine in engines
    }
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    memory = {}
    try:
        for _ in range(rounds + 1):
            for engine, worker in workers.items():
                answer = ask(worker, engine, passes)
                times[engine] += answer["seconds"]
                memory[engine] = answer["memory"]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    # The first round warms up.
    medians = {engine: statistics.median(measured[passes:]) for engine, measured in times.items()}
    slowest = medians.get(BASELINE)
    return [
        [
            engine,
            f"{slowest / median:.2f}" if slowest else "-",
            f"{1000 * median:.1f} ms",
            f"{memory[engine] / 1e6:.0f} MB",
        ]
        for engine, median in medians.items()
    ]


def ask(worker: subprocess.Popen, engine: str, passes: int) -> dict:
    worker.stdin.write(f"{passes}\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"{engine} ended without an answer, exit code {worker.wait()}")


def work(engine: str, folder: str, threads: str, *shape: str) -> None:
    """A process of one engine: for each line, that many passes of images of `shape`, and their seconds."""
    from _engines import import_engine, load

    import_engine(engine)
    # Loading and running are measured, not the imports: their highest mark is taken back.
    Path("/proc/self/clear_refs").write_text("5")
    imported = memory_of("VmRSS")
    images = np.random.default_rng(0).standard_normal([*map(int, shape)], dtype=np.float32)
    run = load(engine, Path(folder), images, int(threads))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run(images)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "memory": memory_of("VmHWM") - imported}), flush=True)


def memory_of(field: str) -> int:
    """Bytes of a field of this process's status (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
