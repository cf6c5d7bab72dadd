"""Engines that report to their makers, kept from it."""

from __future__ import annotations

import sys

REPORTER = "openvino_telemetry"


def refuse() -> None:
    """Let OpenVINO and NNCF find no telemetry package, so that they take their own stubs; called by `import octavo`.

    OpenVINO 2026.4 sends events to Google Analytics when it is imported and when it converts, and keeps a number of the
    user's in `~/intel`; NNCF when it quantizes. Neither asks. Where the package was imported before Octavo it stays.
    """
    sys.modules.setdefault(REPORTER, None)  # type: ignore[arg-type]
