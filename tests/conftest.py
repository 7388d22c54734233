import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
# A busy machine is no failure.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
