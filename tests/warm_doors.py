"""Runs doors one after another, each in a fork of a process that has imported everything: a start takes most of the
time of an error.

Reads JSON lists of a door's name and its arguments, a line each, and answers each with exit code, output and errors.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings

for heavy in ("data.encoding", "evaluation.benchmarks", "sampling.answers", "training.sweep"):
    importlib.import_module(f"lattejax.{heavy}")
warnings.filterwarnings("ignore", "os.fork")  # nothing has been computed yet: there are no threads


def answer(door: str, *arguments: str) -> dict[str, object]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors, open(os.devnull) as nothing:
        child = os.fork()
        if not child:
            for stream, number in ((nothing, 0), (out, 1), (errors, 2)):
                os.dup2(stream.fileno(), number)
            code = 0
            try:
                sys.argv = [door, *arguments]
                runpy.run_module(f"lattejax.{door}", run_name="__main__", alter_sys=True)
            except SystemExit as stopped:
                code = stopped.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        errors.seek(0)
        return {"returncode": os.waitstatus_to_exitcode(status), "stdout": out.read(), "stderr": errors.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
