"""All benchmarks, one after the other: `make bench`, or `python -m bench [--data DIR] [--rounds N]`."""

from __future__ import annotations

import subprocess
import sys
import time

NAMES = ("input", "start", "baseline", "train_step", "arms", "scaling", "large_store", "hotspots")


def main() -> int:
    """Each in a process of its own, with the options given; the first failure ends it."""
    for name in NAMES:
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"bench.{name}", *sys.argv[1:]])
        if done.returncode:
            return done.returncode
        print(f"== {name}: {(time.perf_counter() - started) / 60:.1f} min\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
