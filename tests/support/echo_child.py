"""A child of the benchmarks' protocol that measures nothing: hands back its specification, then every line."""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    sys.stdout.write(sys.argv[1] + "\n")
    sys.stdout.flush()
    for line in iter(sys.stdin.readline, ""):
        if line == "fail\n":
            sys.exit("as it was told")
        sys.stdout.write(json.dumps({"line": line.strip()}) + "\n")
        sys.stdout.flush()
