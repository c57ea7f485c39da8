"""Entry point of an image: run its service in this process, so that it is process 1 and receives SIGTERM."""

import os
import runpy
import signal
import sys

# Exit on SIGTERM until the service installs its own handler, because the kernel drops signals for process 1 that
# have no handler.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
runpy.run_module(os.environ["SERVICE"].replace("-", "_"), run_name="__main__", alter_sys=True)
