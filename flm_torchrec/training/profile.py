"""Where the time of a step goes: some steps traced by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.files import replacing_file, write_text

FIRST = 5
"""Steps before the trace: the first ones allocate memory and are slower than all others."""
ROWS = 40
"""Operators in the table."""


@contextmanager
def profiled(steps: int, run: Path, comm: Comm) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps of this rank; the given function is to be called after each step. 0 steps: trace nothing.

    Writes RUN/profile-RANK.json, a trace for chrome://tracing or ui.perfetto.dev, and RUN/profile-RANK.txt, a table of
    the operators by their own time.
    """
    if steps == 0:
        yield lambda: None
        return
    on_gpu = comm.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def write(traced: profile) -> None:
        with replacing_file(run / f"profile-{comm.rank}.json") as fresh:
            traced.export_chrome_trace(str(fresh))
        sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        write_text(run / f"profile-{comm.rank}.txt", traced.key_averages().table(sort_by=sort_by, row_limit=ROWS))

    part = schedule(wait=0, warmup=FIRST, active=steps, repeat=1)
    with profile(activities=activities, schedule=part, on_trace_ready=write) as traced:
        yield traced.step
