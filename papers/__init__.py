"""One script for each paper.  What follows is for `python -m papers.<name>` alone, while its
packages are loaded, which takes seconds: Ctrl-C and a torch that does not load get one line."""
import os
import signal
import sys

if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        print(f"error: torch of {sys.executable} cannot be loaded ({' '.join(str(error).split())}):"
              " mend it, or take another Python", file=sys.stderr)
        sys.exit(2)
