"""Engines that report to their makers, kept from it."""

from __future__ import annotations

import os
import sys

REPORTER = "openvino_telemetry"


def refuse() -> None:
    """Let OpenVINO and NNCF find no telemetry package, and ONNX Runtime its opt-out; called by `import octavo`.

    OpenVINO 2026.4 sends events to Google Analytics when it is imported and when it converts, and keeps a number of the
    user's in `~/intel`; NNCF when it quantizes. ONNX Runtime from 1.29 on sends Microsoft events of each process and
    session, and keeps a number of the machine's in `~/.cache/Microsoft`. None of them asks. What was imported before
    Octavo stays as it is, and so does a variable that the user has set.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault(REPORTER, None)  # type: ignore[arg-type]
