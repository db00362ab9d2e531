"""Set before anything is imported: no hub, and one folder for what DeepSpeed compiles, so that it does so once."""

import os
import tempfile

os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="wpn_ds_extensions_"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
