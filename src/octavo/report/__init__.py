"""What people look at."""

from __future__ import annotations

from octavo.report.data import ReportData as ReportData
from octavo.report.front import front_svg as front_svg
from octavo.report.front import save_front as save_front
from octavo.report.gather import gather_report as gather_report
from octavo.report.grid import check_images_place as check_images_place
from octavo.report.grid import grid as grid
from octavo.report.grid import save_images as save_images
from octavo.report.grid import save_picture as save_picture
from octavo.report.grid import side_by_side as side_by_side
from octavo.report.html import check_report_place as check_report_place
from octavo.report.html import save_report as save_report
from octavo.report.html import to_html as to_html
from octavo.report.study_tables import read_study as read_study
from octavo.report.study_tables import study_report as study_report
