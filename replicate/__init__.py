"""What all scripts share: training with exact resume, data, evaluation, records and pages."""
import getpass
import os
import tempfile

try:
    getpass.getuser(), tempfile.gettempdir()
except (KeyError, OSError):  # a container's user without a name, or no temporary folder
    # for torch's compiler, which asks for both when it is loaded, and is not used here
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.dirname(__file__))
