"""One script for each paper.  What follows is for `python -m papers.<name>` alone, while its
packages are loaded, which takes seconds: Ctrl-C and a torch that does not load get one line."""
import os
import signal
import sys

if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
    from replicate import records

    try:
        records.require_torch()
    except records.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
