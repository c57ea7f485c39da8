"""What an image starts: the service it was built for. It becomes process 1, so it gets SIGTERM itself."""

import os
import runpy

runpy.run_module(os.environ["SERVICE"].replace("-", "_"), run_name="__main__", alter_sys=True)
