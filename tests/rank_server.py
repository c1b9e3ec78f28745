"""Starts ranks by forking one process that has imported everything: a rank then begins in a moment, not in seconds.

Most of a short test on ranks would be their imports. One server without DeepSpeed and one with it are started when they
are first needed; they hold no threads, no process group and no random state that a rank would inherit differently. They
end with the tests.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_POLL_S = 0.02
_servers: dict[bool, subprocess.Popen] = {}


class Rank:
    """A forked rank, with what `subprocess.Popen` has that its starter needs."""

    def __init__(self, pid: int, exit_file: Path) -> None:
        self.pid, self._exit_file = pid, exit_file

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        try:
            return int(self._exit_file.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(_POLL_S)
        return code


def fork_rank(script: str, folder: Path, rank: int, env: dict[str, str], *, deepspeed: bool) -> Rank:
    """Run ``script folder`` as a forked process in a session of its own, what it prints in ``folder/log<rank>.txt``."""
    server = _servers.get(deepspeed)
    if server is None or server.poll() is not None:
        command = [sys.executable, __file__, "deepspeed" if deepspeed else "plain"]
        quiet = subprocess.DEVNULL
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True)
        _servers[deepspeed] = server
    exit_file = folder / f"exit{rank}.txt"
    request = {"script": script, "folder": str(folder), "log": str(folder / f"log{rank}.txt"), "env": env}
    server.stdin.write(json.dumps({**request, "exit": str(exit_file), "cwd": os.getcwd()}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"the server of ranks ended with {server.wait()}")
    return Rank(int(answer), exit_file)


# ---- server ----


def _serve(kind: str) -> None:
    """Fork a rank for every line on stdin; note the exit codes of those that end; end when stdin does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    _import_all(kind)
    running: dict[int, str] = {}
    lines = b""
    while True:
        readable, _, _ = select.select([0], [], [], _POLL_S if running else 1.0)
        if readable:
            data = os.read(0, 1 << 20)
            if not data:
                break
            lines += data
        while b"\n" in lines:
            line, lines = lines.split(b"\n", 1)
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _become(request)
            running[pid] = request["exit"]
            print(pid, file=answers, flush=True)
        _note_exits(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _import_all(kind: str) -> None:
    import torch
    import transformers
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments  # noqa: F401  (they are imported lazily)

    torch.set_num_threads(1)
    if kind == "deepspeed":
        import accelerate  # noqa: F401
        import deepspeed
        import deepspeed.moe.layer
        import deepspeed.runtime.zero.stage3
        import transformers.integrations.deepspeed

        del deepspeed
    del transformers


def _note_exits(running: dict[int, str]) -> None:
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            path = running.pop(pid)
            try:
                Path(f"{path}.part").write_text(str(os.waitstatus_to_exitcode(status)))
                os.rename(f"{path}.part", path)
            except FileNotFoundError:  # nobody waits for it any more
                pass


def _become(request: dict) -> None:
    """This process is now as if the script had been started with the environment of the request."""
    code = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = [request["script"], request["folder"]]
        sys.path.insert(0, str(Path(request["script"]).resolve().parents[1]))
        from tests.distributed_utils import run_rank

        run_rank(Path(request["folder"]))
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
