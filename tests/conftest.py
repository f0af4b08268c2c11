"""Settings of every test run: no telemetry, Triton interpreted where there is no card, Ctrl-C as at a terminal."""

import os
import signal

os.environ.setdefault("RAGAS_DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# a shell starts what runs in its background with Ctrl-C ignored, and some tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)
