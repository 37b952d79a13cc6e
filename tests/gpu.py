"""What a CUDA device makes of the library, in at most nine minutes: `make gpu`.

    python tests/gpu.py FOLDER          # PART.json for each part, written as soon as it is known
    python tests/gpu.py FOLDER --toy    # the same on the CPU, in a few updates: whether it works

Each part is a process of its own with a limit of its own, so that one that fails or hangs costs
no other. It needs torch and what repeatlab imports; what is missing is said by the part that
misses it. Without a device it says what it would do, and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Part -> seconds, and what it does.
PARTS = {
    "tests": (150, "the tests that need a CUDA device, tests/package/test_cuda.py"),
    "updates": (180, "updates per second and peak memory of every task: bare, and as runs are"),
    "processes": (90, "1 to 8 processes that train on one device: updates per second together"),
    "resnet": (90, "ResNet-18, batches of 128: float32, bfloat16, bfloat16 with channels last"),
}
TOY_FIELDS = {"width": 4, "mu": 1, "projection": 8, "bank": 200, "fid_samples": 20, "latent": 5}


def tests(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/package/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield {"status": done.returncode, "said": done.stdout[-4000:], "errors": done.stderr[-2000:]}


def timed(device: str, update: Callable[[], object], seconds: float) -> float:
    """Return updates per second, after a few that are not timed."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        update()
    wait()
    made, start = 0, perf_counter()
    while not made or perf_counter() - start < seconds:
        update()
        made += 1
        if made % 20 == 0:
            wait()  # the host would run ahead of what it times
    wait()
    return made / (perf_counter() - start)


def small_task(name: str, device: str, toy: bool) -> Any:
    from repeatlab.tasks import TASKS, load_task

    kind = load_task(TASKS[name])
    fields = {k: v for k, v in TOY_FIELDS.items() if toy and k in kind.Config.model_fields}
    config = kind.Config.model_validate({"name": name} | fields)
    return kind(config, seed=0, device=device)


def reported(task: Any, repeater: Any) -> Callable[[], None]:
    """Return the update of a task on a repeater's next batch, which learns of its loss."""
    visits = iter(repeater)
    return lambda: task.step(next(visits), lambda loss, *_: repeater.report(loss))


def updates(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    """Bare: the task's update, whose loss nobody reads. Then the same under a repeater."""
    import itertools

    import torch

    from repeatlab.repetition.mappings import Constant, Linear
    from repeatlab.repetition.repeater import BatchRepeater
    from repeatlab.tasks import TASKS

    for name in ("supervised", "reinforcement") if toy else TASKS:
        row: dict[str, Any] = {"task": name}
        try:
            task = small_task(name, device, toy)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            batches = [task.fresh_batch(index) for index in range(4 if toy else 16)]
            fresh = itertools.cycle(batches)
            rates = {"bare": lambda task=task, fresh=fresh: task.step(next(fresh), lambda *_: None)}
            for arm, mapping in (("constant", Constant(1)), ("linear", Linear(t=1.0))):
                repeater = BatchRepeater(batches, repeats=mapping, max_updates=10**9)

                rates[arm] = reported(task, repeater)
            for arm, update in rates.items():
                row[f"{arm}, updates/s"] = timed(device, update, 0.01 if toy else 1.0)
            if device == "cuda":
                row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as error:  # the other tasks are to be timed all the same
            row["error"] = f"{type(error).__name__}: {error}"
        yield row


def worker(device: str, toy: bool) -> None:
    """One of several processes: says that it is ready, waits for a line, trains for seconds."""
    task = small_task("supervised", device, toy)
    batch = task.fresh_batch(0)
    for _ in range(3):
        task.step(batch, lambda *_: None)
    print("ready", flush=True)
    sys.stdin.readline()
    print(timed(device, lambda: task.step(batch, lambda *_: None), 0.01 if toy else 3.0))


def processes(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    command = [sys.executable, __file__, "-", "--part", "worker", *(["--toy"] if toy else [])]
    for count in (1, 2) if toy else (1, 2, 4, 8):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers = [subprocess.Popen(command, **pipes) for _ in range(count)]
        for each in workers:
            each.stdout.readline()
        for each in workers:
            each.stdin.write("go\n")
            each.stdin.flush()
        rates = [float(each.communicate()[0]) for each in workers]
        yield {"processes": count, "updates/s together": sum(rates), "slowest": min(rates)}


def resnet(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    import torch
    from torch.nn.functional import cross_entropy

    from repeatlab.tasks.models import resnet18
    from repeatlab.tasks.precision import Precision

    count = 2 if toy else 128
    for name, dtype, layout in (
        ("float32", None, torch.contiguous_format),
        ("bfloat16", torch.bfloat16, torch.contiguous_format),
        ("bfloat16, channels last", torch.bfloat16, torch.channels_last),
    ):
        model = resnet18(3, 10).to(device, memory_format=layout)
        images = torch.randn(count, 3, 32, 32, device=device).to(memory_format=layout)
        labels = torch.zeros(count, dtype=torch.long, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        precision = Precision(dtype, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def update(model=model, images=images, optimizer=optimizer, precision=precision) -> None:
            loss = cross_entropy(precision(model, images), labels)  # noqa: B023
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        row = {"format": name, "images/s": count * timed(device, update, 0.01 if toy else 4.0)}
        if device == "cuda":
            row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        yield row


def write(path: Path, part: dict[str, Any]) -> None:
    path.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")


def run_part(name: str, folder: Path, device: str, toy: bool) -> None:
    """Write a part's rows as they come: what a limit cuts short has left what it knew."""
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found: dict[str, Any] = {"device": where, "torch": torch.__version__, "toy": toy, "rows": []}
    parts = {"tests": tests, "updates": updates, "processes": processes, "resnet": resnet}
    for row in parts[name](device, toy):
        found["rows"].append(row)
        write(folder / f"{name}.json", found)


def in_time(name: str, folder: Path, toy: bool) -> str:
    """Run a part in a process group of its own, end it at its limit, and return how it ended."""
    command = [sys.executable, __file__, str(folder), "--part", name, *(["--toy"] if toy else [])]
    start = perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        part = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            status = part.wait(PARTS[name][0])
            ended = "done" if status == 0 else f"failed with status {status}; see {name}.log"
        except subprocess.TimeoutExpired:
            ended = f"ended at its limit of {PARTS[name][0]} s"
        finally:
            with suppress(ProcessLookupError):  # it has ended, with all that it started
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
    return f"{name}: {ended}, {perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--toy", action="store_true", help="on the CPU, a few updates")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.path.insert(0, str(ROOT))
    device = "cpu" if options.toy else "cuda"
    if options.part == "worker":
        return worker(device, options.toy)
    if options.part:
        return run_part(options.part, options.folder, device, options.toy)
    if not options.toy and not has_device():
        print("There is no CUDA device: nothing is run. With one, it would be:")
        for name, (limit, what) in PARTS.items():
            print(f"  {name}, at most {limit} s: {what}")
        return None
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        (options.folder / f"{name}.json").unlink(missing_ok=True)
        print(in_time(name, options.folder, options.toy), flush=True)
    return None


def has_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
