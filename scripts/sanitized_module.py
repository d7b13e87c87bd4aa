"""A pytest plugin that loads rnas._cpu from the file in RNAS_CPU_MODULE, before anything else imports it.

Where RNAS_SAMPLE is set, every so many of the tests are left, by a checksum of their names: parameters that alternate
are not all one half.
"""

import importlib.util
import os
import sys
from zlib import crc32

import torch  # noqa: F401  (the kernels run on its threads)

specification = importlib.util.spec_from_file_location("rnas._cpu", os.environ["RNAS_CPU_MODULE"])
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
sys.modules["rnas._cpu"] = module


def pytest_report_header() -> str:
    """Says so in the head of the report."""
    return f"rnas._cpu: {os.environ['RNAS_CPU_MODULE']}"


def pytest_collection_modifyitems(items: list) -> None:
    """Takes the sample."""
    every = int(os.environ.get("RNAS_SAMPLE", 1))
    items[:] = [item for item in items if crc32(item.nodeid.encode()) % every == 0]
