"""Running the cells of a plan: some at a time, plain LoRA first, and nothing lost when one fails or all are stopped."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from tqdm import tqdm

from ldmole_ds.compare.cell import Cell
from ldmole_ds.compare.methods import Method
from ldmole_ds.compare.plan import Plan, chosen_rate, task_signal
from ldmole_ds.tasks import Task

LOG_TAIL_LINES = 15
# For a run to finish its step and write a checkpoint.
STOP_GRACE_S = 60.0


class CellError(Exception):
    """A process ended with an error, which has been told."""


class Slots:
    """So many at a time; of those that wait, the lowest turn first: one method is done before the next begins."""

    def __init__(self, slots: int) -> None:
        self._free, self._waiting, self._arrivals = list(range(slots))[::-1], [], itertools.count()

    @asynccontextmanager
    async def taken(self, turn: int) -> AsyncIterator[int]:
        """Hold a slot; yields its number."""
        if self._free:
            slot = self._free.pop()
        else:
            given = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (turn, next(self._arrivals), given))
            slot = await given
        try:
            yield slot
        finally:
            if self._waiting:
                heapq.heappop(self._waiting)[2].set_result(slot)
            else:
                self._free.append(slot)


class Runner:
    """Runs a plan.

    Args:
        plan: What to run.
        parallel: Processes at a time.
        threads: Of each.
    """

    def __init__(self, plan: Plan, parallel: int, threads: int) -> None:
        self.plan, self.failures = plan, []
        self._slots, self._threads = Slots(parallel), threads
        order = [(task.name, method.name) for task in plan.tasks for method in plan.methods]
        self._turn = {pair: place for place, pair in enumerate(order)}
        total = sum(plan.cells_of(task, method) for task in plan.tasks for method in plan.methods)
        self.bar = tqdm(total=total, unit="run", desc="comparing", dynamic_ncols=True)

    async def run(self) -> None:
        """Everything; failures are in `failures`."""
        try:
            await asyncio.gather(*(self._task(task) for task in self.plan.tasks))
        finally:
            self.bar.close()

    async def _task(self, task: Task) -> None:
        baseline, *others = self.plan.methods
        first, *seeds = self.plan.seeds
        if not await self._method(task, baseline, [first]):
            self._drop(sum(self.plan.cells_of(task, method) for method in others) + len(seeds))
            return
        found = task_signal(self.plan, task)
        if not found.found:
            self.bar.write(
                f"{task.name}: no signal: plain LoRA {found.accuracy:.3f}, chance {found.chance:.3f}, "
                f"{found.standard_errors_above_chance:.1f} standard errors above"
            )
            self._drop(sum(self.plan.cells_of(task, method) for method in others) + len(seeds))
            return
        rest = [self._method(task, method, self.plan.seeds) for method in others]
        await asyncio.gather(self._seeds(task, baseline, seeds), *rest)

    async def _method(self, task: Task, method: Method, seeds: Any) -> bool:
        """Choose a rate, then train these seeds; whether all went well."""
        chosen = await self._all(task, method, self.plan.selection(task, method))
        if not chosen:
            self._drop(len(seeds))
        return chosen and await self._seeds(task, method, seeds)

    async def _seeds(self, task: Task, method: Method, seeds: Any) -> bool:
        rate, _ = chosen_rate(self.plan, task, method)
        finals = self.plan.finals(task, method, rate)
        return await self._all(task, method, [finals[seed][1] for seed in seeds])

    async def _all(self, task: Task, method: Method, cells: list[Cell]) -> bool:
        turn = self._turn[task.name, method.name]
        return all(await asyncio.gather(*(self._cell(cell, turn) for cell in cells)))

    def _drop(self, cells: int) -> None:
        """These will not run."""
        self.bar.total -= cells
        self.bar.refresh()

    async def _cell(self, cell: Cell, turn: int) -> bool:
        if cell.result() is not None:
            self.bar.initial += 1  # costs no time: the estimate is by what runs now
            self.bar.update()
            return True
        async with self._slots.taken(turn) as slot:
            try:
                result = await self._run(cell, slot)
            except CellError as failure:
                self.failures.append(cell)
                self.bar.write(str(failure))
                self.bar.update()
                return False
        report = result.get("report") or result["evaluation"]["results"][0]
        accuracy = report.get("accuracy_after", report.get("accuracy"))
        self.bar.write(f"{cell.title}: accuracy {accuracy:.3f}, {result['seconds']:.0f} s")
        self.bar.update()
        return True

    async def _run(self, cell: Cell, slot: int) -> dict[str, Any]:
        cell.prepare()
        begin = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": "false"}
        if not self.plan.is_launched:
            environment |= _one_device(slot)
        command = [part.replace("{port}", str(_free_port())) for part in cell.command]
        with open(cell.log, "a") as log:
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                await _stop(process)
                raise
        try:
            if code == 0:
                return cell.finish(time.perf_counter() - begin)
            reason = f"exit code {code}"
        except (OSError, ValueError) as error:
            reason = str(error)
        tail = cell.log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()[-LOG_TAIL_LINES:]
        head = f"FAILED {cell.title}: {reason}; the end of {cell.log}:"
        raise CellError("\n".join([head, *(f"    {line}" for line in tail)]))


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, on which a run writes a checkpoint; what is then still there after a while is killed."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        await asyncio.wait_for(process.wait(), STOP_GRACE_S)
    except ProcessLookupError:
        return
    except (TimeoutError, asyncio.TimeoutError):
        os.killpg(process.pid, signal.SIGKILL)


def _one_device(slot: int) -> dict[str, str]:
    """A GPU for each slot, where there are several: a run without a launcher takes the first that it sees."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_plan(plan: Plan, parallel: int, threads: int) -> tuple[list[Cell], bool]:
    """Run what is not done yet.

    SIGTERM and Ctrl-C stop all processes; the same call goes on later.

    Returns:
        Cells that failed, and whether it was stopped.
    """

    async def main() -> tuple[list[Cell], bool]:
        runner = Runner(plan, parallel, threads)
        work, loop = asyncio.ensure_future(runner.run()), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            # The first process that has ended speaks for all: wait for the others too.
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*rest, return_exceptions=True)
            return runner.failures, True
        return runner.failures, False

    return asyncio.run(main())
