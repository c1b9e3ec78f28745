"""How a launch script ends: rank 0 speaks before any rank leaves, since launchers end all ranks with the first."""

import pytest

from ldmole_ds.training import runtime


@pytest.mark.parametrize(("rank", "steps"), [("0", ["leave 2"]), ("1", ["wait", "leave 2"])])
def test_other_ranks_wait_for_rank_0_to_say_what_is_wrong(monkeypatch, capsys, rank, steps):
    def main(argv):
        raise runtime.UserError("--r must be above 0")

    done = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(runtime, "ranks_of_job", lambda: None)
    monkeypatch.setattr(runtime.time, "sleep", lambda seconds: done.append("wait"))
    monkeypatch.setattr(runtime, "leave", lambda code: done.append(f"leave {code}"))
    runtime.run_main(main)
    assert done == steps
    assert capsys.readouterr().err == ("error: --r must be above 0\n" if rank == "0" else "")
