"""A quantized model executed for real, and the audit that says so."""

from __future__ import annotations

from octavo.runtimes.accelerate import Executor as Executor
from octavo.runtimes.accelerate import accelerate as accelerate
from octavo.runtimes.accelerate import audit as audit
from octavo.runtimes.accelerate import executor_of as executor_of
from octavo.runtimes.accelerate import executors_of as executors_of
from octavo.runtimes.audit import AuditRow as AuditRow
from octavo.runtimes.audit import require_integers as require_integers
from octavo.runtimes.export import export as export
from octavo.runtimes.reuse import with_reuse as with_reuse
from octavo.runtimes.streams import limited_threads as limited_threads
