"""What a CUDA device makes of the library, in at most seven minutes: `make gpu`.

    python tests/gpu.py FOLDER          # PART.json for each part, written as soon as it is known
    python tests/gpu.py FOLDER --toy    # the same on the CPU, in a few updates: whether it works

Each part is a process of its own with a limit of its own, so that one that fails or hangs costs
no other. It needs torch and what repeatlab imports; what is missing is said by the part that
misses it. Without a device it says what it would do, and ends.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Part -> seconds, and what it does.
PARTS = {
    "tests": (60, "the tests that need a CUDA device, tests/package/test_cuda.py"),
    "updates": (100, "updates per second of every task: bare, as runs are, as a graph, compiled"),
    "processes": (60, "1 to 8 processes that train on one device: updates per second together"),
    "lockstep": (120, "8 to 224 arms in lock-step, eager and as CUDA graphs, beside one alone"),
    "resnet": (30, "ResNet-18, batches of 128: float32, bfloat16, bfloat16 with channels last"),
}
RATE = "updates/s together"
# In the part of all updates: nothing more is compiled after so many seconds.
COMPILE_UNTIL = 55
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


def small_task(name: str, device: str, toy: bool, **more: Any) -> Any:
    from repeatlab.tasks import TASKS, load_task

    kind = load_task(TASKS[name])
    fields = {k: v for k, v in TOY_FIELDS.items() if toy and k in kind.Config.model_fields}
    config = kind.Config.model_validate({"name": name} | fields | more)
    return kind(config, seed=0, device=device)


def reported(task: Any, repeater: Any) -> Callable[[], None]:
    """Return the update of a task on a repeater's next batch, which learns of its loss."""
    visits = iter(repeater)
    return lambda: task.step(next(visits), lambda loss, *_: repeater.report(loss))


def as_graph(task: Any) -> Callable[[], None]:
    """Return what replays a task's update on one batch as a CUDA graph; off CUDA, what makes it."""
    import torch

    batch = task.fresh_batch(0)
    if task.device.type != "cuda":
        return lambda: task.step(batch, lambda *_: None)
    if getattr(task, "noise", None) is not None:
        raise ValueError("the host draws what each update needs: a graph would repeat one draw")
    for optimizer in task.optimizers:
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            task.step(batch, lambda *_: None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task.step(batch, lambda *_: None)
    return graph.replay


def compiled(name: str, device: str, toy: bool) -> Callable[[], None]:
    """Return a task's update with its networks compiled; at toy size as they are."""
    from repeatlab.tasks.precision import cannot_compile

    if not toy and (reason := cannot_compile(device)) is not None:
        raise RuntimeError(f"torch.compile: {reason}")
    task = small_task(name, device, toy, **({} if toy else {"compile": True}))
    batch = task.fresh_batch(0)
    return lambda: task.step(batch, lambda *_: None)


def as_runs_are(name: str, device: str, toy: bool) -> dict[str, Callable[[], None]]:
    """Return a task's updates whose loss nobody reads, and those under a repeater."""
    from repeatlab.repetition.mappings import Constant, Linear
    from repeatlab.repetition.repeater import BatchRepeater

    task = small_task(name, device, toy)
    batches = [task.fresh_batch(index) for index in range(4 if toy else 16)]
    fresh = itertools.cycle(batches)
    made = {"bare": lambda: task.step(next(fresh), lambda *_: None)}
    for arm, mapping in (("constant", Constant(1)), ("linear", Linear(t=1.0))):
        repeater = BatchRepeater(batches, repeats=mapping, max_updates=10**9)
        made[arm] = reported(task, repeater)
    return made


def updates(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    """Every task as runs are; then as a graph; then compiled, while there is time."""
    import torch

    from repeatlab.tasks import TASKS

    began = perf_counter()
    names = ("supervised", "reinforcement") if toy else tuple(TASKS)
    makes: dict[str, Callable[[str], dict[str, Callable[[], None]]]] = {
        "run": lambda name: as_runs_are(name, device, toy),
        "graph": lambda name: {"graph": as_graph(small_task(name, device, toy))},
        "compiled": lambda name: {"compiled": compiled(name, device, toy)},
    }
    for kind, make in makes.items():
        for name in names:
            row: dict[str, Any] = {"task": name, "as": kind}
            if kind == "compiled" and perf_counter() - began > COMPILE_UNTIL:
                yield row | {"error": "not tried: no time was left"}
                continue
            try:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                for arm, update in make(name).items():
                    row[f"{arm}, updates/s"] = timed(device, update, 0.01 if toy else 0.7)
                if device == "cuda":
                    row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            except Exception as error:  # the other tasks are to be timed all the same
                row["error"] = f"{type(error).__name__}: {error}"[:1000]
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
    for count in (1, 2) if toy else (1, 4, 8):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers = [subprocess.Popen(command, **pipes) for _ in range(count)]
        for each in workers:
            each.stdout.readline()
        for each in workers:
            each.stdin.write("go\n")
            each.stdin.flush()
        rates = [float(each.communicate()[0]) for each in workers]
        yield {"processes": count, "updates/s together": sum(rates), "slowest": min(rates)}


def random_images(folder: Path, side: int, channels: int) -> str:
    """Write random images of ten classes as a data set of one's own; return its path."""
    import numpy as np

    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (2000, side, side, channels), dtype=np.uint8)
    np.savez(folder / f"{side}.npz", images=images, labels=np.arange(2000) % 10)
    return str(folder / f"{side}.npz")


def round_of(stack: Any, batches: list[Any], arms: int) -> Callable[[], None]:
    """Return an update of all arms, of which each second one comes to a fresh batch."""
    rounds = itertools.count()

    def update() -> None:
        number = next(rounds)
        for arm in range(arms):
            if number < 1 or (arm + number) % 2:
                stack.stage(arm, batches[(arm + number) % len(batches)])
        stack.losses()
        stack.step()

    return update


def lockstep(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    """Arms of one task; `alone` is that task's update by itself, one after another."""
    with tempfile.TemporaryDirectory() as name:
        grey, coloured = (random_images(Path(name), *shape) for shape in ((28, 1), (32, 3)))
        tasks: dict[str, dict[str, Any]] = {
            "CNN on 28 x 28 x 1": {"name": "supervised", "dataset": grey},
            "CNN on 32 x 32 x 3": {"name": "supervised", "dataset": coloured},
            "VAE on 28 x 28": {"name": "unsupervised", "dataset": grey, "width": 32},
            "language": {"name": "language"},
        }
        for title, fields in tasks.items():
            fields |= {"width": 4, "batch_size": 8} if toy else {}
            yield from lockstep_of(title, fields, device, toy)


def lockstep_of(
    title: str, fields: dict[str, Any], device: str, toy: bool
) -> Iterator[dict[str, Any]]:
    import torch

    from repeatlab.studies.lockstep.functional import FunctionalStack
    from repeatlab.tasks import TASKS, load_task

    kind, seconds, counts = load_task(TASKS[fields["name"]]), 0.5, (8, 64, 224)
    if toy:
        seconds, counts = 0.01, (2,)
    config = kind.Config.model_validate(fields)
    first = kind(config, seed=0, device=device)
    tasks = [kind(config, seed=seed, device=device, data=first.data) for seed in range(counts[-1])]
    batches = [first.fresh_batch(index) for index in range(8)]
    alone = timed(device, lambda: first.step(batches[0], lambda *_: None), seconds)
    for arms, graphs in itertools.product(counts, (False, True)):
        row = {"task": title, "arms": arms, "as": "graph" if graphs else "eager"}
        row["alone, updates/s"] = alone
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                stack = FunctionalStack(tasks[:arms], graphs=graphs)
                row["rounds/s"] = timed(device, round_of(stack, batches, arms), seconds)
            row["updates/s together"] = arms * row["rounds/s"]
            row["warned"] = [str(warning.message)[:500] for warning in said]
            if device == "cuda":
                row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as error:  # as in `updates`
            row["error"] = f"{type(error).__name__}: {error}"[:1000]
        stack = None
        yield row


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

        row = {"format": name, "images/s": count * timed(device, update, 0.01 if toy else 3.0)}
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
    for row in globals()[name](device, toy):
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
    if options.part == "table":
        return print(table(options.folder))
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
    print(table(options.folder))
    return None


def table(folder: Path) -> Path:
    """Write what the parts measured as one table, FOLDER.csv, for the page on speed."""
    rows = []
    for name in ("updates", "processes", "lockstep", "resnet"):
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for row in found["rows"]:
            what = row.get("task") or row.get("format") or "supervised"
            count = row.get("arms") or row.get("processes") or 1
            rates = {key: row[key] for key in row if key.endswith("/s") or key == RATE}
            alone = rates.pop("alone, updates/s", None)
            rates = {RATE: rates[RATE]} if RATE in rates else rates
            for key, rate in rates.items():
                how, _, unit = key.rpartition(", ")
                shown = {"part": name, "what": what, "how": how or row.get("as", ""), "n": count}
                shown |= {"a second": f"{rate:.0f}", "unit": unit.split("/")[0]}
                shown["times one alone"] = f"{rate / alone:.1f}" if alone else ""
                shown["peak MiB"] = f"{row.get('peak MiB', 0):.0f}" if "peak MiB" in row else ""
                rows.append(shown | {"device": found["device"], "torch": found["torch"]})
    path = folder.with_suffix(".csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def has_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
