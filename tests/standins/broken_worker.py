"""A child that measures nothing and ends as it is told: {"ends": "a signal's name", "status N" or "raised"}."""

from __future__ import annotations

import json
import os
import signal
import sys

print("a library greets")
print("[1, 2", flush=True)
request = json.loads(sys.stdin.read())
print(json.dumps({"answer": {"number": 1}}), flush=True)
ends = request["ends"]
if ends.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, ends))
if ends == "raised":
    raise ZeroDivisionError("a bug")
print(json.dumps({"error": "what happened", "hint": "what to do"}), flush=True)
sys.exit(int(ends.removeprefix("status ")))
