"""The paper's tables, which layers matter, and what to choose: measured on any model."""

from __future__ import annotations

from octavo.study.options import QUICK as QUICK
from octavo.study.options import TABLES as TABLES
from octavo.study.options import StudyOptions as StudyOptions
from octavo.study.run import run_study as run_study
from octavo.study.samplers import Sampler as Sampler
from octavo.study.variants import Variant as Variant
