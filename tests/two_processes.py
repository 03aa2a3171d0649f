"""Two processes that know of each other, as on a cluster of two machines."""

import json
import socket
import subprocess
import sys


def told_by_two(script, *arguments):
    """What each of two processes of `python SCRIPT PORT PROCESS ARGUMENTS` tells, as JSON.

    Each is to print one line that is a JSON object. Gloo has something to say on stdout too.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(i), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    told = [[line for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]
    assert [len(lines) for lines in told] == [1, 1]
    return [json.loads(lines[0]) for lines in told]
