"""The official VMamba for the command line; its file and its CUDA scan come from the environment.

    OFFICIAL_VMAMBA=vmamba.py OFFICIAL_SO=selective_scan_cuda_oflex.so \\
        vmeanba-fx bench --model benchmarks/official.py:vmamba_tiny_s1l8 --batch 128 --autocast float16 --out benchmarks/results
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from end_to_end import load_official


def vmamba_tiny_s1l8():
    return load_official(os.environ["OFFICIAL_VMAMBA"], os.environ["OFFICIAL_SO"]).vmamba_tiny_s1l8()
