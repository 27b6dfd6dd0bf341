"""A launcher for the tests: ``python launch_command.py RANKS LOGS GRACE NODES NODE_RANK PORT PROGRAM [ARGUMENTS]``."""

from __future__ import annotations

import sys
from pathlib import Path

from modalities_parallel.launch import Nodes, launch_ranks

ranks, logs, grace, count, node, port, *program = sys.argv[1:]
place = Nodes(int(count), int(node), "127.0.0.1", int(port)) if int(count) > 1 else None
command = [sys.executable, str(Path(__file__).with_name("launch_programs.py")), *program]
cause = launch_ranks(command, int(ranks), Path(logs), place, float(grace), join_seconds=60)
if cause is not None:
    print(f"CAUSE {cause.rank} {cause.exit_code} {cause.message}")
sys.exit(0 if cause is None else cause.process_code)
