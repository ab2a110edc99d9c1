"""Keeps ONNX Runtime from reporting to its maker.

Official builds for Linux do by default (seen in 1.32: an uploader and a device id of its own). What turns all of it off
is a variable in the environment, read as the library is first imported: this module comes before it.
Source: Privacy.md in the package onnxruntime.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
