"""Set before anything is imported: no hub, one thread, and one folder for what DeepSpeed compiles, which outlives a run
of the tests."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

_KEPT = Path(__file__).parent.parent / ".pytest_cache" / "extensions"
_FOR = f"python-{sys.version_info.major}.{sys.version_info.minor}-torch-{version('torch')}-{version('deepspeed')}"

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_KEPT / _FOR))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny, and tests and ranks run side by side
