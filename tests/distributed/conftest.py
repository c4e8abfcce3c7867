"""Processes of one job, without a launcher: what each prints and its exit code are its own."""

import os
import socket
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def launch():
    def run(size, *arguments, seconds=170):
        """Exit codes, and what each rank printed to stdout and stderr."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        common |= {"OMP_NUM_THREADS": "1", "BEFT_RANK_TIMEOUT": "100"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=seconds) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        return [process.returncode for process in ranks], said

    return run
