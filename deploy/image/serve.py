"""What an image starts: the service it was built for. It becomes process 1, so it gets SIGTERM itself."""

import os
import runpy
import signal
import sys

# Until the service has its own handler: process 1 has none by default, and without one the signal would be lost.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
runpy.run_module(os.environ["SERVICE"].replace("-", "_"), run_name="__main__", alter_sys=True)
